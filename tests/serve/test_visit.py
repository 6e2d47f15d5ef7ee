"""Images that go through a server in one thread, and what is the same for those that are handed from pool to pool."""

import io
import threading
import time

import grpc
import numpy as np
import pytest
from PIL import Image

import serve.steps
import weakseg
from serve.pipeline import QUICK_BYTES, QUICK_PARTS
from weakseg.model import Model
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
WAYS = pytest.mark.parametrize("max_batch", [8, 1], ids=["in pools", "in one thread"])


def request(data, *kinds, **fields):
    outputs = [pb.OutputSpec(kind=getattr(pb, f"OUTPUT_KIND_{kind}")) for kind in kinds or ("SEGMENTATION",)]
    return pb.SegmentRequest(image=pb.Image(encoded=data), outputs=outputs, **fields)


def ask(running, message):
    with grpc.insecure_channel(running.target) as channel:
        return pb_grpc.SegmentationServiceStub(channel).Segment(message, timeout=LONG_S)


@pytest.fixture
def threads_of(monkeypatch):
    """A function that begins to record in which threads something is called; returns their names."""

    def record(owner, name):
        real, threads = getattr(owner, name), []

        def recorded(*args, **options):
            threads.append(threading.current_thread().name.split("_")[0])
            return real(*args, **options)

        monkeypatch.setattr(owner, name, recorded)
        return threads

    return record


@pytest.mark.parametrize("kinds", [["SEGMENTATION"], ["CAM"], ["CAM", "SEGMENTATION"]], ids="+".join)
def test_both_ways_give_the_same(serving, colours, png, kinds):
    in_pools, in_one = (ask(serving(max_batch=n), request(png(colours), *kinds)) for n in (8, 1))
    assert in_pools.outputs and in_one.timing.HasField("queue") and in_one.timing.batch_size == 1
    for response in (in_pools, in_one):
        response.ClearField("timing")
    assert in_one == in_pools


def test_one_thread_does_all_of_it(serving, colours, png, threads_of):
    decoding, finishing = threads_of(Model, "decode"), threads_of(Model, "finish")
    ask(serving(max_batch=1), request(png(colours)))
    assert (decoding, finishing) == (["runner"], ["runner"])
    ask(serving(), request(png(colours)))
    assert (decoding[1:], finishing[1:]) == (["decode"], ["finish"])


@pytest.mark.parametrize(
    ("kinds", "fields", "options", "alone"),
    [
        (["CAM", "SEGMENTATION"], {}, {"max_batch": 1}, True),
        (["PSEUDO_MASK"], {"refinement": pb.REFINEMENT_CRF}, {"max_batch": 1}, False),  # it would keep the thread
        (["SEGMENTATION"], {}, {"max_batch": 2}, False),  # others may share its batch
        (["SEGMENTATION"], {}, {"max_batch": 1, "threads": 2}, False),  # its graph has all cores, and no second session
    ],
)
def test_who_goes_alone(serving, colours, png, threads_of, kinds, fields, options, alone):
    decoding, message = threads_of(Model, "decode"), request(png(colours), *kinds)
    for output in message.outputs:
        output.MergeFrom(pb.OutputSpec(**fields))
    ask(serving(**options), message)
    assert decoding == ["runner" if alone else "decode"]


def test_large_images_of_a_batching_server_go_alone(serving, colours, png, threads_of, monkeypatch):
    running = serving()
    decoding = threads_of(Model, "decode")
    monkeypatch.setattr(serve.steps, "CPU_BATCH_PIXELS", 2 * colours[..., 0].size - 1)
    ask(running, request(png(colours)))
    ask(running, request(png(colours[:8])))
    assert decoding == ["runner", "decode"]


def test_the_first_has_all_cores_and_those_beside_others_one_each(serving, colours, png, toy_bundle):
    from tests.conftest import GatedRunner

    made = []

    def load(path):
        model = weakseg.load(path, threads=1)
        made.append(model)
        model.runner, model.beside = GatedRunner(model.runner), GatedRunner(weakseg.load(path, threads=1).runner)
        return model

    running = serving(load=load, threads=2, max_batch=1)
    [model] = made
    model.runner.gate.clear()
    model.beside.gate.clear()
    with grpc.insecure_channel(running.target) as channel:
        segment = pb_grpc.SegmentationServiceStub(channel).Segment
        first = segment.future(request(png(colours)))
        running.until(lambda: model.runner.batches)
        second = segment.future(request(png(colours)))
        running.until(lambda: model.beside.batches)
        for runner in (model.runner, model.beside):
            runner.gate.set()
        assert first.result(LONG_S).outputs == second.result(LONG_S).outputs
    assert (model.runner.batches, model.beside.batches) == ([("segmentation", 1)], [("segmentation", 1)])


@WAYS
def test_a_damaged_file_is_refused_and_says_nothing_about_the_model(serving, colours, png, max_batch):
    running = serving(max_batch=max_batch)
    for _ in range(20):
        with pytest.raises(grpc.RpcError) as refused:
            ask(running, request(png(colours)[:-40]))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ask(running, request(png(colours))).outputs
    assert running.runner.batches == [("segmentation", 1)]


@WAYS
def test_executions_are_counted_one_by_one(serving, colours, png, max_batch):
    running = serving(max_batch=max_batch)
    ask(running, request(png(colours), "CAM", "SEGMENTATION"))
    model = {"model": "toy", "version": "1"}
    for name in ("weakseg_executions_total", "weakseg_images_total", "weakseg_batch_size_sum"):
        assert running.sample(name, **model) == 2, name
    for stage in ("decode", "queue", "infer", "postprocess", "encode"):
        assert running.sample("weakseg_stage_duration_seconds_count", stage=stage) == 1, stage
    assert running.sample("weakseg_queue_duration_seconds_count", priority="interactive") == 1


def test_a_deadline_that_decoding_leaves_no_time_for(serving, colours, png, monkeypatch):
    running = serving(max_batch=1)
    (entry,) = running.server.models.entries()
    decode = Model.decode

    def decode_slowly(self, *args, **options):
        # From now on, its graph takes longer than any client waits; `latest` was told before.
        monkeypatch.setattr("serve.visit.monotonic", lambda: late)
        return decode(self, *args, **options)

    late = 10**9
    monkeypatch.setattr(Model, "decode", decode_slowly)
    with pytest.raises(grpc.RpcError, match="too little time is left after decoding") as refused:
        ask(running, request(png(colours)))
    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert running.runner.batches == [] and entry.loaded is not None


def test_an_image_that_is_long_in_decoding_does_not_hang(serving, colours, png, monkeypatch):
    running = serving(max_batch=1, execution_timeout_s=0.05)
    decode = Model.decode

    def decode_slowly(self, *args, **options):
        time.sleep(0.3)
        return decode(self, *args, **options)

    monkeypatch.setattr(Model, "decode", decode_slowly)
    assert ask(running, request(png(colours))).outputs
    assert running.sample("weakseg_hung_executions") == 0


def many_chunks(n):
    """A PNG with `n` more chunks."""
    file, out = io.BytesIO(), Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    out.save(file, "PNG")
    data = file.getvalue()
    empty = b"\x00\x00\x00\x00tEXt\x44\xdf\x78\x6f"
    return data[:33] + n * empty + data[33:]


def large(n_bytes):
    """A PNG of noise."""
    side = int((n_bytes / 3) ** 0.5) + 1
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "threads"),
    [
        (many_chunks(0), ["loop"]),
        (many_chunks(2 * QUICK_PARTS), ["loop", "decode"]),
        (large(QUICK_BYTES), ["decode"]),
    ],
    ids=["small", "of many parts", "large"],
)
@pytest.mark.parametrize("protocol", ["unary", "stream"])
def test_a_small_file_is_looked_at_by_the_event_loop(serving, threads_of, data, threads, protocol):
    running = serving()
    looking = threads_of(serve.steps, "probe")
    with grpc.insecure_channel(running.target) as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        if protocol == "unary":
            stub.Segment(request(data), timeout=LONG_S)
        else:
            list(stub.SegmentStream(iter([pb.SegmentStreamRequest(request=request(data))]), timeout=LONG_S))
    loop = running._thread.name.split("_")[0]
    assert ["loop" if name == loop else name for name in looking] == threads
