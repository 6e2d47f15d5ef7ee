"""Interactive and bulk requests in a whole server: who goes first, who is refused, what is counted."""

import asyncio
import threading

import grpc
import numpy as np
import pytest

from serve.inference import grpc_inference_service_pb2 as oip
from serve.inference import grpc_inference_service_pb2_grpc as oip_grpc
from serve.job import Job
from weakseg import errors
from weakseg.client import Client
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
GRAPHS = {pb.OUTPUT_KIND_CAM: "classifier", pb.OUTPUT_KIND_SEGMENTATION: "segmentation"}


def request(data, kind, priority="UNSPECIFIED"):
    return pb.SegmentRequest(
        image=pb.Image(encoded=data),
        outputs=[pb.OutputSpec(kind=getattr(pb, f"OUTPUT_KIND_{kind}"))],
        priority=getattr(pb, f"PRIORITY_{priority}"),
    )


@pytest.fixture
def busy(serving):
    """A server with room for two bulk requests of four in all, whose network waits."""
    running = serving(queue_limit=3, max_batch=1, bulk_share=0.5, bulk_wait_s=LONG_S)
    running.runner.gate.clear()
    return running


def test_interactive_requests_pass_those_of_a_bulk_stream_and_are_refused_last(busy, colours, png):
    data = png(colours)
    bulk = [pb.SegmentStreamRequest(request=request(data, "SEGMENTATION", "BULK")) for _ in range(3)]
    with grpc.insecure_channel(busy.target) as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        responses = stub.SegmentStream(iter(bulk))
        refused = next(responses)
        assert "expected at most 2 bulk requests at once" in refused.error.message
        assert busy.server.admission.inflight == 2
        busy.until(lambda: busy.sample("weakseg_queue_depth") == 1)
        calls = [stub.Segment.future(request(data, "CAM", priority)) for priority in ("UNSPECIFIED", "INTERACTIVE")]
        busy.until(lambda: busy.sample("weakseg_queue_depth") == 3)
        with pytest.raises(grpc.RpcError, match="at most 4 requests at once"):
            stub.Segment(request(data, "CAM"))
        busy.runner.gate.set()
        assert all(call.result(LONG_S).outputs for call in calls)
        assert [response.WhichOneof("result") for response in responses] == ["response"] * 2
    assert busy.runner.batches == [("segmentation", 1), ("classifier", 1), ("classifier", 1), ("segmentation", 1)]
    assert busy.server.admission.inflight == busy.server.admission.inflight_bulk == 0
    for priority in ("bulk", "interactive"):
        assert busy.sample("weakseg_priority_requests_total", priority=priority) == 3
        assert busy.sample("weakseg_queue_duration_seconds_count", priority=priority) == 2


def test_a_client_says_it_is_bulk(busy, colours):
    with Client(busy.target) as client:
        held = client.segment_many([colours] * 2, priority="bulk")
        first = threading.Thread(target=next, args=(held,))
        first.start()
        busy.until(lambda: busy.server.admission.inflight_bulk == 2)
        (refused,) = client.segment_many([colours], priority="bulk", on_error="return")
        assert isinstance(refused, errors.QueueFullError) and "at most 2 bulk" in str(refused)
        with pytest.raises(errors.ConfigError, match="priority must be one of interactive, bulk, got 'low'"):
            client.segment(colours, priority="low")
        busy.runner.gate.set()
        first.join(LONG_S)
        assert len(list(held)) == 1
        assert client.segment(colours).mask.shape == colours.shape[:2]


def test_a_bulk_batch_of_the_largest_size_is_always_admitted(serving, colours):
    running = serving(queue_limit=1, max_batch=4, bulk_share=0.1)
    images = np.stack([colours] * 4)
    message = oip.ModelInferRequest(
        inputs=[oip.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=images.shape)],
        raw_input_contents=[images.tobytes()],
        parameters={"priority": oip.InferParameter(uint64_param=2)},
    )
    with grpc.insecure_channel(running.target) as channel:
        assert oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message).outputs
    assert running.sample("weakseg_priority_requests_total", priority="bulk") == 4


@pytest.mark.parametrize(
    ("value", "priority"),
    [({"uint64_param": 0}, "interactive"), ({"int64_param": 1}, "interactive"), ({"int64_param": 7}, "bulk")],
)
def test_priorities_of_the_open_inference_protocol_are_tritons(serving, colours, value, priority):
    running = serving()
    message = oip.ModelInferRequest(
        inputs=[oip.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=(1, *colours.shape))],
        raw_input_contents=[colours.tobytes()],
        parameters={"priority": oip.InferParameter(**value)},
    )
    with grpc.insecure_channel(running.target) as channel:
        assert oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message).outputs
    assert running.sample("weakseg_priority_requests_total", priority=priority) == 1


def test_bulk_images_leave_the_pools_to_others(serving, colours):
    """With one thread: while a bulk image is decoded, an interactive one comes, and is decoded before the next."""
    running = serving()
    pipeline, model = running.server.pipeline, running.server.models.get("toy", "1").model
    decoded, gate = [], threading.Event()

    def job(name, priority):
        def image():
            decoded.append(name)
            assert gate.wait(LONG_S)
            return colours

        return Job("toy", "1", model, image, model.request(), size=colours.shape[:2], priority=priority)

    async def test():
        def start(name, priority):
            return asyncio.create_task(pipeline.segment(job(name, priority), lambda answer: answer))

        tasks = [start(name, "bulk") for name in "abc"]
        while not decoded:
            await asyncio.sleep(0.001)
        tasks.append(start("now", "interactive"))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*tasks)

    running.call(test())
    assert decoded == ["a", "now", "b", "c"]
