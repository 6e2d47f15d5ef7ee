"""Every row of the error table as a client meets it: status code, reason, details, and the error that ours raises."""

import gc
import io
import json
import logging
import shutil
import struct
import sys
import threading
import tracemalloc
import weakref
import zlib
from dataclasses import replace

import grpc
import numpy as np
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from PIL import Image

import weakseg
from serve.interceptors import TABLE, code_from_error, status_from_error
from serve.repository import BundleFolder
from weakseg import errors
from weakseg.model import Model
from weakseg.preprocess import InputPolicy
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc
from weakseg.wire_errors import error_from_rpc, error_from_status

LONG_S = 60.0
SEGMENTATION = pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)


def request(data=b"", *specs, **fields):
    return pb.SegmentRequest(**({"image": pb.Image(encoded=data), "outputs": specs or [SEGMENTATION]} | fields))


def ask(running, message, method="Segment"):
    """The error of a call: (code, {detail type: detail}, message, what our client raises)."""
    with grpc.insecure_channel(running.target) as channel:
        with pytest.raises(grpc.RpcError) as raised:
            getattr(pb_grpc.SegmentationServiceStub(channel), method)(message, timeout=LONG_S)
        status = rpc_status.from_call(raised.value)
        return raised.value.code(), details_of(status), raised.value.details(), error_from_rpc(raised.value, "target")


def details_of(status):
    found = {}
    for packed in status.details if status is not None else []:
        for kind in ("ErrorInfo", "BadRequest", "RetryInfo", "ResourceInfo"):
            detail = getattr(error_details_pb2, kind)()
            if packed.Unpack(detail):
                found[kind] = detail
    return found


def changed(model, **fields):
    """The model with other fields in its manifest."""
    return Model(replace(model.bundle, manifest=replace(model.manifest, **fields)), model.runner)


def check(answer, code, kind, reason=None, field=None):
    """Assert what every answer has in common; returns the details."""
    got_code, details, message, error = answer
    reason = reason or kind.reason
    assert (got_code.name, details["ErrorInfo"].reason, details["ErrorInfo"].domain) == (code, reason, "weakseg")
    assert type(error) is kind and error.reason == reason and str(error) == message
    if field is not None:
        assert [v.field for v in details["BadRequest"].field_violations] == [field]
    else:
        assert "BadRequest" not in details
    return details


# INVALID_ARGUMENT -----------------------------------------------------------------------------------------------------

PIXEL = pb.Image(raw=pb.RawImage(width=1, height=1, rgb=b"abc"))
INVALID = {
    "request_id": {"request_id": "x" * 129},
    "outputs": {"outputs": []},
    "outputs[0].kind": {"outputs": [pb.OutputSpec()]},
    "outputs[1].kind": {"outputs": [SEGMENTATION, SEGMENTATION]},
    "outputs[0].mask_encoding": {"outputs": [pb.OutputSpec(kind=3, mask_encoding=77)]},
    "outputs[0].heatmap_encoding": {"outputs": [pb.OutputSpec(kind=1, heatmap_encoding=77)]},
    "outputs[0].refinement": {"outputs": [pb.OutputSpec(kind=2, refinement=77)]},
    "outputs[0].background_threshold": {"outputs": [pb.OutputSpec(kind=2, background_threshold=1.0)]},
    "outputs[0].background_alpha": {"outputs": [pb.OutputSpec(kind=2, background_alpha=float("nan"))]},
    "outputs[0].polygon_tolerance": {"outputs": [pb.OutputSpec(kind=3, polygon_tolerance=0.6)]},
    "priority": {"priority": 77},
    "image": {"image": pb.Image()},
    "image.raw": {"image": pb.Image(raw=pb.RawImage(width=0, height=1))},
    "image.raw.rgb": {"image": pb.Image(raw=pb.RawImage(width=2, height=1, rgb=b"abc"))},
}


@pytest.mark.parametrize("field", INVALID)
def test_invalid_request(shared_serving, field):
    message = request(**({"image": PIXEL} | INVALID[field]))
    check(ask(shared_serving, message), "INVALID_ARGUMENT", errors.InvalidRequestError, field=field)


def test_threshold_and_alpha_exclude_each_other(shared_serving):
    spec = pb.OutputSpec(kind=2, background_threshold=0.5, background_alpha=2)
    answer = ask(shared_serving, request(b"", spec))
    check(answer, "INVALID_ARGUMENT", errors.InvalidRequestError, field="outputs[0].background_alpha")


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"tags": pb.Tags(class_ids=[1, 4])}, "tags.class_ids[1]"),
        ({"outputs": [pb.OutputSpec(kind=1, class_ids=[0])]}, "outputs[0].class_ids[0]"),
    ],
)
def test_unknown_class(shared_serving, fields, path):
    answer = ask(shared_serving, request(**({"image": PIXEL} | fields)))
    check(answer, "INVALID_ARGUMENT", errors.UnknownClassError, field=path)


def test_more_class_ids_than_classes(shared_serving):
    answer = ask(shared_serving, request(image=PIXEL, tags=pb.Tags(class_ids=[1] * 4)))
    check(answer, "INVALID_ARGUMENT", errors.InvalidRequestError, field="tags.class_ids")


@pytest.mark.parametrize("size", [-1])
def test_bad_page(shared_serving, size):
    answer = ask(shared_serving, pb.ListModelsRequest(page_size=size), "ListModels")
    check(answer, "INVALID_ARGUMENT", errors.InvalidRequestError, field="page_size")
    answer = ask(shared_serving, pb.ListModelsRequest(page_token="nonsense"), "ListModels")
    check(answer, "INVALID_ARGUMENT", errors.InvalidRequestError, field="page_token")


# Images ---------------------------------------------------------------------------------------------------------------


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with_header(width, height, data=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    return buffer.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
UNDECODABLE = {
    "truncated JPEG": jpeg(NOISE)[:-1000],
    "JPEG cut in its header": jpeg(NOISE)[:20],
    "PNG whose header promises more than it has": png_with_header(64, 64, b"too little"),
    "PNG of size zero": png_with_header(0, 5),
    "PNG signature alone": b"\x89PNG\r\n\x1a\n",
    "WebP of nothing": b"RIFF\0\0\0\0WEBPVP8 ",
}


@pytest.mark.parametrize("name", UNDECODABLE)
def test_image_undecodable(shared_serving, name):
    answer = ask(shared_serving, request(UNDECODABLE[name]))
    check(answer, "INVALID_ARGUMENT", errors.ImageError, "IMAGE_UNDECODABLE", field="image")


@pytest.mark.parametrize("data", [b"", b"hello", b"GIF89a" + b"\0" * 40, b"II*\0" + b"\0" * 40])
def test_unsupported_format(shared_serving, data):
    answer = ask(shared_serving, request(data))
    check(answer, "INVALID_ARGUMENT", errors.ImageError, "UNSUPPORTED_FORMAT", field="image")


@pytest.mark.parametrize(
    "data",
    [png_with_header(40000, 40000), jpeg(NOISE).replace(struct.pack(">HH", 64, 64), struct.pack(">HH", 65500, 65500))],
)
def test_a_huge_header_is_refused_before_anything_is_decoded(shared_serving, data):
    ask(shared_serving, request(data))
    tracemalloc.start()
    answer = ask(shared_serving, request(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    details = check(answer, "RESOURCE_EXHAUSTED", errors.ImageError, "IMAGE_TOO_LARGE")
    assert "RetryInfo" not in details
    assert peak < 4 * 2**20, "no canvas was allocated"


def test_a_raw_image_above_the_limit(serving):
    running = serving(max_pixels=8)
    raw = pb.Image(raw=pb.RawImage(width=3, height=3, rgb=bytes(27)))
    check(ask(running, request(image=raw)), "RESOURCE_EXHAUSTED", errors.ImageError, "IMAGE_TOO_LARGE")


def test_an_image_that_the_model_refuses_is_not_decoded(serving, toy_bundle, png, colours):
    def load(path):
        model = changed(weakseg.load(path, threads=1), input=InputPolicy(50, "refuse"))
        model.decode = None
        return model

    running = serving(load=load)
    check(ask(running, request(png(colours))), "RESOURCE_EXHAUSTED", errors.ImageError, "IMAGE_TOO_LARGE")


@pytest.mark.parametrize("method", ["Segment", "SegmentStream"])
def test_a_refused_image_is_forgotten_without_the_garbage_collector(serving, method):
    class Canvas:
        pass

    canvases = []

    def decode(source, **limits):
        canvas = Canvas()
        canvases.append(weakref.ref(canvas))
        try:
            raise OSError("the canvas is in this frame")
        except OSError as error:
            raise errors.ImageError("damaged") from error

    def load(path):
        model = weakseg.load(path, threads=1)
        model.decode = decode
        return model

    running = serving(load=load)
    gc.disable()
    try:
        if method == "Segment":
            check(ask(running, request(image=PIXEL)), "INVALID_ARGUMENT", errors.ImageError, field="image")
        else:
            with grpc.insecure_channel(running.target) as channel:
                stream = pb_grpc.SegmentationServiceStub(channel).SegmentStream(
                    iter([pb.SegmentStreamRequest(request=request(image=PIXEL))]), timeout=LONG_S
                )
                assert [type(error_from_status(answer.error)) for answer in stream] == [errors.ImageError]
        running.until(lambda: [canvas() for canvas in canvases] == [None])
    finally:
        gc.enable()


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "version"), [("dog", ""), ("toy", "9"), ("dog", "1")])
@pytest.mark.parametrize("method", ["Segment", "GetModel"])
def test_model_not_found(shared_serving, name, version, method):
    ref = pb.ModelRef(name=name, version=version)
    message = request(image=PIXEL, model=ref) if method == "Segment" else pb.GetModelRequest(model=ref)
    details = check(ask(shared_serving, message, method), "NOT_FOUND", errors.ModelNotFoundError)
    assert details["ResourceInfo"].resource_type == "weakseg.v1.Model"
    assert details["ResourceInfo"].resource_name == "/".join(filter(None, (name, version)))


@pytest.mark.parametrize("letter", ["x", "\u732b"])
def test_a_long_name_is_cut_short_in_the_answer(shared_serving, letter):
    """gRPC replaces a status above its limit for trailers by another of its own."""
    ref = pb.ModelRef(name=letter * 100_000, version=letter * 100_000)
    code, details, message, error = ask(shared_serving, pb.GetModelRequest(model=ref), "GetModel")
    assert (code.name, details["ErrorInfo"].reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    assert type(error) is errors.ModelNotFoundError
    assert message.startswith(f"no model '{letter * 100}") and message.endswith("…")


def test_without_a_name_two_models_are_one_too_many(serving, toy_bundle):
    running = serving(folders=[BundleFolder("a", "1", toy_bundle), BundleFolder("b", "1", toy_bundle)])
    answer = ask(running, request(image=PIXEL))
    check(answer, "NOT_FOUND", errors.ModelNotFoundError)
    assert "one of a, b" in answer[2]


def test_model_loading(serving, toy_bundle):
    may_load = threading.Event()

    def load(path):
        assert may_load.wait(LONG_S)
        return weakseg.load(path, threads=1)

    running = serving(load=load, wait_loaded=False)
    details = check(ask(running, request(image=PIXEL)), "UNAVAILABLE", errors.ModelLoadingError)
    assert details["RetryInfo"].retry_delay == duration_pb2.Duration(seconds=1)
    may_load.set()


def test_model_failed(serving, tmp_path):
    folder = tmp_path / "toy" / "1"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    running = serving(folders=[BundleFolder("toy", "1", folder)])
    details = check(ask(running, request(image=PIXEL)), "FAILED_PRECONDITION", errors.ModelFailedError)
    assert details["ResourceInfo"].resource_type == "weakseg.v1.Model"
    with grpc.insecure_channel(running.target) as channel:
        found = pb_grpc.SegmentationServiceStub(channel).GetModel(pb.GetModelRequest()).model
    assert found.state == pb.MODEL_STATE_FAILED
    assert "schema_version" in found.failure


def damaged(folder):
    graph = folder / "segmentation.onnx"
    data = bytearray(graph.read_bytes())
    data[50] ^= 1
    graph.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damaged, "segmentation.onnx is damaged: expected sha256"),
        (lambda folder: (folder / "segmentation.onnx").unlink(), "cannot read segmentation.onnx"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: expected JSON"),
        (lambda folder: (folder / "manifest.json").unlink(), "expected manifest.json in toy/1, got none"),
    ],
    ids=["a bit", "a file", "a text", "no manifest"],
)
def test_why_a_model_failed_is_told_without_where_it_lies(serving, toy_bundle, tmp_path, caplog, damage, said):
    folder = tmp_path / "here" / "1"
    shutil.copytree(toy_bundle, folder)
    damage(folder)
    running = serving(folders=[BundleFolder("toy", "1", folder)])
    with grpc.insecure_channel(running.target) as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        found = stub.GetModel(pb.GetModelRequest()).model
        with pytest.raises(grpc.RpcError) as raised:
            stub.Segment(request(image=PIXEL))
    assert said in found.failure and said in raised.value.details()
    assert "here" not in found.failure + raised.value.details() + str(raised.value.trailing_metadata())
    assert any(str(folder) in record.fields["failure"] for record in caplog.records if record.msg == "model failed")


@pytest.mark.parametrize(
    "spec",
    [
        pb.OutputSpec(kind=2, refinement=pb.REFINEMENT_RANDOM_WALK),
        pb.OutputSpec(kind=2, refinement=pb.REFINEMENT_RANDOM_WALK_CRF),
    ],
    ids=["random walk", "random walk + CRF"],
)
def test_output_unsupported(shared_serving, spec):
    answer = ask(shared_serving, request(image=PIXEL, outputs=[spec]))
    check(answer, "FAILED_PRECONDITION", errors.OutputUnsupportedError)


def test_an_output_that_the_model_does_not_have(serving):
    def load(path):
        return changed(weakseg.load(path, threads=1), outputs=("segmentation",))

    answer = ask(serving(load=load), request(image=PIXEL, outputs=[pb.OutputSpec(kind=1)]))
    check(answer, "FAILED_PRECONDITION", errors.OutputUnsupportedError)


def test_what_the_server_lacks_for_an_output(serving, monkeypatch, png, colours):
    monkeypatch.setitem(sys.modules, "numba", None)
    spec = pb.OutputSpec(kind=2, refinement=pb.REFINEMENT_CRF)
    answer = ask(serving(), request(png(colours), spec))
    check(answer, "FAILED_PRECONDITION", errors.OutputUnsupportedError)
    assert "cannot be refined by crf here" in answer[2] and "pip install 'weakseg[refine]'" in answer[2]


# Load and limits ------------------------------------------------------------------------------------------------------


def test_queue_full(serving):
    running = serving(queue_limit=1, max_batch=1)
    running.runner.gate.clear()
    with grpc.insecure_channel(running.target) as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        calls = [stub.Segment.future(request(image=PIXEL)) for _ in range(2)]
        running.until(lambda: running.server.admission.inflight == 2)
        details = check(ask(running, request(image=PIXEL)), "RESOURCE_EXHAUSTED", errors.QueueFullError)
        assert details["RetryInfo"].retry_delay == duration_pb2.Duration(nanos=250_000_000)
        running.runner.gate.set()
        assert all(call.result(LONG_S).outputs for call in calls)
    assert running.sample("weakseg_rejected_total", reason="QUEUE_FULL") == 1


@pytest.mark.parametrize(
    "error", [MemoryError("secret"), RuntimeError("Failed to allocate memory for requested buffer of size 1 secret")]
)
def test_out_of_memory(serving, error):
    running = serving()
    running.runner.error = error
    answer = ask(running, request(image=PIXEL))
    details = check(answer, "RESOURCE_EXHAUSTED", errors.OutOfMemoryError)
    assert details["RetryInfo"].retry_delay == duration_pb2.Duration(seconds=1)
    assert "secret" not in answer[2]


def test_draining(serving):
    running = serving()
    running.server.admission.draining = True
    details = check(ask(running, request(image=PIXEL)), "UNAVAILABLE", errors.DrainingError)
    assert details["RetryInfo"].retry_delay == duration_pb2.Duration(nanos=500_000_000)


def test_response_too_large(serving, png, colours):
    running = serving(max_message_bytes=2000)
    spec = pb.OutputSpec(kind=3, mask_encoding=pb.MASK_ENCODING_RAW_U8)
    check(ask(running, request(png(colours), spec)), "RESOURCE_EXHAUSTED", errors.ResponseTooLargeError)


def test_a_request_above_the_limit_is_answered_by_grpc(serving):
    running = serving(max_message_bytes=2000)
    code, details, message, error = ask(running, request(bytes(2001)))
    assert (code.name, details) == ("RESOURCE_EXHAUSTED", {})
    assert "larger than max" in message
    assert isinstance(error, errors.ImageError) and error.reason == "IMAGE_TOO_LARGE"


def test_deadline_too_short():
    # Over the wire the client's own clock answers first; the row is for front ends and queues behind it.
    status = status_from_error(errors.DeadlineTooShortError("the deadline passed after 3 ms in the queue"))
    assert (status.code, details_of(status)["ErrorInfo"].reason) == (4, "DEADLINE_TOO_SHORT")
    assert type(error_from_status(status)) is errors.DeadlineTooShortError


# INTERNAL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ValueError("secret /etc/passwd"),
        errors.ModelFailedError("secret: graph segmentation failed"),
        errors.DataError("secret"),
        errors.ConfigError("secret"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_internal_says_nothing_but_an_id_that_the_log_explains(serving, caplog, error):
    running = serving()
    running.runner.error = error
    with caplog.at_level(logging.ERROR, "serve"):
        code, details, message, raised = ask(running, request(image=PIXEL))
    error_id = details["ErrorInfo"].metadata["error_id"]
    assert (code.name, details["ErrorInfo"].reason) == ("INTERNAL", "INTERNAL")
    assert message == f"internal error {error_id}: the server's log says more"
    assert type(raised) is errors.ServiceError and raised.reason == "INTERNAL"
    (record,) = [record for record in caplog.records if record.name == "serve.errors"]
    assert record.fields == {"error_id": error_id}
    assert record.exc_info[1] is error or record.exc_info[1].__cause__ is error
    # The next request is answered.
    running.runner.error = None
    with grpc.insecure_channel(running.target) as channel:
        assert pb_grpc.SegmentationServiceStub(channel).Segment(request(image=PIXEL)).outputs


def test_values_that_are_not_finite_are_internal(serving):
    running = serving()
    running.runner.inner.run = lambda graph, images, outputs: {"logits": np.full((1, 4, 1, 1), np.nan, np.float32)}
    code, _, message, _ = ask(running, request(image=PIXEL))
    assert code is grpc.StatusCode.INTERNAL and message.startswith("internal error")


# The table as a whole -------------------------------------------------------------------------------------------------


def test_every_service_error_has_a_row():
    kinds = errors.ServiceError.__subclasses__()
    assert set(kinds) <= set(TABLE)


def test_every_row_comes_back_as_its_class():
    for kind, row in TABLE.items():
        status = status_from_error(kind("expected this, got that: do so"), "toy/1")
        back = error_from_status(status)
        assert type(back) is kind and str(back) == "expected this, got that: do so"
        assert status.code == row.code.value[0]
        assert code_from_error(kind("")) is row.code


def test_a_subclass_is_told_as_its_parent():
    class OneOfAKind(errors.QueueFullError):
        pass

    assert code_from_error(OneOfAKind("")) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_no_image_bytes_in_the_logs(shared_serving, caplog, png, colours):
    secret = b"SECRET-PIXELS"
    with caplog.at_level(logging.DEBUG, "serve"):
        ask(shared_serving, request(secret, request_id="mine"))
        ask(shared_serving, request(png(colours)[:-30] + secret, request_id="mine"))
    requests = [record for record in caplog.records if record.name == "serve.requests"]
    assert [record.fields["reason"] for record in requests] == ["UNSUPPORTED_FORMAT", "IMAGE_UNDECODABLE"]
    assert all(record.fields["request_id"] == "mine" for record in requests)
    assert "SECRET" not in json.dumps([vars(record) for record in caplog.records], default=str)
