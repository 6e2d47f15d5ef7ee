"""Memory for images: who waits, who goes first, and that nothing is left; alone and in a whole server."""

import asyncio
import io
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serve.image_memory import ImageMemory
from serve.inference import grpc_inference_service_pb2 as oip
from serve.inference import grpc_inference_service_pb2_grpc as oip_grpc
from serve.job import Job
from serve.steps import BYTES_PER_PIXEL, BYTES_PER_RAW_PIXEL
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
MIB = 2**20


class Told:
    """What a memory says about itself, and that it never breaks its promise."""

    def __init__(self, limit, bulk_wait_s=LONG_S):
        self.memory = ImageMemory(limit, bulk_wait_s, self.look)
        self.limit, self.most, self.now = limit, 0, (0, 0)

    def look(self, taken, waiting):
        self.most, self.now = max(self.most, taken), (taken, waiting)


async def use(memory, n_bytes, priority="interactive", then=None):
    with memory.lease(priority) as lease:
        await lease.take(n_bytes)
        if then is not None:
            await then()


def test_takers_go_in_order_of_arrival_and_interactive_ones_first():
    async def test():
        told, order, gate = Told(10), [], asyncio.Event()

        def start(name, n_bytes, priority="interactive"):
            async def then():
                order.append(name)
                await gate.wait()

            return asyncio.create_task(use(told.memory, n_bytes, priority, then))

        tasks = [
            start("first", 6),
            start("bulk", 1, "bulk"),
            start("bulk, large", 4, "bulk"),
            start("large", 9),
            start("fits", 1),
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == ["first", "bulk"] and told.now == (7, 3), "a small one does not pass a large one"
        gate.set()
        await asyncio.gather(*tasks)
        assert order == ["first", "bulk", "large", "fits", "bulk, large"]
        assert told.now == (0, 0) and told.most == 10

    asyncio.run(test())


def test_bulk_has_its_turn_once_it_has_waited():
    async def test():
        told, order = Told(1, bulk_wait_s=0.0), []

        async def then():
            await asyncio.sleep(0)

        async def named(name, priority):
            with told.memory.lease(priority) as lease:
                await lease.take(1)
                order.append(name)
                await then()

        await asyncio.gather(named("a", "interactive"), named("b", "bulk"), named("c", "interactive"))
        assert order == ["a", "b", "c"]

    asyncio.run(test())


def test_what_is_larger_than_the_memory_goes_alone():
    async def test():
        told, together = Told(10), []

        async def then():
            together.append(told.now[0])
            await asyncio.sleep(0)
            assert told.now[0] == 25, "nobody beside it"

        small = asyncio.create_task(use(told.memory, 3, then=lambda: asyncio.sleep(0)))
        large = asyncio.create_task(use(told.memory, 25, then=then))
        after = asyncio.create_task(use(told.memory, 3))
        await asyncio.gather(small, large, after)
        assert together == [25] and told.now == (0, 0)

    asyncio.run(test())


def test_a_thread_that_goes_on_keeps_what_its_caller_took():
    async def test():
        told, gate = Told(10), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            with told.memory.lease("interactive") as lease:
                await lease.take(7)
                lease.keep_until(pool.submit(gate.wait, LONG_S))
                pending = pool.submit(print)
                lease.keep_until(pending)
            await asyncio.sleep(0)
            assert told.now == (7, 0)
            assert pending.cancel()
            await asyncio.sleep(0)
            assert told.now == (7, 0), "the other one still runs"
            gate.set()
        await asyncio.sleep(0)
        assert told.now == (0, 0)

    asyncio.run(test())


@given(
    sizes=st.lists(st.integers(1, 15), min_size=1, max_size=25),
    bulk=st.sets(st.integers(0, 24)),
    seed=st.integers(0, 2**32 - 1),
)
def test_nothing_is_left_whoever_is_cancelled_when(sizes, bulk, seed):
    """Sizes up to 15 of 10: an image alone may be larger than the memory."""

    async def test():
        told, turns, done = Told(10), random.Random(seed), []

        async def then():
            assert told.now[0] <= max(10, *sizes)
            for _ in range(turns.randrange(4)):
                await asyncio.sleep(0)
            if turns.random() < 0.1:
                raise ValueError

        async def one(i):
            for _ in range(turns.randrange(5)):
                await asyncio.sleep(0)
            await use(told.memory, sizes[i], "bulk" if i in bulk else "interactive", then)
            done.append(i)

        tasks = [asyncio.create_task(one(i)) for i in range(len(sizes))]
        cancelled = set()
        for i in range(len(sizes)):
            if turns.random() < 0.4:
                cancelled.add(i)
                tasks[i].cancel()
            if turns.random() < 0.5:
                await asyncio.sleep(0)
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LONG_S)
        for i, result in enumerate(results):
            assert i in done or i in cancelled or isinstance(result, ValueError)
        assert told.now == (0, 0) == (told.memory.taken_bytes, len(told.memory._line))
        assert told.most <= max(10, *sizes)

    asyncio.run(test())


def flat_png(width, height):
    """Megapixels in some kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def request(data, **options):
    outputs = [pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)]
    return pb.SegmentRequest(image=pb.Image(encoded=data), outputs=outputs, **options)


@pytest.fixture
def busy(serving):
    """A server with 1 MiB for images, whose network waits."""
    running = serving(image_memory_mib=1, max_batch=4, queue_limit=8)
    running.runner.gate.clear()
    return running


def waiting(running, n):
    running.until(lambda: running.sample("weakseg_image_memory_waiting") == n)


def test_a_request_waits_for_memory_and_leaves_the_line_when_it_is_cancelled(busy):
    large, small = flat_png(300, 250), flat_png(8, 8)  # two of the large ones are more than there is
    with grpc.insecure_channel(busy.target) as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        first = stub.Segment.future(request(large))
        busy.until(lambda: busy.sample("weakseg_queue_depth") + len(busy.runner.batches) == 1)
        taken = 300 * 250 * BYTES_PER_PIXEL["PNG"]
        assert busy.sample("weakseg_image_memory_bytes") == taken
        second = stub.Segment.future(request(large))
        waiting(busy, 1)
        third = stub.Segment.future(request(small))
        waiting(busy, 2)
        late = stub.Segment.future(request(large), timeout=0.2)
        assert late.exception(LONG_S).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        waiting(busy, 2)
        assert second.cancel()
        waiting(busy, 0)
        assert busy.sample("weakseg_image_memory_bytes") == taken + 64 * BYTES_PER_PIXEL["PNG"]
        busy.runner.gate.set()
        assert first.result(LONG_S).image_width == 300 and third.result(LONG_S).image_width == 8
    busy.until(lambda: busy.server.admission.inflight == 0)
    assert busy.sample("weakseg_image_memory_bytes") == 0


@pytest.mark.parametrize("n", [1, 3])
def test_images_of_one_request_take_their_memory_together(busy, n):
    """Three are more than there is: they wait until they are alone, and go."""
    file = flat_png(300, 250)
    message = oip.ModelInferRequest(
        model_name="toy",
        inputs=[oip.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[n])],
        raw_input_contents=[b"".join(len(file).to_bytes(4, "little") + file for _ in range(n))],
    )
    with grpc.insecure_channel(busy.target) as channel:
        stub = oip_grpc.GRPCInferenceServiceStub(channel)
        calls = [stub.ModelInfer.future(message) for _ in range(2)]
        waiting(busy, 1)
        assert busy.sample("weakseg_image_memory_bytes") == n * 300 * 250 * BYTES_PER_PIXEL["PNG"]
        busy.runner.gate.set()
        assert all(call.result(LONG_S).outputs for call in calls)
    busy.until(lambda: busy.sample("weakseg_image_memory_bytes") == 0)


def test_raw_pixels_take_memory_for_their_masks(busy, colours):
    n_bytes = colours.size // 3 * BYTES_PER_RAW_PIXEL
    height, width = colours.shape[:2]
    raw = pb.RawImage(width=width, height=height, rgb=colours.tobytes())
    typed = oip.InferTensorContents(uint_contents=colours.ravel().tolist())
    tensor = oip.ModelInferRequest.InferInputTensor(
        name="image", datatype="UINT8", shape=[1, *colours.shape], contents=typed
    )
    with grpc.insecure_channel(busy.target) as channel:
        asked = request(b"")
        asked.image.raw.CopyFrom(raw)
        one = pb_grpc.SegmentationServiceStub(channel).Segment.future(asked)
        busy.until(lambda: busy.sample("weakseg_image_memory_bytes") == n_bytes)
        other = oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(
            oip.ModelInferRequest(model_name="toy", inputs=[tensor])
        )
        busy.until(lambda: busy.sample("weakseg_image_memory_bytes") == 2 * n_bytes)
        busy.runner.gate.set()
        assert one.result(LONG_S).outputs and other.result(LONG_S).outputs


@pytest.mark.parametrize("max_batch", [8, 1], ids=["in pools", "in one thread"])
def test_what_a_cancelled_request_decodes_is_counted_until_its_thread_is_done(serving, colours, max_batch):
    running = serving(image_memory_mib=1, max_batch=max_batch)
    pipeline, model = running.server.pipeline, running.server.models.get("toy", "1").model
    decoding, gate = threading.Event(), threading.Event()

    def image():
        decoding.set()
        assert gate.wait(LONG_S)
        return colours

    async def test():
        job = Job("toy", "1", model, image, model.request(), size=(20, 50))
        task = asyncio.create_task(pipeline.segment(job, lambda answer: answer))
        await asyncio.to_thread(decoding.wait, LONG_S)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() and pipeline.admission.inflight == 0
        assert pipeline.image_memory.taken_bytes == 1000 * BYTES_PER_RAW_PIXEL
        gate.set()
        while pipeline.image_memory.taken_bytes:
            await asyncio.sleep(0.001)

    running.call(test())


def test_an_image_is_refused_before_it_waits(busy):
    with grpc.insecure_channel(busy.target) as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        inside = [stub.Segment.future(request(flat_png(300, 250))) for _ in range(2)]
        waiting(busy, 1)
        for data in (flat_png(10000, 8001), b"\x89PNG\r\n\x1a\n", np.arange(9).tobytes()):
            with pytest.raises(grpc.RpcError) as refused:
                stub.Segment(request(data), timeout=LONG_S)
            assert refused.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)
        busy.runner.gate.set()
        assert all(call.result(LONG_S).outputs for call in inside)
