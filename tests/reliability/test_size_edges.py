"""R4: each limit, one below it and one above it; the answer is exact."""

import io
from math import inf, nan, nextafter

import pytest
from PIL import Image

from serve.inference import grpc_inference_service_pb2 as oip
from serve.inference import grpc_inference_service_pb2_grpc as oip_grpc
from serve.oip_requests import MAX_TAGS_CHARACTERS
from serve.parsing import MAX_PARTS
from serve.requests import MAX_PAGE_TOKEN, MAX_REQUEST_ID
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
MAX_PIXELS, MAX_BYTES, MAX_BATCH = 64, 400_000, 4
OK = ("OK", "")
INVALID = ("INVALID_ARGUMENT", "INVALID_REQUEST")
UNKNOWN_CLASS = ("INVALID_ARGUMENT", "UNKNOWN_CLASS")
TOO_LARGE = ("RESOURCE_EXHAUSTED", "IMAGE_TOO_LARGE")
OF_GRPC = ("RESOURCE_EXHAUSTED", "")
CAM, PSEUDO_MASK, SEGMENTATION = 1, 2, 3


@pytest.fixture(scope="module")
def limited(toy_bundle, tmp_path_factory, watch):
    """A server of small limits."""
    flags = ["--max-pixels", str(MAX_PIXELS), "--max-message-bytes", str(MAX_BYTES), "--max-batch", str(MAX_BATCH)]
    yield from watch(toy_bundle, tmp_path_factory.mktemp("limited") / "log", *flags)


def image_file(width, height, file_format="PNG", **options):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, file_format, **options)
    return buffer.getvalue()


def encoded(width, height, *options):
    return {"image": pb.Image(encoded=image_file(width, height, *options))}


def raw(width, height, n_bytes=None):
    rgb = bytes(3 * width * height if n_bytes is None else n_bytes)
    return {"image": pb.Image(raw=pb.RawImage(width=width, height=height, rgb=rgb))}


def outputs(*kinds):
    return {"outputs": [pb.OutputSpec(kind=kind) for kind in kinds]}


def spec(kind=PSEUDO_MASK, **fields):
    return {"outputs": [pb.OutputSpec(kind=kind, **fields)]}


def tags(*ids):
    return {"tags": pb.Tags(class_ids=ids)}


def of_size(n_bytes):
    """A request of exactly so many bytes: an image with others behind it."""
    for n in range(n_bytes - 200, n_bytes):
        message = segment(image=pb.Image(encoded=image_file(1, 1).ljust(n, b"\0")))
        if message.ByteSize() == n_bytes:
            return message
    raise AssertionError(n_bytes)


def segment(**fields):
    return pb.SegmentRequest(**(raw(2, 2) | outputs(SEGMENTATION) | fields))


SEGMENT = [
    # pixels
    *((fields(w, h), code) for fields in (encoded, raw) for w, h, code in [(9, 7, OK), (8, 8, OK), (13, 5, TOO_LARGE)]),
    *(
        (encoded(w, h, "JPEG"), code)
        for w, h, code in [(64, 1, OK), (1, 64, OK), (65, 1, TOO_LARGE), (1, 65, TOO_LARGE)]
    ),
    *(
        (encoded(w, h, "WEBP"), code)
        for w, h, code in [(64, 1, OK), (1, 64, OK), (65, 1, TOO_LARGE), (1, 65, TOO_LARGE)]
    ),
    (raw(1, 1), OK),
    (raw(0, 1), INVALID),
    (raw(1, 0), INVALID),
    (raw(2**32 - 1, 2**32 - 1, 3), TOO_LARGE),
    *((raw(8, 8, n), code) for n, code in [(191, INVALID), (192, OK), (193, INVALID), (0, INVALID)]),
    # outputs
    (outputs(), INVALID),
    *((outputs(kind), code) for kind, code in [(0, INVALID), (1, OK), (2, OK), (3, OK), (4, INVALID), (-1, INVALID)]),
    (outputs(CAM, PSEUDO_MASK, SEGMENTATION), OK),
    (outputs(SEGMENTATION, SEGMENTATION), INVALID),
    (outputs(CAM, PSEUDO_MASK, SEGMENTATION, CAM), INVALID),
    *((spec(SEGMENTATION, mask_encoding=n), code) for n, code in [(-1, INVALID), (0, OK), (5, OK), (6, INVALID)]),
    *((spec(CAM, heatmap_encoding=n), code) for n, code in [(-1, INVALID), (0, OK), (3, OK), (4, INVALID)]),
    *((spec(CAM, heatmap_max_side=n), OK) for n in (0, 1, 2**32 - 1)),
    *((spec(refinement=n), code) for n, code in [(-1, INVALID), (0, OK), (2, OK), (5, INVALID)]),
    # classes: three of them
    *(
        (tags(id_), code)
        for id_, code in [(0, UNKNOWN_CLASS), (1, OK), (3, OK), (4, UNKNOWN_CLASS), (2**32 - 1, UNKNOWN_CLASS)]
    ),
    *((tags(*[1] * n), code) for n, code in [(0, OK), (2, OK), (3, OK), (4, INVALID)]),
    *((spec(CAM, class_ids=[id_]), code) for id_, code in [(0, UNKNOWN_CLASS), (1, OK), (3, OK), (4, UNKNOWN_CLASS)]),
    *((spec(CAM, class_ids=[1] * n), code) for n, code in [(0, OK), (3, OK), (4, INVALID)]),
    # ids: characters, not bytes
    *(
        ({"request_id": letter * (MAX_REQUEST_ID + n)}, INVALID if n > 0 else OK)
        for letter in ("x", "\U0001f408")
        for n in (-MAX_REQUEST_ID, -1, 0, 1)
    ),
    # numbers
    *((spec(SEGMENTATION, mask_encoding=4, polygon_tolerance=t), OK) for t in (0.0, -0.0, 5e-324, 0.25, 0.5)),
    *((spec(polygon_tolerance=t), INVALID) for t in (nextafter(0.5, 1), -5e-324, 1.0, -inf, inf, nan)),
    *((spec(background_threshold=t), OK) for t in (0.001, nextafter(0.001, 1), 0.5, nextafter(0.999, 0), 0.999)),
    *(
        (spec(background_threshold=t), INVALID)
        for t in (nextafter(0.001, 0), nextafter(0.999, 1), 0.0, 1.0, -inf, inf, nan)
    ),
    *((spec(background_alpha=a), OK) for a in (0.01, nextafter(0.01, 1), 16.0, nextafter(1000, 0), 1000.0)),
    *(
        (spec(background_alpha=a), INVALID)
        for a in (nextafter(0.01, 0), nextafter(1000, inf), 0.0, -1.0, -inf, inf, nan)
    ),
    (spec(background_alpha=4, background_threshold=0.5), INVALID),
]


def infer(**fields):
    tensor = oip.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=[1, 2, 2, 3])
    return oip.ModelInferRequest(
        **({"model_name": "toy", "inputs": [tensor], "raw_input_contents": [bytes(12)]} | fields)
    )


def pixels(*shape, n_bytes=None):
    size = 1
    for side in shape:
        size *= side
    tensor = oip.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=shape)
    return {"inputs": [tensor], "raw_input_contents": [bytes(size if n_bytes is None else n_bytes)]}


def files(shape, n):
    tensor = oip.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[shape])
    tensor.contents.bytes_contents.extend([image_file(2, 2)] * n)
    return {"inputs": [tensor], "raw_input_contents": []}


def named(*names):
    return {"outputs": [oip.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in names]}


def parameter(name, **value):
    return {"parameters": {name: oip.InferParameter(**value)}}


INFER = [
    *((pixels(1, h, w, 3), code) for w, h, code in [(9, 7, OK), (8, 8, OK), (13, 5, TOO_LARGE), (1, 1, OK)]),
    *((pixels(b, 2, 2, 3), code) for b, code in [(0, INVALID), (1, OK), (MAX_BATCH, OK), (MAX_BATCH + 1, INVALID)]),
    *((pixels(-1, 2, 2, 3, n_bytes=n), INVALID) for n in (0, 12)),
    *((pixels(1, 2, 2, 3, n_bytes=n), code) for n, code in [(11, INVALID), (12, OK), (13, INVALID)]),
    *((pixels(1, 2, 2, c), code) for c, code in [(2, INVALID), (3, OK), (4, INVALID)]),
    (pixels(1, 2**62, 2**62, 3, n_bytes=3), TOO_LARGE),
    *((files(n, n), code) for n, code in [(0, INVALID), (1, OK), (MAX_BATCH, OK), (MAX_BATCH + 1, INVALID)]),
    *((files(2, n), code) for n, code in [(1, INVALID), (2, OK), (3, INVALID)]),
    (named("segmentation", "pseudo_mask", "scores", "cam"), OK),
    (named("segmentation", "pseudo_mask", "scores", "cam", "cam"), INVALID),
    *(({"id": "x" * (MAX_REQUEST_ID + n)}, INVALID if n > 0 else OK) for n in (-1, 0, 1)),
    *((parameter("threshold", double_param=t), OK) for t in (0.001, 0.999)),
    *((parameter("threshold", double_param=t), INVALID) for t in (nextafter(0.001, 0), nextafter(0.999, 1), inf, nan)),
    *(
        (parameter("tags", string_param="red" + " " * (MAX_TAGS_CHARACTERS - 3 + n)), INVALID if n > 0 else OK)
        for n in (-1, 0, 1)
    ),
    (parameter("tags", string_param="red,nothing"), UNKNOWN_CLASS),
    ({"raw_input_contents": [bytes(12)] * 2}, INVALID),
]
LIST = [
    *(({"page_size": n}, INVALID if n < 0 else OK) for n in (-(2**31), -1, 0, 1, 999, 1000, 1001, 2**31 - 1)),
    *(({"page_token": "toy/".ljust(MAX_PAGE_TOKEN + n, "9")}, INVALID if n > 0 else OK) for n in (-1, 0, 1)),
    ({"page_token": "toy"}, INVALID),
]


def asked(running, outcome, stub, method, messages):
    with running.channel() as channel:
        call = getattr(stub(channel), method)
        return [outcome(lambda message=message: call(message, timeout=LONG_S)) for message in messages]


@pytest.mark.parametrize(
    ("stub", "method", "make", "table"),
    [
        (pb_grpc.SegmentationServiceStub, "Segment", segment, SEGMENT),
        (pb_grpc.SegmentationServiceStub, "ListModels", pb.ListModelsRequest, LIST),
        (oip_grpc.GRPCInferenceServiceStub, "ModelInfer", infer, INFER),
    ],
    ids=["Segment", "ListModels", "ModelInfer"],
)
def test_each_edge(limited, outcome, stub, method, make, table):
    got = asked(limited, outcome, stub, method, [make(**fields) for fields, _ in table])
    wrong = [(fields, code, is_) for (fields, code), is_ in zip(table, got, strict=True) if is_ != code]
    assert not wrong, "\n".join(f"{fields}: expected {code}, got {is_}" for fields, code, is_ in wrong)


def test_bytes_of_a_message(limited, outcome):
    sizes = {MAX_BYTES - 1: OK, MAX_BYTES: OK, MAX_BYTES + 1: OF_GRPC}
    stub = pb_grpc.SegmentationServiceStub
    assert asked(limited, outcome, stub, "Segment", map(of_size, sizes)) == [*sizes.values()]


def test_fields_of_a_message(limited, outcome):
    """Unknown ones count, too."""
    counts = {MAX_PARTS - 1: OK, MAX_PARTS: OK, MAX_PARTS + 1: INVALID}
    messages = [pb.GetModelRequest.FromString(b"\x78\1" * n) for n in counts]
    assert asked(limited, outcome, pb_grpc.SegmentationServiceStub, "GetModel", messages) == [*counts.values()]
