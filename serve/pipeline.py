"""What happens to one image: decode → batch → refine → finish → encode. No gRPC in here; all front ends drive this one.

The event loop only passes references. Decoding, masks and encoding run in two bounded thread pools, the network in the
batcher's. How many requests are inside is bounded (serve/admission.py), and so is what their pixels take
(serve/image_memory.py): until there is room, a request holds its message only. Decoded pixels are gone when the
network's input is made of them.

CRF and random walk have threads of their own, so that they keep no other mask waiting, and may have a budget: an
interactive request that has waited and been refined for so long gets the mask without them.

A pool has no more bulk requests than threads, so that an interactive one there waits for one of them to finish, not for
all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from serve.admission import Admission
from serve.batcher import BatchAnswer, Batcher, BatchRecord, Priority
from serve.drift import Windows
from serve.image_memory import ImageMemory, Lease
from serve.metrics import Metrics
from serve.pace import Pace
from serve.refining import Refiners
from weakseg.errors import (
    DataError,
    DeadlineTooShortError,
    ImageError,
    ModelFailedError,
    OutputUnsupportedError,
    ServiceError,
    WeaksegError,
)
from weakseg.image import SERVICE_FORMATS, check_pixels, probe
from weakseg.model import ON_CPU, Decoded, GraphOutputs, Model, Request
from weakseg.preprocess import fitted_size
from weakseg.result import Result
from weakseg.stopping import Check, StoppedError, go_on

if TYPE_CHECKING:  # an extra
    from serve.tracing import Trace, Tracing

# Of all images of a batch together. Measured with MobileNetV2: of 64 x 64 pixels a batch of 8 takes 0.82 of the time,
# of 128 x 128 0.95, of 256 x 256 1.14, of 384 x 384 1.19.
CPU_BATCH_PIXELS = 2**16

T = TypeVar("T")
U = TypeVar("U")
Image: TypeAlias = "bytes | NDArray[np.uint8]"
# What a pixel takes at the most, measured: the decoder's own image and ours; coefficients of a progressive JPEG;
# canvases of libwebp. Two masks of up to 254 classes and their encoding take less than that. They have the size of the
# whole image, so reduced decoding counts as much.
BYTES_PER_PIXEL = {"JPEG": 12, "PNG": 7, "WEBP": 16}
BYTES_PER_RAW_PIXEL = 7


@dataclass(frozen=True)
class Job:
    """One image for one model.

    name, version: of the model, for batch keys and metrics.
    image: a file in one of SERVICE_FORMATS, (H, W, 3) uint8 RGB, or what makes one of them in a thread.
    n_pixels: of an image that is no file; 0 = the file says it.
    deadline: on the clock of `time.monotonic`; None = none.
    ignore_orientation, reduced_decoding: of a file, see `Model.segment`. priority: see `serve.batcher.Batcher`.
    """

    name: str
    version: str
    model: Model
    image: Image | Callable[[], Image]
    request: Request
    _: KW_ONLY
    n_pixels: int = 0
    deadline: float | None = None
    ignore_orientation: bool = False
    reduced_decoding: bool = False
    priority: Priority = "interactive"
    trace: Trace | None = None

    def check_time(self) -> None:
        """Raises DeadlineTooShortError when nobody waits any more; a step that takes time asks before it starts."""
        if self.deadline is not None and self.deadline <= monotonic():
            raise DeadlineTooShortError("the deadline passed before the answer was ready: allow more time")


@dataclass(frozen=True)
class Answer:
    """seconds: queue, decode, infer, postprocess. batch_size: of several graphs, the smallest.

    max_batch_size, max_batch_delay_s: what it might have been, and how long it might have been waited for.
    """

    result: Result
    seconds: dict[str, float]
    batch_size: int
    max_batch_size: int
    max_batch_delay_s: float


class ModelRunError(Exception):
    """A loaded model failed on a request: our fault, so not in the error table, so INTERNAL."""


class Pipeline:
    """Start it on the event loop that uses it; `close` when no request is inside any more."""

    def __init__(
        self,
        metrics: Metrics,
        admission: Admission,
        *,
        threads: int,
        runner_threads: int,
        max_batch: int,
        max_delay_s: float,
        bulk_wait_s: float,
        execution_timeout_s: float | None,
        max_pixels: int,
        image_memory_bytes: int,
        refiners: Refiners,
        tracing: Tracing | None = None,
    ) -> None:
        self.admission = admission
        self.windows = Windows()
        self.pace = Pace()
        self.refiners = refiners
        self.image_memory = ImageMemory(image_memory_bytes, bulk_wait_s, metrics.set_image_memory)
        self._metrics = metrics
        self._max_batch, self._max_delay_s = max_batch, max_delay_s
        self._max_pixels = max_pixels
        self._tracing = tracing
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._finishers = ThreadPoolExecutor(threads, thread_name_prefix="finish")
        self._bulk_slots = {pool: asyncio.Semaphore(threads) for pool in (self._decoders, self._finishers)}
        # The batcher's own bound is never met from here: a request waits for one graph at a time.
        self._batcher = Batcher(
            workers=runner_threads,
            max_batch=max_batch,
            max_delay_s=max_delay_s,
            limit=admission.most,
            bulk_wait_s=bulk_wait_s,
            timeout_s=execution_timeout_s,
            on_batch=self._count_batch,
            on_depth=metrics.queue_depth.set,
        )
        metrics.hung.set_function(lambda: self.hung)

    @property
    def hung(self) -> int:
        """Executions that were given up and have not ended."""
        return self._batcher.hung

    def start(self) -> None:
        self._batcher.start()

    async def close(self) -> None:
        await self._batcher.close()
        for pool in (self._decoders, self._finishers):
            await asyncio.to_thread(pool.shutdown)
        await asyncio.to_thread(self.refiners.close)

    async def close_model(self, model: Model) -> None:
        """When no execution of its graphs is under way any more, such as for a caller that has gone.

        Never while one hangs: closing may wait for it.
        """
        await self._batcher.wait_running()
        if not self.hung:
            await asyncio.to_thread(model.close)

    async def segment(self, job: Job, encode: Callable[[Answer], T]) -> T:
        """The encoded answer to one image; `encode` runs in a thread.

        Raises:
            DrainingError, QueueFullError, RateLimitedError, ModelUnhealthyError: before anything was done.
            OutOfMemoryError: at any step.
            ImageError, DataError: the image cannot be used. DeadlineTooShortError: it waited too long.
            OutputUnsupportedError: the server lacks what an output needs.
        """
        with self.admission.request(1, job.model, job.priority), self.image_memory.lease(job.priority) as lease:
            await lease.take(await self._need(job, lease))
            self.admission.unread.check(inside=True)  # those before it, for which it has waited, may not have been read
            held = [await self._in(self._decoders, lease, self._decode, job)]
            return await self._segment(job, lease, held, partial(self._encode, job, encode))

    async def segment_all(
        self, jobs: Sequence[Job], check: Callable[[list[Decoded]], None], encode: Callable[[list[Answer]], T]
    ) -> T:
        """One encoded answer to several images, which are admitted together or not at all.

        The first that fails ends the others. `check` sees all images before any goes through a network, and may raise.

        Raises:
            As `segment`; an ImageError says which image it is.
        """
        priority = jobs[0].priority
        admitted = self.admission.request(len(jobs), jobs[0].model, priority)
        with admitted, self.image_memory.lease(priority) as lease:
            needs = await _together(_of_nth(i, self._need, job, lease) for i, job in enumerate(jobs))
            await lease.take(sum(needs))
            self.admission.unread.check(inside=True)
            decoded = await _together(
                _of_nth(i, self._in, self._decoders, lease, self._decode, job) for i, job in enumerate(jobs)
            )
            check(decoded)
            if len(jobs) == 1:  # encoded in the same thread
                return await self._segment(
                    jobs[0], lease, decoded, lambda answer: self._encode(jobs[0], encode, [answer])
                )
            held = [[image] for image in decoded]
            del decoded
            answers = await _together(
                self._segment(job, lease, images, _as_it_is) for job, images in zip(jobs, held, strict=True)
            )
            return await self._in(self._finishers, lease, self._encode, jobs[0], encode, answers)

    async def _need(self, job: Job, lease: Lease) -> int:
        """Bytes that the pixels of an image take at the most while it is inside.

        Raises:
            ImageError: what can be refused before it is decoded.
        """
        if job.n_pixels:
            return job.n_pixels * BYTES_PER_RAW_PIXEL
        return await self._in(self._decoders, lease, self._look, job)

    async def _segment(self, job: Job, lease: Lease, held: list[Decoded], then: Callable[[Answer], T]) -> T:
        """held: the image, which is taken out of it: the thread that is done with its arrays gives them back.

        To unmap megabytes takes milliseconds, which the event loop does not have.
        """
        runs = {}
        for graph in job.model.graphs_for(job.request):
            runs[graph] = await self._run(job, graph, held[0])
        for stage in ("queue_s", "infer_s"):
            self._observe(job, stage.removesuffix("_s"), sum(getattr(run, stage) for run in runs.values()))
        self._metrics.queue_seconds.labels(job.priority).observe(sum(run.queue_s for run in runs.values()))
        refined = await self._refined(job, lease, held[0], dict(runs)) if job.request.refines else []
        return await self._in(self._finishers, lease, self._answer, job, held, runs, refined, then)

    async def _refined(self, job: Job, lease: Lease, decoded: Decoded, runs: dict[str, BatchAnswer]) -> list[Answer]:
        """The answer, for a thread to take out of the list; empty = it took too long."""
        work = partial(self._refine, job, decoded, runs)
        refined = await self.refiners.run(job.priority, work, lease.keep_until)
        if not refined:
            self._metrics.refinements_cut.labels(job.name, job.version).inc()
        return refined or []

    async def _run(self, job: Job, graph: str, decoded: Decoded) -> BatchAnswer:
        outputs = job.model.outputs_of(graph, decoded, job.request)
        # The model itself, too: a version may be replaced while images wait for the one that they were checked against.
        key = (job.name, job.version, graph, job.model, outputs, decoded.prepared.shape)
        run = partial(job.model.runner.run, graph, outputs=outputs)
        beside = None if job.model.beside is None else partial(job.model.beside.run, graph, outputs=outputs)
        deadline = job.deadline
        if deadline is not None:
            deadline -= self.pace.expected_s(job.model, (graph, decoded.prepared.shape), monotonic())
        try:
            return await self._batcher.submit(
                key,
                decoded.prepared,
                run,
                beside,
                most=most_of(job.model, decoded.prepared.shape, self._max_batch),
                deadline=deadline,
                priority=job.priority,
                member=job.trace,
            )
        except ModelFailedError as error:
            raise ModelRunError(str(error)) from error

    def _look(self, job: Job) -> int:
        """`_need` of what may be a file. In a thread: only to copy 30 MiB out of a message takes milliseconds."""
        image = job.image() if callable(job.image) else job.image
        if not isinstance(image, bytes):
            return image.size // 3 * BYTES_PER_RAW_PIXEL
        header = probe(image, formats=SERVICE_FORMATS)
        fitted_size(*header.oriented_size, job.model.manifest.input)  # refuses what `_decode` would refuse later
        check_pixels(header, self._max_pixels)
        return header.n_pixels * BYTES_PER_PIXEL[header.format]

    def _decode(self, job: Job) -> Decoded:
        job.check_time()
        started = monotonic()
        decoded = job.model.decode(
            job.image() if callable(job.image) else job.image,
            max_pixels=self._max_pixels,
            formats=SERVICE_FORMATS,
            ignore_orientation=job.ignore_orientation,
            reduced_decoding=job.reduced_decoding,
        )
        self._end(job, "decode", started)
        return replace(decoded, rgb=None)

    def _refine(self, job: Job, decoded: Decoded, runs: dict[str, BatchAnswer], check: Check) -> list[Answer]:
        """Empty when it was stopped: here, so that what its frames hold is given back by this thread."""
        try:
            job.check_time()
            return [self._finish(job, decoded, runs, check)]
        except StoppedError:
            return []

    def _answer(
        self,
        job: Job,
        held: list[Decoded],
        runs: dict[str, BatchAnswer],
        refined: list[Answer],
        then: Callable[[Answer], T],
    ) -> T:
        try:
            job.check_time()
            answer = refined.pop() if refined else self._unrefined(job, held[0], runs)
            window = self.windows.of(job.model)
            if window is not None:
                window.add(held[0].prepared, answer.result.scores)
            job.check_time()
            return then(answer)
        finally:
            held.clear()
            runs.clear()

    def _unrefined(self, job: Job, decoded: Decoded, runs: dict[str, BatchAnswer]) -> Answer:
        """Of a request that is to be refined: what it would get with refine="none", and the mark that says so."""
        answer = self._finish(replace(job, request=job.request.unrefined()), decoded, runs)
        return replace(answer, result=replace(answer.result, refinement_cut_short=job.request.refines))

    def _finish(self, job: Job, decoded: Decoded, runs: dict[str, BatchAnswer], check: Check = go_on) -> Answer:
        started = monotonic()
        result = _result(job, decoded, {graph: run.outputs for graph, run in runs.items()}, check)
        check()  # not counted when nobody takes it
        seconds = {
            "queue": sum(run.queue_s for run in runs.values()),
            "decode": decoded.seconds,
            "infer": sum(run.infer_s for run in runs.values()),
            "postprocess": self._end(job, "postprocess", started),
        }
        most = most_of(job.model, decoded.prepared.shape, self._max_batch)
        return Answer(result, seconds, min(run.batch_size for run in runs.values()), most, self._max_delay_s)

    def _encode(self, job: Job, encode: Callable[[U], T], answered: U) -> T:
        started = monotonic()
        encoded = encode(answered)
        self._end(job, "encode", started)
        return encoded

    async def _in(self, pool: ThreadPoolExecutor, lease: Lease, function: Callable[..., T], *args: Any) -> T:
        async with self._bulk_slots[pool] if lease.priority == "bulk" else nullcontext():
            work = pool.submit(function, *args)
            try:
                return await asyncio.wrap_future(work)
            except asyncio.CancelledError:
                lease.keep_until(work)
                raise

    def _count_batch(self, record: BatchRecord) -> None:
        name, version, graph, model, _, shape = record.key
        self.admission.breakers.ended(model, record.error)
        if record.error is None:
            self.pace.ran(model, (graph, shape), record.seconds, monotonic())
        self._metrics.executions.labels(name, version).inc()
        self._metrics.images.labels(name, version).inc(record.size)
        self._metrics.batch_size.labels(name, version).observe(record.size)
        if self._tracing is not None:
            about = {"weakseg.graph": graph, "weakseg.batch_size": record.size}
            failed = record.error is not None
            self._tracing.batch(record.members, record.started, record.seconds, failed=failed, attributes=about)

    def _end(self, job: Job, stage: str, started: float) -> float:
        """The seconds that a stage took, which ends now."""
        seconds = monotonic() - started
        self._observe(job, stage, seconds)
        if job.trace is not None:
            job.trace.stage(stage, started, seconds)
        return seconds

    def _observe(self, job: Job, stage: str, seconds: float) -> None:
        exemplar = None if job.trace is None else job.trace.exemplar
        self._metrics.stage_seconds.labels(stage).observe(seconds, exemplar)
        if stage != "queue":
            self.admission.worked(seconds)


def most_of(model: Model, shape: tuple[int, ...], max_batch: int) -> int:
    """Images of this (height, width, ...) in a batch: on a CPU, large ones are faster one by one."""
    if model.runner.provider != ON_CPU:
        return max_batch
    return max(1, min(CPU_BATCH_PIXELS // (shape[0] * shape[1]), max_batch))


async def _of_nth(i: int, step: Callable[..., Awaitable[T]], *args: Any) -> T:
    """A step for one image of several."""
    try:
        return await step(*args)
    except ImageError as error:
        raise ImageError(f"image {i}: {error}", error.reason) from error


async def _together(steps: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What the steps give, in their order; when one raises, the others are cancelled before that error goes on."""
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _as_it_is(answer: Answer) -> Answer:
    return answer


def _result(job: Job, decoded: Decoded, outputs: GraphOutputs, check: Check) -> Result:
    """`Model.finish`, its errors as a client should see them."""
    try:
        return job.model.finish(decoded, outputs, job.request, check)
    except ModelFailedError as error:
        raise ModelRunError(str(error)) from error
    except (ServiceError, DataError):
        raise
    except WeaksegError as error:  # a package is not installed, or the manifest asks for what cannot be
        raise OutputUnsupportedError(f"this server cannot compute {', '.join(job.request.outputs)}: {error}") from error
