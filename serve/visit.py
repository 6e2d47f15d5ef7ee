"""An image that goes through its graphs alone, on one core: one thread does all of it, one step after the other.

To hand it from pool to pool would gain nothing, as the cores are busy either way, and each time the event loop and a
thread wait for Python's lock and wake each other: with a network of a few milliseconds that is a third of the work.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Generic, TypeVar

from serve.batcher import BatchAnswer
from serve.job import Answer, Job
from serve.steps import Arrays, Runs, Steps, run_graph
from weakseg.errors import DeadlineTooShortError
from weakseg.model import Decoded

T = TypeVar("T")


@dataclass(frozen=True)
class Execution:
    """Of one graph, for images of this shape. started: on the clock of `time.monotonic`."""

    graph: str
    shape: tuple[int, ...]
    started: float
    seconds: float
    error: Exception | None = None


class Visit(Generic[T]):
    """Of one job, for the batcher to run.

    Args:
        check: sees the image before it goes through a graph, and may raise.
        then: what is made of the answer.
        latest: when the first graph must have started, on the clock of `time.monotonic`; None = whenever.
    Attributes:
        over: what came of it, once the thread is done with it. Cancel it while it has not begun.
        executions: that have ended. graph_began: the one that runs, None = none does. May be read in any thread.
    """

    def __init__(
        self,
        steps: Steps,
        job: Job,
        check: Callable[[Decoded], object],
        then: Callable[[Answer], T],
        latest: float | None,
    ) -> None:
        self.job = job
        self.over: Future[T] = Future()
        self.executions: list[Execution] = []
        self.graph_began: float | None = None
        self._steps, self._check, self._then = steps, check, then
        self._latest = latest
        self._arrived = monotonic()

    def go(self, is_alone: Callable[[], bool]) -> None:
        """In a thread. is_alone: whether nothing else is to be computed, so that all cores may be used.

        Raises:
            What a graph raised, as the model's failure, for the batcher to hear of. All else is in `over` alone.
        """
        if not self.over.set_running_or_notify_cancel():
            return
        try:
            self.over.set_result(self._go(is_alone))
        except BaseException as error:
            self.over.set_exception(error)
            if not isinstance(error, Exception) or (self.executions and self.executions[-1].error is error):
                raise

    def _go(self, is_alone: Callable[[], bool]) -> T:
        queue_s = monotonic() - self._arrived
        if self.job.trace is not None:
            self.job.trace.stage("queue", self._arrived, queue_s)
        held = [self._steps.decode(self.job)]
        self._check(held[0])
        if self._latest is not None and self._latest <= monotonic():
            raise DeadlineTooShortError("too little time is left after decoding: allow more")
        runs: Runs = {}
        for graph in self.job.model.graphs_for(self.job.request):
            runs[graph] = self._run(graph, held[0], is_alone(), 0.0 if runs else queue_s)
        self._steps.count_runs(self.job, runs)
        return self._steps.answer(self.job, held, runs, [], self._then)

    def _run(self, graph: str, decoded: Decoded, is_alone: bool, queue_s: float) -> BatchAnswer[Arrays]:
        model = self.job.model
        runner = model.runner if is_alone or model.beside is None else model.beside
        outputs = model.outputs_of(graph, decoded, self.job.request)
        self.graph_began = started = monotonic()
        failure = None
        try:
            [output] = run_graph(partial(runner.run, graph, outputs=outputs), [decoded.prepared])
        except Exception as error:
            failure = error
            raise
        finally:
            seconds = monotonic() - started
            self.executions.append(Execution(graph, decoded.prepared.shape, started, seconds, failure))
            self.graph_began = failure = None  # its traceback holds this frame
        return BatchAnswer(output, 1, queue_s, seconds)
