"""The Open Inference Protocol over the wire: a real server, real graphs, the generated stub."""

import contextlib
import json
import logging
import struct
from dataclasses import replace

import grpc
import numpy as np
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

import weakseg
from serve.inference import grpc_inference_service_pb2 as oip
from serve.inference import grpc_inference_service_pb2_grpc as oip_grpc
from serve.job import Answer
from serve.oip import response_from_answers
from serve.oip_requests import Options
from serve.oip_tensors import add_output, images_from_request
from serve.repository import BundleFolder
from weakseg.classes import ClassTable, voc_palette
from weakseg.errors import ImageError, InvalidRequestError
from weakseg.model import Model
from weakseg.result import Result
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
DTYPES = {"UINT8": "u1", "UINT16": "<u2", "FP32": "<f4", "FP16": "<f2"}
MASKS = ("segmentation", "pseudo_mask")
TENSOR = oip.ModelInferRequest.InferInputTensor


@contextlib.contextmanager
def stub_of(running):
    with grpc.insecure_channel(running.target) as channel:
        yield oip_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def stub(shared_serving):
    with stub_of(shared_serving) as stub:
        yield stub


def parameter(value):
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    return oip.InferParameter(**{kinds[type(value)]: value})


def request(tensor, *outputs, raw=(), parameters=None, **fields):
    return oip.ModelInferRequest(
        inputs=[tensor],
        raw_input_contents=raw,
        outputs=[oip.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
        parameters={name: parameter(value) for name, value in (parameters or {}).items()},
        **fields,
    )


def files(datas, *outputs, raw=True, shape=None, **fields):
    """A request of encoded images."""
    tensor = TENSOR(name="image", datatype="BYTES", shape=shape or [len(datas)])
    if raw:
        return request(tensor, *outputs, raw=[b"".join(struct.pack("<I", len(d)) + d for d in datas)], **fields)
    tensor.contents.bytes_contents.extend(datas)
    return request(tensor, *outputs, **fields)


def pixels(images, *outputs, raw=True, **fields):
    """A request of pixels (B, H, W, 3)."""
    tensor = TENSOR(name="image", datatype="UINT8", shape=images.shape)
    if raw:
        return request(tensor, *outputs, raw=[images.tobytes()], **fields)
    tensor.contents.uint_contents.extend(images.ravel().tolist())
    return request(tensor, *outputs, **fields)


def arrays(response):
    """{output: array}, from either form."""
    found = {}
    for i, tensor in enumerate(response.outputs):
        dtype = np.dtype(DTYPES[tensor.datatype])
        if response.raw_output_contents:
            assert not tensor.HasField("contents")
            values = np.frombuffer(response.raw_output_contents[i], dtype)
        else:
            field = "fp32_contents" if tensor.datatype == "FP32" else "uint_contents"
            values = np.array(getattr(tensor.contents, field), dtype)
        found[tensor.name] = values.reshape(tensor.shape)
    return found


def error_of(running, message, method="ModelInfer"):
    """(code name, reason, fields of the BadRequest, message, RetryInfo or None) of a call that fails."""
    with stub_of(running) as stub, pytest.raises(grpc.RpcError) as raised:
        getattr(stub, method)(message, timeout=LONG_S)
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    has_retry = False
    for packed in rpc_status.from_call(raised.value).details:
        has_retry |= packed.Unpack(retry)
        _ = packed.Unpack(info) or packed.Unpack(bad)
    assert info.domain == "weakseg"
    fields = [violation.field for violation in bad.field_violations]
    return raised.value.code().name, info.reason, fields, raised.value.details(), retry if has_retry else None


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("make", [files, pixels], ids=["BYTES", "UINT8"])
def test_masks_are_the_offline_masks(stub, model, colours, png, make, raw):
    batch = [png(colours)] if make is files else colours[None]
    response = stub.ModelInfer(make(batch, *MASKS, raw=raw))
    expected = model.segment(colours, outputs=MASKS)
    got = arrays(response)
    assert list(got) == list(MASKS)
    assert bool(response.raw_output_contents) == raw, "the answer has the form of the request"
    for name in MASKS:
        np.testing.assert_array_equal(got[name], getattr(expected, name)[None])
        assert got[name].dtype == np.uint8 and len(np.unique(got[name])) >= 4
    threshold = response.outputs[1].parameters
    assert (threshold["threshold"].double_param, threshold["threshold_rule"].string_param) == (0.4, "fixed")
    assert threshold["ignore_value"].int64_param == 255 and not response.outputs[0].parameters


def test_scores_and_cams_of_all_classes(stub, model, colours, png):
    got = arrays(stub.ModelInfer(files([png(colours)], "cam", "scores")))
    expected = model.segment(colours, outputs=("cam",))
    np.testing.assert_array_equal(got["scores"][0], np.array([*expected.scores.values()], np.float32))
    np.testing.assert_array_equal(got["cam"][0], np.stack([*expected.heatmaps.values()]))
    assert got["cam"].dtype == np.float32


def test_scores_alone_name_their_classes(stub, model, colours, png):
    response = stub.ModelInfer(files([png(colours)], "scores"))
    assert json.loads(response.outputs[0].parameters["classes"].string_param) == ["red", "green", "blue"]
    got = arrays(response)
    expected = model.segment(colours, outputs=("cam",)).scores
    assert list(got) == ["scores"] and got["scores"].tolist() == [[*expected.values()]]


def test_classes_that_are_not_present_have_no_cam(stub, model, colours, png):
    message = files([png(colours)], "cam", parameters={"tags": "blue"})
    got = arrays(stub.ModelInfer(message))["cam"][0]
    expected = model.segment(colours, outputs=("cam",), tags=["blue"]).heatmaps["blue"]
    np.testing.assert_array_equal(got, [np.zeros_like(expected), np.zeros_like(expected), expected])


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
def test_float16_is_raw_whatever_the_request_was(stub, colours, raw):
    cam = arrays(stub.ModelInfer(pixels(colours[None], "cam")))["cam"]
    halves = stub.ModelInfer(pixels(colours[None], "cam", "scores", raw=raw, parameters={"cam_datatype": "FP16"}))
    assert [tensor.datatype for tensor in halves.outputs] == ["FP16", "FP32"]
    np.testing.assert_array_equal(arrays(halves)["cam"], cam.astype(np.float16))


def test_without_outputs_comes_all_that_the_model_has_in_the_order_of_its_metadata(stub, colours):
    names = [tensor.name for tensor in stub.ModelMetadata(oip.ModelMetadataRequest()).outputs]
    assert [tensor.name for tensor in stub.ModelInfer(pixels(colours[None])).outputs] == names


@pytest.mark.parametrize("make", [files, pixels], ids=["BYTES", "UINT8"])
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
def test_a_batch_is_its_images(stub, model, colours, png, make, raw):
    images = np.stack([np.roll(colours, 4 * i, axis=1) for i in range(5)])
    batch = [png(image) for image in images] if make is files else images
    got = arrays(stub.ModelInfer(make(batch, *MASKS, "cam", raw=raw)))
    for i, image in enumerate(images):
        expected = model.segment(image, outputs=(*MASKS, "cam"))
        for name in MASKS:
            np.testing.assert_array_equal(got[name][i], getattr(expected, name))
        np.testing.assert_allclose(got["cam"][i], np.stack([*expected.heatmaps.values()]), atol=1e-5)


def test_a_batch_goes_through_the_network_together(serving, colours, png):
    running = serving(max_batch=4, max_delay_ms=1e5)
    with stub_of(running) as stub:
        response = stub.ModelInfer(files([png(colours)] * 4, "segmentation"))
    assert running.runner.batches == [("segmentation", 4)]
    assert response.parameters["batch_size"].int64_param == 4


def test_images_of_a_batch_and_of_others_share_executions(serving, colours, png):
    running = serving(max_batch=4, max_delay_ms=1e5)
    with grpc.insecure_channel(running.target) as channel:
        batch = oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(files([png(colours)] * 3, "segmentation"))
        running.until(lambda: running.sample("weakseg_queue_depth") == 3)
        spec = pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)
        asked = pb.SegmentRequest(image=pb.Image(encoded=png(colours)), outputs=[spec])
        assert pb_grpc.SegmentationServiceStub(channel).Segment(asked).timing.batch_size == 4
        batch.result(LONG_S)
    assert running.runner.batches == [("segmentation", 4)]


def test_images_of_different_sizes_have_scores(stub, model, colours, png):
    images = [colours, colours[:-4], colours]
    got = arrays(stub.ModelInfer(files([png(image) for image in images], "scores")))["scores"]
    for scores, image in zip(got, images, strict=True):
        expected = model.segment(image, outputs=("cam",)).scores
        np.testing.assert_allclose(scores, [*expected.values()], atol=1e-5)


def test_triton_s_shape_of_files_is_taken_too(stub, colours, png):
    data = png(colours)
    plain, column = (stub.ModelInfer(files([data], "segmentation", shape=shape)) for shape in ([1], [1, 1]))
    assert column.raw_output_contents == plain.raw_output_contents


@pytest.mark.parametrize("threshold", [0.2, "0.2"])
def test_parameters(stub, model, colours, png, threshold):
    options = {"threshold": threshold, "refinement": "none", "tags": '["red", "green"]'}
    response = stub.ModelInfer(files([png(colours)], "pseudo_mask", parameters=options))
    expected = model.segment(
        colours, outputs=("pseudo_mask",), threshold=0.2, refine="none", tags=["red", "green"]
    ).pseudo_mask
    np.testing.assert_array_equal(arrays(response)["pseudo_mask"][0], expected)
    assert response.outputs[0].parameters["threshold_rule"].string_param == "request"


def test_what_a_response_says_about_itself(stub, model, colours, png):
    response = stub.ModelInfer(files([png(colours)], "scores", id="mine", model_name="toy", model_version="1"))
    assert (response.id, response.model_name, response.model_version) == ("mine", "toy", "1")
    parameters = response.parameters
    assert parameters["model_sha256"].string_param == model.bundle.sha256
    assert parameters["batch_size"].int64_param == 1
    assert (parameters["max_batch_size"].int64_param, parameters["max_batch_delay_ms"].double_param) == (8, 0.0)
    for stage in ("queue", "decode", "infer", "postprocess", "encode"):
        assert 0 <= parameters[f"{stage}_ms"].double_param < LONG_S * 1000
    assert parameters["infer_ms"].double_param > 0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_both_forms_hold_the_same_elements(dtype):
    """More elements than one step converts; uint16 is what models above 254 classes have."""
    array = np.random.default_rng(0).integers(0, 65536, (2, 300, 200)).astype(dtype)
    for raw in (True, False):
        response = oip.ModelInferResponse()
        add_output(response, "x", array, raw=raw)
        np.testing.assert_array_equal(arrays(response)["x"], array)


def test_above_254_classes_masks_are_16_bit():
    classes = ClassTable(tuple(f"c{i}" for i in range(300)))
    labels = np.random.default_rng(0).integers(0, 301, (4, 5)).astype(np.uint16)
    result = Result(classes, voc_palette(), 4, 5, segmentation=labels, model="many/1")
    answers = [Answer(result, dict.fromkeys(("queue", "decode", "infer", "postprocess"), 0.0), 1, 8, 0.002)]
    for raw in (True, False):
        options = Options(("segmentation",), raw)
        response, _ = response_from_answers(answers, id_="", options=options, limit_bytes=10_000)
        assert response.outputs[0].datatype == "UINT16"
        np.testing.assert_array_equal(arrays(response)["segmentation"], labels[None])


# Server and models ----------------------------------------------------------------------------------------------------


def test_metadata(stub, model):
    server = stub.ServerMetadata(oip.ServerMetadataRequest())
    assert (server.name, server.version, list(server.extensions)) == ("weakseg", weakseg.__version__, [])
    found = stub.ModelMetadata(oip.ModelMetadataRequest(name="toy"))
    assert (found.name, list(found.versions), found.platform) == ("toy", ["1"], "weakseg_bundle")
    assert [(t.name, t.datatype, list(t.shape)) for t in found.inputs] == [("image", "BYTES", [-1])]
    assert [(t.name, t.datatype, list(t.shape)) for t in found.outputs] == [
        ("segmentation", "UINT8", [-1, -1, -1]),
        ("pseudo_mask", "UINT8", [-1, -1, -1]),
        ("scores", "FP32", [-1, 3]),
        ("cam", "FP32", [-1, 3, -1, -1]),
    ]
    assert json.loads(found.properties["classes"]) == ["red", "green", "blue"]
    assert (found.properties["max_batch_size"], found.properties["sha256"]) == ("8", model.bundle.sha256)


def ready(running, name="", version=""):
    with stub_of(running) as stub:
        return (
            stub.ServerLive(oip.ServerLiveRequest()).live,
            stub.ServerReady(oip.ServerReadyRequest()).ready,
            stub.ModelReady(oip.ModelReadyRequest(name=name, version=version)).ready,
        )


def test_readiness(serving, toy_bundle, tmp_path):
    running = serving(folders=[BundleFolder("good", "1", toy_bundle)])
    assert ready(running) == ready(running, "good", "1") == (True, True, True)
    assert ready(running, "good", "2") == ready(running, "dog") == (True, True, False)
    running.call(running.server.health.drain())
    assert ready(running, "good") == (True, False, False)
    half = serving(folders=[BundleFolder("good", "1", toy_bundle), BundleFolder("bad", "1", tmp_path)])
    assert ready(half, "good") == (True, False, True)
    assert ready(half, "bad") == (True, False, False)


def test_the_newest_ready_version_answers(serving, toy_bundle, colours):
    folders = [BundleFolder("toy", version, toy_bundle) for version in ("2", "10")]
    running = serving(folders=folders)
    with stub_of(running) as stub:
        assert list(stub.ModelMetadata(oip.ModelMetadataRequest(name="toy")).versions) == ["2", "10"]
        stub.ModelInfer(pixels(colours[None], "scores", model_name="toy"))
    assert running.sample("weakseg_requests_total", model="toy", version="10", code="OK") == 1


# Errors ---------------------------------------------------------------------------------------------------------------

PIXEL = np.zeros((1, 1, 1, 3), np.uint8)
WHOLE = TENSOR(name="image", datatype="UINT8", shape=[1, 1, 1, 3])


def changed(**fields):
    """One pixel, with other fields in its tensor."""
    tensor = TENSOR()
    tensor.CopyFrom(WHOLE)
    for name, value in fields.items():
        tensor.ClearField(name)
        tensor.MergeFrom(TENSOR(**{name: value}))
    return request(tensor, raw=[b"abc"])


def typed(datatype, shape, **contents):
    tensor = TENSOR(name="image", datatype=datatype, shape=shape, contents=oip.InferTensorContents(**contents))
    return request(tensor)


def with_output_parameter():
    message = pixels(PIXEL, "cam")
    message.outputs[0].parameters["classification"].int64_param = 3
    return message


def shared_memory():
    return changed(parameters={"shared_memory_region": parameter("mine")})


INVALID = {
    "id too long": (pixels(PIXEL, id="x" * 129), "id"),
    "no input": (oip.ModelInferRequest(), "inputs"),
    "two inputs": (oip.ModelInferRequest(inputs=[WHOLE, WHOLE]), "inputs"),
    "unknown input": (changed(name="INPUT0"), "inputs[0].name"),
    "shared memory": (shared_memory(), "inputs[0].parameters"),
    "wrong datatype": (changed(datatype="FP32"), "inputs[0].datatype"),
    "no datatype": (changed(datatype=""), "inputs[0].datatype"),
    "pixels without a batch": (changed(shape=[1, 1, 3]), "inputs[0].shape"),
    "planes": (changed(shape=[1, 3, 1, 1]), "inputs[0].shape"),
    "no pixels": (changed(shape=[1, 0, 1, 3]), "inputs[0].shape"),
    "negative": (changed(shape=[-1, -1, 1, 3]), "inputs[0].shape"),
    "no shape": (changed(shape=[]), "inputs[0].shape"),
    "files in a square": (changed(datatype="BYTES", shape=[2, 2]), "inputs[0].shape"),
    "no files": (changed(datatype="BYTES", shape=[0]), "inputs[0].shape"),
    "too many pixels": (changed(shape=[9, 1, 1, 3]), "inputs[0].shape"),
    "too many files": (files([b""] * 9), "inputs[0].shape"),
    "more files than can be": (changed(datatype="BYTES", shape=[2**62]), "inputs[0].shape"),
    "bytes missing": (changed(shape=[1, 1, 2, 3]), "raw_input_contents[0]"),
    "bytes too many": (request(WHOLE, raw=[b"abcd"]), "raw_input_contents[0]"),
    "raw contents of nothing": (request(WHOLE, raw=[b"abc", b"abc"]), "raw_input_contents"),
    "both forms": (
        request(typed("UINT8", [1, 1, 1, 3], uint_contents=[1, 2, 3]).inputs[0], raw=[b"abc"]),
        "inputs[0].contents",
    ),
    "file without its length": (changed(datatype="BYTES", shape=[1]), "raw_input_contents[0]"),
    "file shorter than it says": (
        request(TENSOR(name="image", datatype="BYTES", shape=[1]), raw=[b"\5\0\0\0abcd"]),
        "raw_input_contents[0]",
    ),
    "more than the files": (
        request(TENSOR(name="image", datatype="BYTES", shape=[1]), raw=[b"\1\0\0\0ab"]),
        "raw_input_contents[0]",
    ),
    "no contents": (request(WHOLE), "inputs[0].contents.uint_contents"),
    "elements missing": (
        typed("UINT8", [1, 1, 1, 3], uint_contents=[1, 2]),
        "inputs[0].contents.uint_contents",
    ),
    "element above 255": (
        typed("UINT8", [1, 1, 1, 3], uint_contents=[1, 2, 256]),
        "inputs[0].contents.uint_contents",
    ),
    "elements of another type": (
        typed("UINT8", [1, 1, 1, 3], int_contents=[1, 2, 3]),
        "inputs[0].contents.int_contents",
    ),
    "files missing": (typed("BYTES", [2], bytes_contents=[b"a"]), "inputs[0].contents.bytes_contents"),
    "unknown output": (pixels(PIXEL, "cam", "logits"), "outputs[1].name"),
    "output twice": (pixels(PIXEL, "cam", "cam"), "outputs[1].name"),
    "too many outputs": (pixels(PIXEL, *["cam"] * 5), "outputs"),
    "parameter of an output": (with_output_parameter(), "outputs[0].parameters"),
    "unknown parameter": (pixels(PIXEL, parameters={"treshold": 0.5}), "parameters"),
    "Triton's timeout": (pixels(PIXEL, parameters={"timeout": 1}), "parameters"),
    "parameter without a value": (
        oip.ModelInferRequest(parameters={"tags": oip.InferParameter()}),
        "parameters.tags",
    ),
    "threshold out of range": (pixels(PIXEL, parameters={"threshold": 1.0}), "parameters.threshold"),
    "threshold that is true": (pixels(PIXEL, parameters={"threshold": True}), "parameters.threshold"),
    "threshold in words": (pixels(PIXEL, parameters={"threshold": "half"}), "parameters.threshold"),
    "unknown refinement": (pixels(PIXEL, parameters={"refinement": "crfs"}), "parameters.refinement"),
    "refinement that is a number": (pixels(PIXEL, parameters={"refinement": 1}), "parameters.refinement"),
    "unknown datatype of cam": (pixels(PIXEL, parameters={"cam_datatype": "INT8"}), "parameters.cam_datatype"),
    "priority in words": (pixels(PIXEL, parameters={"priority": "bulk"}), "parameters.priority"),
    "priority below all": (pixels(PIXEL, parameters={"priority": -1}), "parameters.priority"),
    "priority that is true": (pixels(PIXEL, parameters={"priority": True}), "parameters.priority"),
    "tags that are a number": (pixels(PIXEL, parameters={"tags": 1}), "parameters.tags"),
    "tags of damaged JSON": (pixels(PIXEL, parameters={"tags": '["red"'}), "parameters.tags"),
    "tags of deep JSON": (pixels(PIXEL, parameters={"tags": "[" * 4096}), "parameters.tags"),
    "tags that are JSON of numbers": (pixels(PIXEL, parameters={"tags": "[1]"}), "parameters.tags"),
    "tags without end": (pixels(PIXEL, parameters={"tags": "red," * 2000}), "parameters.tags"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_request(shared_serving, name):
    message, field = INVALID[name]
    code, reason, fields, said, retry = error_of(shared_serving, message)
    assert (code, reason, fields, retry) == ("INVALID_ARGUMENT", "INVALID_REQUEST", [field], None)
    assert len(said) < 500 and any(word in said for word in ("expected", "must", "there is none"))


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=8), st.booleans())
def test_files_come_out_as_they_went_in(datas, raw):
    assert images_from_request(files(datas, raw=raw), 8, 100) == datas


@given(
    st.sampled_from(["BYTES", "UINT8"]),
    st.lists(st.integers(-2, 4) | st.integers(-(2**63), 2**63 - 1), max_size=5),
    st.lists(st.binary(max_size=40), max_size=2),
)
def test_whatever_comes_is_images_or_an_error_of_the_table(datatype, shape, raw):
    try:
        images = images_from_request(request(TENSOR(name="image", datatype=datatype, shape=shape), raw=raw), 8, 100)
    except (InvalidRequestError, ImageError):
        return
    assert len(images) == shape[0]


@pytest.mark.parametrize("tag", ["dog", "x" * 4000], ids=["short", "long"])
def test_unknown_class(shared_serving, tag):
    code, reason, fields, message, _ = error_of(shared_serving, pixels(PIXEL, parameters={"tags": f"red,{tag}"}))
    assert (code, reason, fields) == ("INVALID_ARGUMENT", "UNKNOWN_CLASS", ["parameters.tags"])
    assert message.startswith(f"unknown class '{tag[:100]}")


def test_images_of_different_sizes_are_to_be_sent_one_by_one(serving, colours, png):
    running = serving()
    message = files([png(colours), png(colours[:-4])], "scores", "segmentation")
    code, reason, fields, said, _ = error_of(running, message)
    assert (code, reason, fields) == ("INVALID_ARGUMENT", "INVALID_REQUEST", ["inputs[0]"])
    assert "56x40, 56x36" in said and "one by one" in said
    assert running.runner.batches == [], "it was seen before the network ran"


def test_the_broken_image_of_a_batch_is_named(shared_serving, colours, png):
    message = files([png(colours), png(colours)[:-40], png(colours)], "scores")
    code, reason, fields, said, _ = error_of(shared_serving, message)
    assert (code, reason, fields) == ("INVALID_ARGUMENT", "IMAGE_UNDECODABLE", ["image"])
    assert said.startswith("image 1: ")


def test_limits_are_those_of_our_own_service(serving, colours, png):
    running = serving(max_pixels=8, max_message_bytes=6000)
    nine = np.zeros((1, 3, 3, 3), np.uint8)
    for message in (pixels(nine), pixels(nine, raw=False), files([png(nine[0])])):
        assert error_of(running, message)[:2] == ("RESOURCE_EXHAUSTED", "IMAGE_TOO_LARGE")


def test_response_too_large(serving, colours, png):
    running = serving(max_message_bytes=2000)
    code, reason, fields, said, retry = error_of(running, files([png(colours)], "segmentation"))
    assert (code, reason, fields, retry) == ("RESOURCE_EXHAUSTED", "RESPONSE_TOO_LARGE", [], None)
    assert "2240" in said


@pytest.mark.parametrize("method", ["ModelInfer", "ModelMetadata"])
def test_model_not_found(shared_serving, method):
    message = pixels(PIXEL, model_name="dog", model_version="3")
    if method == "ModelMetadata":
        message = oip.ModelMetadataRequest(name="dog", version="3")
    with stub_of(shared_serving) as stub, pytest.raises(grpc.RpcError) as raised:
        getattr(stub, method)(message)
    resource = error_details_pb2.ResourceInfo()
    assert any(packed.Unpack(resource) for packed in rpc_status.from_call(raised.value).details)
    assert (raised.value.code().name, resource.resource_name) == ("NOT_FOUND", "dog/3")


def test_model_failed(serving, tmp_path):
    running = serving(folders=[BundleFolder("bad", "1", tmp_path)])
    for message, method in ((pixels(PIXEL), "ModelInfer"), (oip.ModelMetadataRequest(), "ModelMetadata")):
        assert error_of(running, message, method)[:2] == ("FAILED_PRECONDITION", "MODEL_FAILED")


def test_what_the_model_does_not_have(serving):
    def load(path):
        opened = weakseg.load(path, threads=1)
        manifest = replace(opened.manifest, outputs=("segmentation",))
        return Model(replace(opened.bundle, manifest=manifest), opened.runner)

    running = serving(load=load)
    for name in ("scores", "cam", "pseudo_mask"):
        code, reason, _, said, _ = error_of(running, pixels(PIXEL, "segmentation", name))
        assert (code, reason) == ("FAILED_PRECONDITION", "OUTPUT_UNSUPPORTED")
        assert f"no {name}: it has segmentation" in said
    with stub_of(running) as stub:
        assert [t.name for t in stub.ModelMetadata(oip.ModelMetadataRequest()).outputs] == ["segmentation"]
        assert [t.name for t in stub.ModelInfer(pixels(PIXEL)).outputs] == ["segmentation"]


def test_a_refinement_that_the_model_does_not_have(shared_serving):
    message = pixels(PIXEL, "pseudo_mask", parameters={"refinement": "random_walk"})
    assert error_of(shared_serving, message)[:2] == ("FAILED_PRECONDITION", "OUTPUT_UNSUPPORTED")


def test_internal_says_nothing(serving):
    running = serving()
    running.runner.error = ValueError("secret")
    code, reason, _, said, _ = error_of(running, pixels(np.repeat(PIXEL, 3, axis=0)))
    assert (code, reason) == ("INTERNAL", "INTERNAL") and "secret" not in said


def test_triton_s_own_methods_are_unimplemented(shared_serving):
    with grpc.insecure_channel(shared_serving.target) as channel:
        method = channel.unary_unary("/inference.GRPCInferenceService/ModelConfig")
        with pytest.raises(grpc.RpcError) as raised:
            method(b"", timeout=LONG_S)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


# Load -----------------------------------------------------------------------------------------------------------------


def test_a_batch_is_admitted_whole_or_not_at_all(serving, colours, png):
    running = serving(queue_limit=2, max_batch=2)
    running.runner.gate.clear()
    with stub_of(running) as stub:
        inside = stub.ModelInfer.future(files([png(colours)] * 2, "segmentation"))
        running.until(lambda: len(running.runner.batches) == 1)
        third = stub.ModelInfer.future(files([png(colours)], "segmentation"))
        running.until(lambda: running.server.admission.inflight == 3)
        code, reason, _, _, retry = error_of(running, files([png(colours)] * 2, "segmentation"))
        assert (code, reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert retry.retry_delay == duration_pb2.Duration(nanos=250_000_000)
        assert running.server.admission.inflight == 3
        running.runner.gate.set()
        assert inside.result(LONG_S).outputs and third.result(LONG_S).outputs
    running.until(lambda: running.server.admission.inflight == 0)
    assert running.sample("weakseg_rejected_total", reason="QUEUE_FULL") == 2


def test_a_batch_whose_deadline_passes_in_the_queue_never_reaches_the_network(serving, colours, png):
    running = serving(max_batch=2)
    running.runner.gate.clear()
    with stub_of(running) as stub:
        first = stub.ModelInfer.future(files([png(colours)], "segmentation"))
        running.until(lambda: len(running.runner.batches) == 1)
        with pytest.raises(grpc.RpcError) as raised:
            stub.ModelInfer(files([png(colours)] * 2, "segmentation"), timeout=0.2)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        running.until(lambda: running.server.admission.inflight == 1)
        assert running.sample("weakseg_queue_depth") == 0
        running.runner.gate.set()
        first.result(LONG_S)
    assert len(running.runner.batches) == 1
    # The client may tell the server that it gave up just before the server's own clock says so.
    codes = ("DEADLINE_EXCEEDED", "CANCELLED")
    running.until(lambda: running.server._edge.running == 0)
    assert sum(running.sample("weakseg_requests_total", model="toy", version="1", code=code) for code in codes) == 2


def test_the_first_image_that_fails_ends_the_others(serving, colours, png):
    running = serving(max_batch=3, max_delay_ms=1e5)
    broken = png(colours)[:-40]
    assert error_of(running, files([png(colours), broken], "segmentation"))[1] == "IMAGE_UNDECODABLE"
    running.until(lambda: running.server.admission.inflight == 0)
    assert running.runner.batches == [] and running.sample("weakseg_queue_depth") == 0


def test_a_drain_refuses_new_batches_and_waits_for_those_inside(serving, colours, png):
    running = serving()
    running.runner.gate.clear()
    with stub_of(running) as stub:
        inside = stub.ModelInfer.future(files([png(colours)] * 2, "segmentation"))
        running.until(lambda: len(running.runner.batches) == 1)
        assert running.server._edge.running == 1
        running._loop.call_soon_threadsafe(running._stop.set)
        running.until(lambda: running.server.admission.draining)
        code, reason, _, _, retry = error_of(running, files([png(colours)]))
        assert (code, reason) == ("UNAVAILABLE", "DRAINING") and retry is not None
        running.runner.gate.set()
        assert inside.result(LONG_S).outputs


def test_a_batch_counts_against_the_rate_limit_by_its_images(serving):
    running = serving(rate_limit=0.001, rate_burst=5)
    with stub_of(running) as stub:
        stub.ModelInfer(pixels(np.repeat(PIXEL, 3, axis=0), "scores"))
        code, reason, _, _, retry = error_of(running, pixels(np.repeat(PIXEL, 3, axis=0), "scores"))
        assert (code, reason) == ("RESOURCE_EXHAUSTED", "RATE_LIMITED") and retry.retry_delay.seconds > 900
        stub.ModelInfer(pixels(np.repeat(PIXEL, 2, axis=0), "scores"))


def test_images_are_counted_and_calls_logged(serving, caplog, colours, png):
    running = serving()
    with stub_of(running) as stub, caplog.at_level(logging.INFO, "serve.requests"):
        stub.ModelInfer(files([png(colours)] * 3, "segmentation", id="mine"))
        error_of(running, files([b"secret"] * 2, id="other"))
        running.until(lambda: running.server._edge.running == 0)
    counts = {"model": "toy", "version": "1"}
    assert running.sample("weakseg_requests_total", code="OK", **counts) == 3
    assert running.sample("weakseg_requests_total", code="INVALID_ARGUMENT", **counts) == 2
    assert running.sample("weakseg_request_duration_seconds_count", **counts) == 5
    assert running.sample("weakseg_rejected_total", reason="UNSUPPORTED_FORMAT") == 2
    assert running.sample("weakseg_response_bytes_count") == 1
    assert running.sample("weakseg_stage_duration_seconds_count", stage="decode") == 3
    assert running.sample("weakseg_inflight") == 0
    call = {"grpc_type": "unary_unary", "grpc_service": "inference.GRPCInferenceService", "grpc_method": "ModelInfer"}
    assert running.sample("grpc_server_handled_total", grpc_code="OK", **call) == 1
    good, bad = (record.fields for record in caplog.records)
    assert (good["request_id"], good["model"], good["code"], good["images"]) == ("mine", "toy/1", "OK", 3)
    assert {"width", "height", "queue_ms", "decode_ms", "infer_ms", "postprocess_ms", "encode_ms"} <= good.keys()
    assert (bad["request_id"], bad["reason"]) == ("other", "UNSUPPORTED_FORMAT")
    assert "secret" not in json.dumps([vars(record) for record in caplog.records], default=str)
