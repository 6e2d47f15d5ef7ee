"""Answers from memory: what counts as the same question, how much is kept, and what a hit still has to pass."""

import json
import shutil
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.cache import ENTRY_BYTES, NOT_DECIDING, ResponseCache, key_of
from serve.inference import grpc_inference_service_pb2 as oip
from serve.inference import grpc_inference_service_pb2_grpc as oip_grpc
from serve.metrics import Metrics
from serve.repository import BundleFolder, find_bundles
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
SHA = "0" * 64
TOY_3 = Path(__file__).parents[1] / "data" / "bundles_of_schema_3" / "toy" / "3"
CODES = grpc.StatusCode


@contextmanager
def stub_of(running):
    with grpc.insecure_channel(running.target) as channel:
        yield pb_grpc.SegmentationServiceStub(channel)


def request(data, *specs, **fields):
    specs = specs or (pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION),)
    return pb.SegmentRequest(image=pb.Image(encoded=data), outputs=specs, **fields)


def spec(kind, **fields):
    return pb.OutputSpec(kind=getattr(pb, f"OUTPUT_KIND_{kind}"), **fields)


def code_of(stub, message, **options):
    with pytest.raises(grpc.RpcError) as raised:
        stub.Segment(message, timeout=LONG_S, **options)
    return raised.value.code()


def lookups(running):
    """(hits, misses)"""
    return running.sample("weakseg_cache_hits_total"), running.sample("weakseg_cache_misses_total")


def changed(message):
    """(path, copy with this one field changed) of every field of a message, down to its scalars."""
    for field in message.DESCRIPTOR.fields:
        value, copy = getattr(message, field.name), type(message).FromString(message.SerializeToString())
        place = getattr(copy, field.name)
        if field.message_type is not None:
            repeated = hasattr(value, "append")
            for path, other in changed(value[0] if repeated else value):
                (place[0] if repeated else place).CopyFrom(other)
                yield f"{field.name}.{path}", copy
            continue
        if hasattr(value, "append"):
            place.append(7)
        elif isinstance(value, (str, bytes)):
            setattr(copy, field.name, value + type(value)(b"x" if isinstance(value, bytes) else "x"))
        else:
            setattr(copy, field.name, type(value)(value + 1))
        yield field.name, copy


# Keys -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image", [pb.Image(encoded=b"file"), pb.Image(raw=pb.RawImage(width=2, height=1, rgb=b"rgbrgb"))]
)
def test_every_field_decides_but_those_that_say_who_asks_when_and_by_which_name(image):
    message = pb.SegmentRequest(image=image, outputs=[spec("PSEUDO_MASK"), spec("CAM")], tags=pb.Tags(class_ids=[1]))
    key = key_of(message, SHA)
    seen = {}
    for path, other in changed(message):
        seen[path] = key_of(other, SHA) != key
    assert {path.split(".")[0] for path, differs in seen.items() if not differs} == set(NOT_DECIDING)
    assert [seen[path] for path in ("request_id", "model.name", "model.version", "priority")] == [False] * 4
    assert len(seen) >= 18 and {"image.ignore_orientation", "outputs.quality", "tags.class_ids"} <= seen.keys()


def test_what_looks_alike_has_keys_of_its_own():
    pixels = b"rgb" * 6
    raw = [pb.RawImage(width=w, height=6 // w, rgb=pixels) for w in (1, 2, 3, 6)]
    one = [spec("CAM", quality=True)]
    messages = [
        request(pixels),
        *(pb.SegmentRequest(image=pb.Image(raw=r), outputs=[spec("SEGMENTATION")]) for r in raw),
        request(pixels, *one),
        request(pixels, spec("CAM"), spec("UNSPECIFIED", quality=True)),
        request(pixels, spec("CAM"), spec("SEGMENTATION")),
        request(pixels, spec("SEGMENTATION"), spec("CAM")),
        request(pixels, tags=pb.Tags()),  # none is present, where without tags the scores say
        request(pixels, tags=pb.Tags(class_ids=[1, 2])),
        request(pixels[:-1]),
    ]
    keys = {key_of(message, SHA) for message in messages} | {key_of(messages[0], "1" * 64)}
    assert len(keys) == len(messages) + 1


# What is kept ---------------------------------------------------------------------------------------------------------


def response_of(size):
    return pb.SegmentResponse(outputs=[pb.Output(mask=pb.Mask(data=bytes(size)))])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 2500)), max_size=60))
def test_the_bound_holds_and_the_least_recently_used_go_first(steps):
    limit, metrics = 6000, Metrics()
    cache, model = ResponseCache(limit, metrics), OrderedDict()
    for keep, name, size in steps:
        asked = request(bytes([name]))
        key, found = cache.find(asked, SHA)
        assert (found is not None) == (key in model)
        if found is not None:
            model.move_to_end(key)
            assert len(found[0].outputs[0].mask.data) == model[key][0]
        if keep:
            response = response_of(size)
            entry = (size, response.ByteSize() + ENTRY_BYTES)
            cache.keep(key, response)
            model.pop(key, None)
            model[key] = entry
            while sum(cost for _, cost in model.values()) > limit:
                model.popitem(last=False)
        held = sum(len(data) + ENTRY_BYTES for data in cache._responses.values())
        assert list(cache._responses) == list(model)
        assert held == sum(cost for _, cost in model.values()) <= limit
        assert (metrics.registry.get_sample_value("weakseg_cache_bytes") or 0) == held


def test_what_is_larger_than_the_cache_moves_nothing_out():
    cache = ResponseCache(1000, Metrics())
    small, large = (cache.find(request(data), SHA)[0] for data in (b"small", b"large"))
    cache.keep(small, response_of(100))
    cache.keep(large, response_of(1000))
    assert list(cache._responses) == [small]


# In a whole server ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["PNG_INDEX", "COCO_RLE", "POLYGON", "RAW_U8"])
def test_a_hit_is_the_same_answer_without_any_work(serving, colours, png, encoding):
    running = serving(cache_mib=1)
    specs = [spec(kind, mask_encoding=getattr(pb, f"MASK_ENCODING_{encoding}")) for kind in ("SEGMENTATION", "CAM")]
    with stub_of(running) as stub:
        first = stub.Segment(request(png(colours), *specs, request_id="one"))
        n_batches = len(running.runner.batches)
        running.runner.gate.clear()  # whoever needs the network waits
        hit = stub.Segment(request(png(colours), *specs, request_id="two"), timeout=LONG_S)
    assert (first.cached, hit.cached) == (False, True)
    assert (first.request_id, hit.request_id) == ("one", "two")
    assert first.timing.batch_size == 1 and first.timing.infer.ToNanoseconds() > 0
    assert hit.HasField("timing") and hit.timing == pb.Timing()
    for response in (first, hit):
        for field in ("request_id", "timing", "cached"):
            response.ClearField(field)
    assert first.SerializeToString(deterministic=True) == hit.SerializeToString(deterministic=True)
    assert len(running.runner.batches) == n_batches
    assert lookups(running) == (1, 1)
    assert running.sample("weakseg_requests_total", model="toy", version="1", code="OK") == 2
    assert running.sample("weakseg_response_bytes_count") == 2
    for stage in ("queue", "decode", "infer", "postprocess", "encode"):
        assert running.sample("weakseg_stage_duration_seconds_count", stage=stage) == 1
    assert 0 < running.sample("weakseg_cache_bytes") <= 2**20


def test_a_hit_needs_no_place_in_the_queue(serving, colours, png):
    running = serving(cache_mib=1, queue_limit=1, max_batch=1)
    data = png(colours)
    with stub_of(running) as stub:
        stub.Segment(request(data))
        running.runner.gate.clear()
        held = [stub.Segment.future(request(data, spec("CAM", heatmap_max_side=i))) for i in (1, 2)]
        running.until(lambda: running.server.admission.inflight == 2)
        assert code_of(stub, request(data, spec("CAM"))) is CODES.RESOURCE_EXHAUSTED
        assert stub.Segment(request(data, priority=pb.PRIORITY_BULK), timeout=LONG_S).cached
        running.runner.gate.set()
        assert not any(call.result(LONG_S).cached for call in held)


def test_a_stream_gets_hits_and_other_options_none(serving, colours, png):
    running = serving(cache_mib=1)
    data = png(colours)
    asked = [
        request(data),
        request(data, spec("SEGMENTATION", mask_encoding=pb.MASK_ENCODING_PNG_INDEX)),
        request(data, spec("CAM")),
        request(data, tags=pb.Tags(class_ids=[1])),
        request(png(colours[:-1])),
    ]
    with stub_of(running) as stub:
        assert not any(stub.Segment(message).cached for message in asked)
        again = stub.SegmentStream(iter(pb.SegmentStreamRequest(request=message) for message in asked))
        assert all(item.response.cached for item in again)
    assert lookups(running) == (5, 5)


def test_what_fails_is_not_kept(serving, colours):
    running = serving(cache_mib=1)
    with stub_of(running) as stub:
        for _ in range(2):
            assert code_of(stub, request(b"no image")) is CODES.INVALID_ARGUMENT
            assert code_of(stub, request(b"no image", spec("CAM", class_ids=[9]))) is CODES.INVALID_ARGUMENT
    assert lookups(running) == (0, 2) and running.sample("weakseg_cache_bytes") == 0


def test_a_hit_has_passed_tokens_and_rate_limit_and_is_refused_in_a_drain(serving, colours, png, tmp_path):
    (tmp_path / "tokens.toml").write_text('[a]\ntoken = "a token of client a"\n[b]\ntoken = "a token of client b"')
    running = serving(cache_mib=1, tokens=tmp_path / "tokens.toml", rate_limit=0.001, rate_burst=2)
    a, b, nobody = (
        {"metadata": (("authorization", f"Bearer a token of client {name}"),)} for name in ("a", "b", "nobody")
    )
    message = request(png(colours))
    with stub_of(running) as stub:
        assert [stub.Segment(message, **a).cached for _ in range(2)] == [False, True]
        assert code_of(stub, message) is CODES.UNAUTHENTICATED
        assert code_of(stub, message, **nobody) is CODES.UNAUTHENTICATED
        assert code_of(stub, message, **a) is CODES.RESOURCE_EXHAUSTED
        assert stub.Segment(message, **b).cached
        running.server.admission.draining = True
        assert code_of(stub, message, **b) is CODES.UNAVAILABLE
    assert running.sample("weakseg_rejected_total", reason="RATE_LIMITED") == 1


def test_a_replaced_model_gives_its_own_answer_and_the_old_one_its_old(serving, toy_bundle, tmp_path, colours, png):
    folder = tmp_path / "toy" / "1"
    shutil.copytree(toy_bundle, folder)
    running = serving(cache_mib=1, folders=lambda: find_bundles([], tmp_path))
    before = (folder / "manifest.json").read_text()
    answers = []
    with stub_of(running) as stub:
        for manifest in (before, json.dumps(json.loads(before) | {"presence": 0.25}), before):
            (folder / "manifest.json").write_text(manifest)
            running.call(running.server.lifecycle.reload())
            answers += [stub.Segment(request(png(colours), spec("CAM"))) for _ in range(2)]
    assert [answer.cached for answer in answers] == [False, True, False, True, True, True]
    hashes = [answer.model_sha256 for answer in answers]
    assert hashes[0] == hashes[1] == hashes[4] == hashes[5] != hashes[2] == hashes[3]


def test_a_mask_that_was_cut_short_is_not_kept(serving, colours, png):
    running = serving(cache_mib=1, refine_budget_ms=1e-6)
    message = request(png(colours), spec("PSEUDO_MASK", refinement=pb.REFINEMENT_CRF))
    with stub_of(running) as stub:
        short = [stub.Segment(message) for _ in range(2)]
        running.server.pipeline.refiners.budget_s = None
        whole = [stub.Segment(message) for _ in range(2)]
    assert [one.outputs[0].refinement_cut_short for one in (*short, *whole)] == [True, True, False, False]
    assert [one.cached for one in (*short, *whole)] == [False, False, False, True]


def test_a_hit_is_no_new_image_for_drift(serving, colours, png):
    running = serving(cache_mib=1, folders=[BundleFolder("toy", "3", TOY_3)])
    with stub_of(running) as stub:
        assert [stub.Segment(request(png(colours))).cached for _ in range(2)] == [False, True]
        assert stub.GetModel(pb.GetModelRequest()).model.drift.n_images == 1


def test_a_hit_that_a_longer_id_makes_too_large_is_an_error(serving, shared_serving, png):
    def message(width, **fields):
        rgb = np.zeros((1, width, 3), np.uint8)
        return request(png(rgb), spec("SEGMENTATION", mask_encoding=pb.MASK_ENCODING_RAW_U8), **fields)

    limit = 1024
    with stub_of(shared_serving) as stub:
        width = 700 + limit - 40 - stub.Segment(message(700)).ByteSize()
    with stub_of(serving(cache_mib=1, max_message_bytes=limit)) as stub:
        assert [stub.Segment(message(width)).cached for _ in range(2)] == [False, True]
        with pytest.raises(grpc.RpcError, match=f"expected a response of at most {limit} bytes"):
            stub.Segment(message(width, request_id="x" * 128))


def test_nothing_is_kept_by_default_nor_of_the_open_inference_protocol(serving, colours, png):
    with stub_of(serving()) as stub:
        assert not any(stub.Segment(request(png(colours))).cached for _ in range(2))
    running = serving(cache_mib=1)
    message = oip.ModelInferRequest(
        inputs=[oip.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=(1, *colours.shape))],
        raw_input_contents=[colours.tobytes()],
    )
    with grpc.insecure_channel(running.target) as channel:
        for _ in range(2):
            assert oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message).outputs
    assert lookups(running) == (0, 0) and len(running.runner.batches) == 4
