"""What happens to one image: look → decode → graphs → refine → finish → encode. No gRPC here; all front ends drive it.

The event loop only passes references. How many requests are inside is bounded (serve/admission.py), and so is what
their pixels take (serve/image_memory.py): until there is room, a request holds its message only. Then there are two
ways:

- An image that goes through its graphs alone, on one core, visits one thread of the batcher (serve/visit.py).
- Others are decoded in one pool, share executions of graphs in the batcher's, and are finished and encoded in another.
  Decoded pixels are gone when the network's input is made of them. CRF and random walk have threads of their own, so
  that they keep no other mask waiting, and may have a budget: an interactive request that has waited and been refined
  for so long gets the mask without them.

A pool has no more bulk requests than threads, so that an interactive one there waits for one of them to finish, not for
all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from serve.admission import Admission
from serve.batcher import BatchAnswer, Batcher, BatchRecord
from serve.image_memory import ImageMemory, Lease
from serve.job import Answer, Job, ModelRunError
from serve.metrics import Metrics
from serve.pace import Pace
from serve.refining import Refiners
from serve.steps import Arrays, Runs, Seen, Steps, most_of, run_graph
from serve.visit import Execution, Visit
from weakseg.errors import ImageError, ModelFailedError, TooManyPartsError
from weakseg.model import ON_CPU, Decoded, Model

if TYPE_CHECKING:  # an extra
    from serve.tracing import Tracing

# A file that the event loop may look at itself: a tenth of a millisecond, where a thread would cost several.
QUICK_BYTES, QUICK_PARTS = 256 * 2**10, 64

T = TypeVar("T")


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
        self.steps = Steps(metrics, admission, max_pixels=max_pixels, max_batch=max_batch, max_delay_s=max_delay_s)
        self.pace = Pace()
        self.refiners = refiners
        self.image_memory = ImageMemory(image_memory_bytes, bulk_wait_s, metrics.set_image_memory)
        self._metrics = metrics
        self._max_batch = max_batch
        self._runner_threads = runner_threads
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
            seen = await self._look(job, lease)
            await lease.take(seen.n_bytes)
            self.admission.unread.check(inside=True)  # those before it, for which it has waited, may not have been read
            return await self._segment_one(job, lease, seen, lambda _: None, encode)

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
            seen = await _together(_of_nth(i, self._look, job, lease) for i, job in enumerate(jobs))
            await lease.take(sum(one.n_bytes for one in seen))
            self.admission.unread.check(inside=True)
            if len(jobs) == 1:
                one = (jobs[0], lease, seen[0], lambda decoded: check([decoded]), lambda answer: encode([answer]))
                return await _of_nth(0, self._segment_one, *one)
            decoded = await _together(
                _of_nth(i, self._in, self._decoders, lease, self.steps.decode, job) for i, job in enumerate(jobs)
            )
            check(decoded)
            held = [[image] for image in decoded]
            del decoded
            answers = await _together(
                self._by_pools(job, lease, images, _as_it_is) for job, images in zip(jobs, held, strict=True)
            )
            return await self._in(self._finishers, lease, self.steps.encode, jobs[0], encode, answers)

    async def _look(self, job: Job, lease: Lease) -> Seen:
        """Raises ImageError for what can be refused before it is decoded."""
        if job.size is not None or (isinstance(job.image, bytes) and len(job.image) <= QUICK_BYTES):
            with suppress(TooManyPartsError):
                return self.steps.look(job, QUICK_PARTS)
        return await self._in(self._decoders, lease, self.steps.look, job)

    async def _segment_one(
        self, job: Job, lease: Lease, seen: Seen, check: Callable[[Decoded], object], encode: Callable[[Answer], T]
    ) -> T:
        then = partial(self.steps.encode, job, encode)
        if self._goes_alone(job, seen):
            return await self._visit(job, lease, seen, check, then)
        held = [await self._in(self._decoders, lease, self.steps.decode, job)]
        check(held[0])
        return await self._by_pools(job, lease, held, then)

    def _goes_alone(self, job: Job, seen: Seen) -> bool:
        """Whether its graphs may run on one core each, nothing shares them with it, and nothing keeps its thread."""
        model = job.model
        on_one_core = model.runner.provider == ON_CPU and (model.beside is not None or self._runner_threads == 1)
        return on_one_core and not job.request.refines and most_of(model, seen.shape, self._max_batch) == 1

    async def _visit(
        self, job: Job, lease: Lease, seen: Seen, check: Callable[[Decoded], object], then: Callable[[Answer], T]
    ) -> T:
        latest = self._latest(job, job.model.graphs_for(job.request), (*seen.shape, 3))
        visit = Visit(self.steps, job, check, then, latest)
        go = self._go
        try:
            # On one core beside others, so it need not be alone.
            await self._batcher.submit(
                ("visit",),
                visit,
                go,
                go,
                most=1,
                deadline=latest,
                priority=job.priority,
                member=visit,
                began=lambda: visit.graph_began,
            )
        except ModelFailedError as error:
            raise ModelRunError(str(error)) from error
        except asyncio.CancelledError:
            if not visit.over.cancel():
                lease.keep_until(visit.over)
            raise
        return visit.over.result()

    def _go(self, visits: list[Visit[Any]]) -> list[None]:
        """In a thread of the batcher. What comes of a visit is in itself."""
        for visit in visits:
            visit.go(lambda: self._batcher.inside <= 1)
        return [None] * len(visits)

    async def _by_pools(self, job: Job, lease: Lease, held: list[Decoded], then: Callable[[Answer], T]) -> T:
        """held: as `Steps.answer` has it."""
        runs = {}
        for graph in job.model.graphs_for(job.request):
            runs[graph] = await self._run(job, graph, held[0])
        self.steps.count_runs(job, runs)
        refined = await self._refined(job, lease, held[0], dict(runs)) if job.request.refines else []
        return await self._in(self._finishers, lease, self.steps.answer, job, held, runs, refined, then)

    async def _refined(self, job: Job, lease: Lease, decoded: Decoded, runs: Runs) -> list[Answer]:
        """The answer, for a thread to take out of the list; empty = it took too long."""
        work = partial(self.steps.refine, job, decoded, runs)
        refined = await self.refiners.run(job.priority, work, lease.keep_until)
        if not refined:
            self._metrics.refinements_cut.labels(job.name, job.version).inc()
        return refined or []

    async def _run(self, job: Job, graph: str, decoded: Decoded) -> BatchAnswer[Arrays]:
        outputs = job.model.outputs_of(graph, decoded, job.request)
        shape = decoded.prepared.shape
        # The model itself, too: a version may be replaced while images wait for the one that they were checked against.
        key = (job.name, job.version, graph, job.model, outputs, shape)
        model = job.model
        run = partial(run_graph, partial(model.runner.run, graph, outputs=outputs))
        beside = None if model.beside is None else partial(run_graph, partial(model.beside.run, graph, outputs=outputs))
        try:
            return await self._batcher.submit(
                key,
                decoded.prepared,
                run,
                beside,
                most=most_of(job.model, shape, self._max_batch),
                deadline=self._latest(job, (graph,), shape),
                priority=job.priority,
                member=job.trace,
            )
        except ModelFailedError as error:
            raise ModelRunError(str(error)) from error

    def _latest(self, job: Job, graphs: Iterable[str], shape: tuple[int, ...]) -> float | None:
        """When the first of the graphs must have started; None = whenever."""
        if job.deadline is None:
            return None
        now = monotonic()
        return job.deadline - sum(self.pace.expected_s(job.model, (graph, shape), now) for graph in graphs)

    async def _in(self, pool: ThreadPoolExecutor, lease: Lease, function: Callable[..., T], *args: Any) -> T:
        async with self._bulk_slots[pool] if lease.priority == "bulk" else nullcontext():
            work = pool.submit(function, *args)
            try:
                return await asyncio.wrap_future(work)
            except asyncio.CancelledError:
                lease.keep_until(work)
                raise

    def _count_batch(self, record: BatchRecord) -> None:
        """On the event loop, as are breakers and pace."""
        [(visit, _), *_] = record.members
        if isinstance(visit, Visit):
            self._count_visit(visit, record)
            return
        name, version, graph, model, _, shape = record.key
        execution = Execution(graph, shape, record.started, record.seconds, record.error)
        for trace, arrived in record.members:
            if trace is not None:
                trace.stage("queue", arrived, record.started - arrived)
        self._count(name, version, model, execution, [trace for trace, _ in record.members])

    def _count_visit(self, visit: Visit[Any], record: BatchRecord) -> None:
        job, executions = visit.job, visit.executions.copy()
        if record.error is not None and all(one.error is None for one in executions):
            # It was given up, or no thread could be started: in a graph that has not ended.
            graphs = job.model.graphs_for(job.request)
            graph = graphs[min(len(executions), len(graphs) - 1)]
            executions.append(Execution(graph, (), record.started, record.seconds, record.error))
        for execution in executions:
            self._count(job.name, job.version, job.model, execution, [job.trace])

    def _count(self, name: str, version: str, model: Model, execution: Execution, traces: list[Any]) -> None:
        """traces: of the images that went through it."""
        self.admission.breakers.ended(model, execution.error)
        if execution.error is None:
            self.pace.ran(model, (execution.graph, execution.shape), execution.seconds, monotonic())
        self._metrics.executions.labels(name, version).inc()
        self._metrics.images.labels(name, version).inc(len(traces))
        self._metrics.batch_size.labels(name, version).observe(len(traces))
        if self._tracing is not None:
            about = {"weakseg.graph": execution.graph, "weakseg.batch_size": len(traces)}
            failed = execution.error is not None
            self._tracing.execution(traces, execution.started, execution.seconds, failed=failed, attributes=about)


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
