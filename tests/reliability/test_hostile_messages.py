"""R2: random bytes, and requests that are damaged, lying and odd in every field, at every method.

A mutant is a function of its method and its index: what a failure prints is enough to make it again.
"""

import io
import random
from collections import Counter

import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from PIL import Image

from serve.inference import grpc_inference_service_pb2 as oip
from weakseg.v1 import admin_service_pb2 as admin
from weakseg.v1 import segmentation_service_pb2 as pb

SEED = 20261122
LONG_S = 60.0
MIB = 2**20
SERVICE, INFERENCE = "/weakseg.v1.SegmentationService/", "/inference.GRPCInferenceService/"
ADMIN = "/weakseg.v1.AdminService/"
ALLOWED = {
    ("OK", ""),
    ("INVALID_ARGUMENT", "INVALID_REQUEST"),
    ("INVALID_ARGUMENT", "UNKNOWN_CLASS"),
    ("INVALID_ARGUMENT", "IMAGE_UNDECODABLE"),
    ("INVALID_ARGUMENT", "UNSUPPORTED_FORMAT"),
    ("RESOURCE_EXHAUSTED", "IMAGE_TOO_LARGE"),
    ("NOT_FOUND", "MODEL_NOT_FOUND"),
    ("FAILED_PRECONDITION", "OUTPUT_UNSUPPORTED"),
}
INTS = (0, 1, 2, 3, 4, 5, 7, 77, 127, 128, 254, 255, 256, 65535, 65536, 2**31 - 1)
DOUBLES = (0.0, -0.0, 0.5, 0.001, 0.999, 1.0, -1.0, 5e-324, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    *("", "toy", "1", "9", "stable", "image", "segmentation", "pseudo_mask", "scores", "cam", "BYTES", "UINT8", "FP16"),
    *("red", "red,blue", "[" * 2000, '["red"]', "nan", "1e999", "crf", "a/" + "9" * 5000, "toy/1", "../..", "\0"),
    *("x" * 129, "\u202e\U0001f408" * 40, "x" * 100_000),
)
UNSIGNED = {FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_FIXED32}


def png():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(SEED).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


PNG, PIXELS = png(), bytes(range(4 * 3 * 3))


def segment_request():
    specs = [
        pb.OutputSpec(kind=pb.OUTPUT_KIND_CAM, class_ids=[1, 3], heatmap_max_side=8),
        pb.OutputSpec(kind=pb.OUTPUT_KIND_PSEUDO_MASK, background_threshold=0.3, refinement=pb.REFINEMENT_NONE),
        pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION, mask_encoding=pb.MASK_ENCODING_POLYGON, polygon_tolerance=0.5),
    ]
    image = pb.Image(encoded=PNG)
    return pb.SegmentRequest(
        request_id="mine", model=pb.ModelRef(name="toy"), image=image, outputs=specs, tags=pb.Tags(class_ids=[1])
    )


def raw_request():
    image = pb.Image(raw=pb.RawImage(width=4, height=3, rgb=PIXELS))
    return pb.SegmentRequest(image=image, outputs=[pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)])


def infer_request(*, raw):
    message = oip.ModelInferRequest(model_name="toy", id="mine", outputs=[{"name": "segmentation"}, {"name": "cam"}])
    message.parameters["threshold"].double_param = 0.3
    message.parameters["tags"].string_param = "red,blue"
    if raw:
        message.inputs.add(name="image", datatype="UINT8", shape=[1, 4, 3, 3])
        message.raw_input_contents.append(PIXELS)
    else:
        message.inputs.add(name="image", datatype="BYTES", shape=[1], contents={"bytes_contents": [PNG]})
    return message


# By method: valid messages to begin with.
METHODS = {
    SERVICE + "Segment": [segment_request(), raw_request()],
    SERVICE + "SegmentStream": [pb.SegmentStreamRequest(request=segment_request())],
    SERVICE + "GetModel": [pb.GetModelRequest(model=pb.ModelRef(name="toy", version="1"))],
    SERVICE + "ListModels": [pb.ListModelsRequest(page_size=1, page_token="toy/0")],
    INFERENCE + "ModelInfer": [infer_request(raw=True), infer_request(raw=False)],
    INFERENCE + "ModelMetadata": [oip.ModelMetadataRequest(name="toy", version="1")],
    INFERENCE + "ModelReady": [oip.ModelReadyRequest(name="toy")],
}


ADMIN_METHODS = {
    ADMIN + "LoadModel": [admin.LoadModelRequest(name="toy", version="1")],
    ADMIN + "UnloadModel": [admin.UnloadModelRequest(name="toy", version="1", force=True)],
    ADMIN + "SetLogLevel": [admin.SetLogLevelRequest(level=admin.LOG_LEVEL_INFO)],
}
ADMIN_ALLOWED = {
    ("OK", ""),
    ("INVALID_ARGUMENT", "INVALID_REQUEST"),
    ("NOT_FOUND", "MODEL_NOT_FOUND"),
    ("FAILED_PRECONDITION", "MODEL_NEEDED"),
    ("RESOURCE_EXHAUSTED", ""),  # above 4096 bytes, by gRPC
}


def value(field, rng):
    """Some value of a field: what is odd, or what is at the edge."""
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return rng.choice(DOUBLES)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_STRING:
            return rng.choice(TEXTS)
        return rng.choice((b"", PNG, PIXELS, b"\x09\0\0\0" + PNG[:9], rng.randbytes(20), b"\xff\xff\xff\xff"))
    number = rng.choice(INTS)
    return number if field.type in UNSIGNED or rng.random() < 0.8 else -number


def spoil(message, rng):
    """Set, clear, repeat or recurse into a field of the message, in place."""
    field = rng.choice(message.DESCRIPTOR.fields)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = getattr(message, field.name)[rng.choice(TEXTS)]
        if rng.random() < 0.8:
            spoil(entry, rng)
    elif field.is_repeated:
        values = getattr(message, field.name)
        if rng.random() < 0.1:
            del values[:]
        elif field.message_type is None:
            values.extend([value(field, rng) for _ in range(rng.choice((1, 1, 2, 4, 300, 20_000)))])
        elif values and rng.random() < 0.6:
            spoil(rng.choice(values), rng)
        else:
            for _ in range(rng.choice((1, 1, 3, 5000))):
                values.add()
            spoil(values[-1], rng)
    elif rng.random() < 0.05:
        message.ClearField(field.name)
    elif field.message_type is not None:
        spoil(getattr(message, field.name), rng)
    else:
        setattr(message, field.name, value(field, rng))


def damage(data, rng):
    """Bytes changed without regard to what they mean."""
    data, at = bytearray(data), rng.randrange(len(data) + 1)
    choice = rng.randrange(8)
    if choice == 0:
        return bytes(data[:at])
    if choice == 1:
        return bytes(data[:at] + rng.randbytes(rng.choice((1, 3, 50))) + data[at:])
    if choice == 2:
        return bytes(data[:at] + data[at + rng.choice((1, 2, 20)) :])
    if choice == 3:  # fields that nobody knows
        return bytes(data) + b"".join(b"\xfa\x3f\x04abcd\xe0\x3e\x01" for _ in range(rng.choice((1, 1000, 60_000))))
    if choice == 4:  # groups in each other, or never ended
        return bytes(data) + b"\x7b" * rng.choice((1, 99, 101, 50_000))
    if choice == 5:  # a length that lies, a number without an end
        return bytes(data) + rng.choice(
            (b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05ab", b"\xff" * 12, b"\x08" + b"\x80" * 12)
        )
    if choice == 6:  # texts that are no UTF-8, of the same length
        return bytes(data).replace(b"toy", b"\xff\xfe\xfd").replace(b"mine", b"\xed\xa0\x80\xc0")
    for _ in range(rng.choice((1, 3, 20))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def mutant(path, index):
    """(what was done, the bytes)."""
    rng = random.Random(f"{SEED}/{path}/{index}")
    if rng.random() < 0.15:
        return "random", rng.randbytes(rng.choice((1, 2, 5, 20, 200, 5000)))
    valid = rng.choice((METHODS | ADMIN_METHODS)[path])
    message = type(valid).FromString(valid.SerializeToString())
    n_spoiled = rng.choice((0, 1, 1, 2, 3, 6))
    for _ in range(n_spoiled):
        spoil(message, rng)
    data = message.SerializeToString()
    damaged = n_spoiled == 0 or rng.random() < 0.2
    return f"{n_spoiled} fields{', damaged' if damaged else ''}", damage(data, rng) if damaged else data


def call(channel, path, data):
    if not path.endswith("Stream"):
        return channel.unary_unary(path)(data, timeout=LONG_S)
    return [*channel.stream_stream(path, response_deserializer=pb.SegmentStreamResponse.FromString)(iter([data, data]))]


@pytest.mark.parametrize("path", METHODS)
@pytest.mark.parametrize("n", [30, pytest.param(2000, marks=pytest.mark.reliability)])
def test_mutants_are_answered_or_refused_for_what_they_are(watched, outcome, outcome_in_stream, path, n):
    seen, wrong = Counter(), []
    with watched.channel() as channel:
        for valid in METHODS[path]:
            call(channel, path, valid.SerializeToString())
        before = watched.rss_bytes
        for index in range(n):
            done, data = mutant(path, index)
            answers = []
            got = [outcome(lambda data=data, answers=answers: answers.append(call(channel, path, data)))]
            if path.endswith("Stream") and got == [("OK", "")]:
                got = [outcome_in_stream(answer) for answer in answers[0]]
                assert len(got) == 2, "one answer to each"
            seen.update(got)
            if not ALLOWED.issuperset(got):
                wrong.append((index, done, got))
            assert watched.is_alive, f"mutant({path!r}, {index}) ended the server"
    grown = (watched.rss_bytes - before) / MIB
    print(f"{path}: {n} mutants: {dict(seen)}, RSS {grown:+.1f} MiB")
    assert not wrong, f"mutant({path!r}, index) of seed {SEED}: {wrong}"
    assert grown < 50
    assert seen["OK", ""], "some get through"
    assert len(seen) > 1, "and some do not"


@pytest.fixture(scope="module")
def administered(toy_bundle, tmp_path_factory, watch):
    """A server process with an admin port."""
    yield from watch(toy_bundle, tmp_path_factory.mktemp("administered") / "log", "--admin-port", "0")


@pytest.mark.parametrize("path", ADMIN_METHODS)
@pytest.mark.parametrize("n", [30, pytest.param(2000, marks=pytest.mark.reliability)])
def test_mutants_on_the_admin_port(administered, outcome, path, n):
    seen, wrong = Counter(), []
    with administered.channel(administered.admin_target) as channel:
        for valid in ADMIN_METHODS[path]:
            call(channel, path, valid.SerializeToString())
        before = administered.rss_bytes
        for index in range(n):
            done, data = mutant(path, index)
            got = outcome(lambda data=data: call(channel, path, data))
            seen[got] += 1
            if got not in ADMIN_ALLOWED:
                wrong.append((index, done, got))
            assert administered.is_alive, f"mutant({path!r}, {index}) ended the server"
        call(channel, ADMIN + "LoadModel", ADMIN_METHODS[ADMIN + "LoadModel"][0].SerializeToString())
    grown = (administered.rss_bytes - before) / MIB
    print(f"{path}: {n} mutants: {dict(seen)}, RSS {grown:+.1f} MiB")
    assert not wrong, f"mutant({path!r}, index) of seed {SEED}: {wrong}"
    assert grown < 50
    assert len(seen) > 1


def test_a_stream_answers_what_came_before_a_message_that_is_none(watched, outcome):
    good = pb.SegmentStreamRequest(request=segment_request()).SerializeToString()
    answers = []

    def read():
        with watched.channel() as channel:
            method = channel.stream_stream(
                SERVICE + "SegmentStream", response_deserializer=pb.SegmentStreamResponse.FromString
            )
            answers.extend(method(iter([good, good, b"\xff", good]), timeout=LONG_S))

    assert outcome(read) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert [answer.WhichOneof("result") for answer in answers] == ["response", "response"]
