"""Refinement in a whole server: threads of its own, a budget, and how it ends early."""

import asyncio
import threading
import weakref
from contextlib import contextmanager, suppress
from dataclasses import replace

import grpc
import numpy as np
import pytest

import weakseg
from serve.inference import grpc_inference_service_pb2 as oip
from serve.inference import grpc_inference_service_pb2_grpc as oip_grpc
from serve.job import Job
from serve.refining import Refiners
from weakseg.classes import ClassTable
from weakseg.client import Client
from weakseg.manifest import Graph
from weakseg.masks.png import provenance_of
from weakseg.model import Model
from weakseg.recipe import CrfConfig, WalkConfig
from weakseg.stopping import StoppedError
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc
from weakseg.wire import labels_from_mask

LONG_S = 60.0
NO_TIME_MS = 1e-6
CLASSES = ClassTable(("red", "green", "blue"))


@pytest.fixture
def photo():
    """Three classes whose borders noise blurs: each refinement makes another mask of it."""
    rng = np.random.default_rng(0)
    image = np.full((40, 56, 3), 110.0)
    image[4:22, 5:27] = [230, 20, 30]
    image[17:37, 24:45] = [40, 220, 10]
    image[3:15, 38:53] = [20, 30, 240]
    return (image + rng.normal(0, 40, image.shape)).clip(0, 255).astype(np.uint8)


@contextmanager
def stub_of(running):
    with grpc.insecure_channel(running.target) as channel:
        yield pb_grpc.SegmentationServiceStub(channel)


def request(data, kind="PSEUDO_MASK", refinement="CRF", priority="UNSPECIFIED", **fields):
    fields = {"refinement": getattr(pb, f"REFINEMENT_{refinement}")} | fields
    spec = pb.OutputSpec(kind=getattr(pb, f"OUTPUT_KIND_{kind}"), **fields)
    priority = getattr(pb, f"PRIORITY_{priority}")
    return pb.SegmentRequest(image=pb.Image(encoded=data), outputs=[spec], priority=priority)


class WithAffinities:
    """A real runner, and affinities of 1 for any image: in a walk over them everything reaches everything."""

    def __init__(self, inner):
        self.inner, self.provider, self.close = inner, inner.provider, inner.close

    def run(self, graph, images, outputs=None):
        if graph != "affinity":
            return self.inner.run(graph, images, outputs)
        n, height, width, _ = images.shape
        return {"affinities": np.ones((n, 34, -(-height // 8), -(-width // 8)), np.float32)}


def endless(path):
    """For `serving(load=...)`: the model with a CRF and a random walk that do not end by themselves."""
    model = weakseg.load(path, threads=1)
    manifest = replace(
        model.manifest,
        graphs=model.manifest.graphs | {"affinity": Graph("affinity.onnx", ("affinities",), stride=8)},
        pseudo_label=replace(model.manifest.pseudo_label, crf=CrfConfig(iterations=10**12)),
        walk=WalkConfig(steps=10**12),
    )
    return Model(replace(model.bundle, manifest=manifest), WithAffinities(model.runner))


def cut(running):
    return running.sample("weakseg_refinements_cut_short_total", model="toy", version="1")


def n_inferred(running):
    return running.sample("weakseg_stage_duration_seconds_count", stage="infer")


@contextmanager
def busy_refiners(running):
    """While the only thread for refinement has something else to do."""
    refiners, begun, gate = running.server.pipeline.refiners, threading.Event(), threading.Event()

    def work(check):
        begun.set()
        assert gate.wait(LONG_S)

    held = asyncio.run_coroutine_threadsafe(refiners.run("bulk", work), running._loop)
    assert begun.wait(LONG_S)
    try:
        yield
    finally:
        gate.set()
        held.result(LONG_S)


def assert_the_refiner_gets_free(running):
    assert running.call(running.server.pipeline.refiners.run("bulk", lambda check: 7)) == 7


def test_without_a_budget_the_mask_is_the_offline_mask(serving, model, photo, png):
    running = serving()
    with stub_of(running) as stub:
        for name in ("CRF", "NONE", "UNSPECIFIED"):
            output = stub.Segment(request(png(photo), refinement=name)).outputs[0]
            refine = None if name == "UNSPECIFIED" else name.lower()
            expected = model.segment(photo, outputs=["pseudo_mask"], refine=refine)
            np.testing.assert_array_equal(labels_from_mask(output.mask, CLASSES), expected.mask)
            assert provenance_of(output.mask.data) == provenance_of(expected.mask_png("pseudo_mask"))
            assert output.refinement == getattr(pb, f"REFINEMENT_{expected.refined_by.upper()}")
            assert not output.refinement_cut_short
        output = stub.Segment(request(png(photo), kind="SEGMENTATION")).outputs[0]
        assert (output.refinement, output.refinement_cut_short) == (pb.REFINEMENT_UNSPECIFIED, False)
    assert cut(running) == 0


@pytest.mark.parametrize("encoding", ["PNG_INDEX", "COCO_RLE"])
def test_without_time_the_mask_is_the_one_without_refinement_and_says_so(serving, model, photo, png, encoding):
    running = serving(refine_budget_ms=NO_TIME_MS)
    refined, plain = (model.segment(photo, outputs=["pseudo_mask"], refine=name).mask for name in ("crf", "none"))
    assert not np.array_equal(refined, plain), "the picture must show a difference"
    fields = {"mask_encoding": getattr(pb, f"MASK_ENCODING_{encoding}"), "quality": True}
    with stub_of(running) as stub:
        short, none = (
            stub.Segment(request(png(photo), refinement=name, **fields)).outputs[0] for name in ("CRF", "NONE")
        )
    np.testing.assert_array_equal(labels_from_mask(short.mask, CLASSES), plain)
    assert (short.refinement, short.refinement_cut_short) == (pb.REFINEMENT_NONE, True)
    assert (none.refinement, none.refinement_cut_short) == (pb.REFINEMENT_NONE, False)
    assert short.quality == none.quality
    if encoding == "PNG_INDEX":
        assert provenance_of(short.mask.data) == provenance_of(none.mask.data) | {"refinement_cut_short": True}
    assert cut(running) == 1


def test_a_client_is_told(serving, photo):
    running = serving(refine_budget_ms=NO_TIME_MS)
    with Client(running.target) as client:
        for encoding in ("png", "rle"):
            made = client.segment(photo, outputs=("pseudo_mask",), refine="crf", mask_encoding=encoding)
            assert (made.refined_by, made.refinement_cut_short) == ("none", True)
            assert provenance_of(made.mask_png())["refinement_cut_short"] is True
        made = client.segment(photo, outputs=("pseudo_mask",), refine="none")
        assert (made.refined_by, made.refinement_cut_short) == ("none", False)
        assert client.segment(photo, outputs=("segmentation",)).refined_by is None


def test_other_outputs_of_a_request_that_is_cut_short_stay_the_same(serving, model, photo, png):
    running = serving(refine_budget_ms=NO_TIME_MS)
    message = request(png(photo))
    message.outputs.add(kind=pb.OUTPUT_KIND_SEGMENTATION)
    with stub_of(running) as stub:
        outputs = stub.Segment(message).outputs
    expected = model.segment(photo, outputs=["segmentation"]).mask
    np.testing.assert_array_equal(labels_from_mask(outputs[1].mask, CLASSES), expected)
    assert [output.refinement_cut_short for output in outputs] == [True, False]


@pytest.mark.parametrize(("budget_ms", "names"), [(0.0, "crf,crf"), (NO_TIME_MS, "none,none")])
def test_the_open_inference_protocol_says_it_per_image(serving, model, photo, budget_ms, names):
    running = serving(refine_budget_ms=budget_ms)
    images = np.stack([photo, photo[::-1]])
    message = oip.ModelInferRequest(
        inputs=[oip.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=images.shape)],
        outputs=[oip.ModelInferRequest.InferRequestedOutputTensor(name="pseudo_mask")],
        raw_input_contents=[images.tobytes()],
        parameters={"refinement": oip.InferParameter(string_param="crf")},
    )
    with grpc.insecure_channel(running.target) as channel:
        response = oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message)
    masks = np.frombuffer(response.raw_output_contents[0], np.uint8).reshape(images.shape[:3])
    for image, mask, name in zip(images, masks, names.split(","), strict=True):
        np.testing.assert_array_equal(mask, model.segment(image, outputs=["pseudo_mask"], refine=name).mask)
    parameters = response.outputs[0].parameters
    assert parameters["refinement"].string_param == names
    assert parameters["refinement_cut_short"].bool_param == ("none" in names)
    assert cut(running) == names.count("none")


@pytest.mark.parametrize("refinement", ["CRF", "RANDOM_WALK", "RANDOM_WALK_CRF"])
def test_a_refinement_without_end_is_stopped_when_its_budget_is_spent(serving, model, photo, png, refinement):
    running = serving(refine_budget_ms=50.0, load=endless)
    with stub_of(running) as stub:
        output = stub.Segment(request(png(photo), refinement=refinement), timeout=LONG_S).outputs[0]
    expected = model.segment(photo, outputs=["pseudo_mask"], refine="none").mask
    np.testing.assert_array_equal(labels_from_mask(output.mask, CLASSES), expected)
    assert (output.refinement, output.refinement_cut_short) == (pb.REFINEMENT_NONE, True)
    assert_the_refiner_gets_free(running)
    assert running.sample("weakseg_stage_duration_seconds_count", stage="postprocess") == 1


@pytest.mark.parametrize("code", ["DEADLINE_EXCEEDED", "CANCELLED"])
def test_a_refinement_without_end_is_stopped_when_nobody_waits_any_more(serving, photo, png, code):
    running = serving(load=endless)
    with stub_of(running) as stub:
        call = stub.Segment.future(request(png(photo)), timeout=1.0 if code == "DEADLINE_EXCEEDED" else LONG_S)
        running.until(lambda: n_inferred(running) == 1)
        if code == "CANCELLED":
            call.cancel()
            assert call.cancelled()
        else:
            assert call.exception(LONG_S).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    running.until(lambda: running.server.admission.inflight == 0)
    assert_the_refiner_gets_free(running)
    assert cut(running) == 0


def test_what_is_refined_without_its_caller_is_counted_until_its_thread_is_done(serving, photo, png, monkeypatch):
    """Masks have the size of the image, and a thread is stopped between its steps only."""
    running = serving()
    memory = running.server.pipeline.image_memory
    refining, gate = threading.Event(), threading.Event()

    def step(pipeline, job, decoded, runs, check):
        refining.set()
        assert gate.wait(LONG_S)
        check()
        raise AssertionError("its caller has gone")

    monkeypatch.setattr("serve.steps.Steps.refine", step)
    with stub_of(running) as stub:
        call = stub.Segment.future(request(png(photo)), timeout=LONG_S)
        assert refining.wait(LONG_S)
        call.cancel()
    running.until(lambda: running.server.admission.inflight == 0)
    assert memory.taken_bytes > 0
    gate.set()
    running.until(lambda: memory.taken_bytes == 0)


def test_segmentations_are_answered_while_pseudo_masks_wait_for_the_crf(serving, photo, png):
    running = serving()
    with stub_of(running) as stub, busy_refiners(running):
        waiting = [stub.Segment.future(request(png(photo))) for _ in range(4)]
        running.until(lambda: n_inferred(running) == 4)
        for kind, refinement in (("SEGMENTATION", "UNSPECIFIED"), ("PSEUDO_MASK", "NONE"), ("CAM", "UNSPECIFIED")):
            assert stub.Segment(request(png(photo), kind, refinement), timeout=LONG_S).outputs
        assert not any(call.done() for call in waiting)
        assert running.server.admission.inflight == 4
        # The budget holds for those that wait, too; here there is none.
        late = stub.Segment.future(request(png(photo)), timeout=0.3)
        gone = stub.Segment.future(request(png(photo)))
        running.until(lambda: running.server.admission.inflight == 6)
        gone.cancel()
        assert late.exception(LONG_S).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        running.until(lambda: running.server.admission.inflight == 4)
    with stub_of(running) as stub:  # the channel of those calls is closed: they are gone, too
        assert stub.Segment(request(png(photo)), timeout=LONG_S).outputs[0].refinement == pb.REFINEMENT_CRF
    running.until(lambda: running.server.admission.inflight == 0)


def test_the_budget_counts_the_wait_for_a_thread(serving, model, photo, png):
    running = serving(refine_budget_ms=50.0)
    with stub_of(running) as stub, busy_refiners(running):
        output = stub.Segment(request(png(photo)), timeout=LONG_S).outputs[0]
    assert (output.refinement, output.refinement_cut_short) == (pb.REFINEMENT_NONE, True)
    expected = model.segment(photo, outputs=["pseudo_mask"], refine="none").mask
    np.testing.assert_array_equal(labels_from_mask(output.mask, CLASSES), expected)
    assert running.server.admission.inflight == 0


def test_the_compilation_of_kernels_does_not_count(serving, photo, png):
    running = serving(refine_budget_ms=NO_TIME_MS)
    warm = running.server.pipeline.refiners.warm
    running.until(warm.is_set)
    warm.clear()
    with stub_of(running) as stub:
        call = stub.Segment.future(request(png(photo)))
        running.until(lambda: n_inferred(running) == 1)
        assert stub.Segment(request(png(photo), refinement="NONE"), timeout=LONG_S).outputs
        assert not call.done() and cut(running) == 0
        running._loop.call_soon_threadsafe(warm.set)
        assert call.result(LONG_S).outputs[0].refinement_cut_short


def test_bulk_requests_are_refined_after_others_and_never_cut_short(serving, photo):
    """With one thread, and a bulk image in it: the interactive one is next, then the others in their order."""
    running = serving(refine_budget_ms=LONG_S * 1000)
    pipeline, model = running.server.pipeline, running.server.models.get("toy", "1").model
    asked = model.request(outputs=["pseudo_mask"], refine="crf")
    finished = []

    async def segment(name, priority):
        job = Job("toy", "1", model, photo, asked, priority=priority)
        await pipeline.segment(job, lambda answer: finished.append((name, answer.result.refined_by)))

    async def start(name, priority, n):
        task = asyncio.create_task(segment(name, priority))
        while n_inferred(running) < n:
            await asyncio.sleep(0.001)
        return task

    with busy_refiners(running):
        jobs = [("a", "bulk"), ("b", "bulk"), ("now", "interactive"), ("c", "bulk")]
        tasks = [running.call(start(*job, n)) for n, job in enumerate(jobs, 1)]
        assert not finished
    running.call(_all(tasks))
    assert finished == [(name, "crf") for name in ("now", "a", "b", "c")]
    pipeline.refiners.budget_s = NO_TIME_MS / 1000
    for name, priority in (("bulk", "bulk"), ("short", "interactive")):
        running.call(segment(name, priority))
    assert finished[4:] == [("bulk", "crf"), ("short", "none")]


async def _all(tasks):
    await asyncio.gather(*tasks)


def test_images_that_are_cut_short_are_not_held_until_a_thread_is_free(serving, photo, png, monkeypatch):
    alive = weakref.WeakSet()
    decode = Model.decode

    def decode_and_watch(self, *args, **options):
        decoded = decode(self, *args, **options)
        alive.add(decoded)
        return decoded

    monkeypatch.setattr(Model, "decode", decode_and_watch)
    running = serving(refine_budget_ms=20.0)
    with stub_of(running) as stub, busy_refiners(running):
        assert all(stub.Segment(request(png(photo))).outputs[0].refinement_cut_short for _ in range(5))
        gone = stub.Segment.future(request(png(photo), priority="BULK"))
        running.until(lambda: n_inferred(running) == 6)
        gone.cancel()
        running.until(lambda: running.server.admission.inflight == 0)
        running.until(lambda: not alive)


@pytest.mark.parametrize("budget", [{}, {"refine_budget_ms": 5.0, "load": endless}])
def test_the_memory_of_a_refined_image_is_not_given_back_by_the_loop(serving, photo, png, freed_in, budget):
    running = serving(**budget)
    with stub_of(running) as stub:
        stub.Segment(request(png(photo)))
    running.until(lambda: freed_in)
    assert freed_in[0] != running._thread.name


def test_a_storm_of_endless_refinements_leaves_nothing_inside(serving, photo, png):
    running = serving(refine_budget_ms=5.0, load=endless)

    def storm(seed):
        rng = np.random.default_rng(seed)
        with grpc.insecure_channel(running.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = pb_grpc.SegmentationServiceStub(channel)
            for _ in range(12):
                message = request(png(photo), priority=rng.choice(["BULK", "INTERACTIVE"]))
                call = stub.Segment.future(message, timeout=rng.choice([0.01, 0.1, 0.3]))
                if rng.random() < 0.3:
                    threading.Event().wait(rng.random() / 20)
                    call.cancel()
                with suppress(grpc.RpcError, grpc.FutureCancelledError):
                    assert call.result().outputs[0].refinement_cut_short

    threads = [threading.Thread(target=storm, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    running.until(lambda: running.server.admission.inflight == running.server.admission.inflight_bulk == 0)
    assert_the_refiner_gets_free(running)
    with stub_of(running) as stub:
        assert stub.Segment(request(png(photo)), timeout=LONG_S).outputs[0].refinement_cut_short


@pytest.fixture
async def refiners():
    made = Refiners(1)
    made.warm.set()
    yield made
    made.close()


async def test_work_within_its_time_gives_what_it_gives(refiners):
    for budget_s in (None, LONG_S):
        refiners.budget_s = budget_s
        for priority in ("interactive", "bulk"):
            assert await refiners.run(priority, lambda check: (check(), 3)) == (None, 3)


async def test_work_beyond_its_time_is_left_and_stopped_at_its_next_check(refiners):
    refiners.budget_s, begun, stopped = 0.01, [], []

    def endless(check):
        begun.append(True)
        try:
            while True:
                check()
        except StoppedError:
            stopped.append(True)

    assert await refiners.run("interactive", endless) is None
    task = asyncio.create_task(refiners.run("bulk", endless))
    while len(begun) < 2:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await refiners.run("bulk", lambda check: len(stopped)) == 2


async def test_a_thread_that_cannot_be_started_costs_no_place(refiners, monkeypatch):
    def refuse(*args):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(refiners._threads, "submit", refuse)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="new thread"):
                await asyncio.wait_for(refiners.run("interactive", lambda check: 3), LONG_S)
    assert await asyncio.wait_for(refiners.run("interactive", lambda check: 3), LONG_S) == 3


async def test_an_error_of_the_work_is_its_own(refiners):
    def fail(check):
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        await refiners.run("interactive", fail)
    assert await refiners.run("interactive", lambda check: 3) == 3
