"""Dynamic batching: images that want the same graph at the same size go through it together, urgent ones first.

No gRPC, no models, no arrays: callers hand over an image, be it pixels or a file, a key that says what may share a
batch, and the function that runs one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, Generic, TypeVar

from serve.lanes import Item, Key, Lane, Lanes, Priority
from weakseg.errors import QueueFullError

In = TypeVar("In")  # an image
Out = TypeVar("Out")  # what comes of it
Run = Callable[[list[In]], list[Out]]  # as many of these, in the same order

CLOSE_S = 2.0  # for executions under way when the batcher closes


class ExecutionTimeoutError(Exception):
    """An execution took longer than it may; it is not known whether it will ever end."""


@dataclass(frozen=True)
class BatchRecord:
    """One execution, as told to `on_batch`. `error` is what it raised.

    members: of each image what `submit` was told to tell, and when it came. started: on the clock of `time.monotonic`.
    """

    key: Key
    size: int
    seconds: float
    error: Exception | None = None
    started: float = 0.0
    members: tuple[tuple[Any, float], ...] = ()


@dataclass(frozen=True)
class BatchAnswer(Generic[Out]):
    """What came of one image, and how."""

    output: Out
    batch_size: int
    queue_s: float
    infer_s: float


@dataclass(eq=False)
class _Execution:
    """A batch under way: first all of it, after a failure each of its images alone."""

    key: Key
    shares: bool
    batches: deque[list[Item]]  # still to be run
    over: asyncio.Future[None]
    items: list[Item] = field(default_factory=list)  # what runs now
    work: Future[list[Any]] | None = None
    started: float = 0.0
    timer: asyncio.TimerHandle | None = None


class Batcher:
    """Collects images per key and priority and runs each batch in a thread of its own pool.

    A batch starts when it is full, or when its first image has waited `max_delay_s`, and a worker is free; while all
    are busy it goes on filling. Of several that could start, the one whose first image came first does; a bulk image
    counts as if it had come `bulk_wait_s` later than it did. So interactive images go first, whatever graph they want,
    and no bulk image waits for one that comes more than `bulk_wait_s` after it. Priorities do not share a batch: an
    interactive image should not take the time of the bulk ones beside it. Images whose caller is gone or whose deadline
    has passed are dropped before they cost anything.

    A batch alone has all threads of the runtime. Where there is work for all workers, each takes one, on one core each,
    which all together take less time; runs that cannot share the cores go one after the other. Of interactive images
    that are on one core in any case, as many as there are workers are handed to the threads ahead of time: else these
    would sleep until the event loop has its turn. None overtakes another that way.

    A batch that fails is run once more image by image: one that cannot be computed, or is too large beside others, does
    not fail them. An execution that takes longer than `timeout_s` fails its callers and is given up: no thread can be
    stopped from outside, so it keeps its own, and others take over.

    `submit` belongs to one event loop; create the batcher anywhere, `start` it there.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_delay_s: float,
        limit: int,
        workers: int = 1,
        bulk_wait_s: float = 0.0,
        timeout_s: float | None = None,
        on_batch: Callable[[BatchRecord], None] | None = None,
        on_depth: Callable[[int], None] | None = None,
    ) -> None:
        self.max_batch = max_batch
        self.limit = limit
        self.timeout_s = timeout_s
        self._on_batch = on_batch
        self._on_depth = on_depth
        self._lanes = Lanes(max_delay_s, bulk_wait_s)
        self._free = self._workers = workers
        self._alone = False  # whether what runs must be alone
        self._pool = self._new_pool()
        self._given_up: set[Future[list[Any]]] = set()
        self._executions: set[_Execution] = set()
        self._loop: asyncio.AbstractEventLoop | None = None  # while it runs
        self._due: asyncio.Handle | None = None  # the next `_dispatch`

    @property
    def depth(self) -> int:
        """Images that wait, be it in a thread's queue."""
        return self._lanes.depth + max(0, -self._free)

    @property
    def inside(self) -> int:
        """Images that wait, and executions. May be asked in any thread."""
        return self._lanes.depth + self._workers - self._free

    @property
    def hung(self) -> int:
        """Executions that were given up and have not ended: so many threads are lost."""
        return len(self._given_up)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Stop; whatever still waits is cancelled for its caller, and what runs given up if it does not end soon."""
        self._loop = None
        if self._due is not None:
            self._due.cancel()
        for item in self._lanes:
            item.answer.cancel()
        self._lanes.clear()
        self._tell_depth()
        while self._executions:
            await self.wait_running(CLOSE_S)
            for execution in self._executions.copy():
                self._give_up(execution)
        self._pool.shutdown()  # nothing runs in it

    async def submit(
        self,
        key: Key,
        image: In,
        run: Run[In, Out],
        beside: Run[In, Out] | None = None,
        *,
        most: int | None = None,
        deadline: float | None = None,
        priority: Priority = "interactive",
        member: Any = None,
        began: Callable[[], float | None] | None = None,
    ) -> BatchAnswer[Out]:
        """Run `image` with others of the same `key`.

        Args:
            key: images of equal keys may share `run`.
            run: called in a thread.
            beside: the same on one core, for while others run; None = nothing may run beside it. The same as `run` =
                that is on one core, too, so it need not be alone.
            most: images of its batch, at least 1 and at most `max_batch`, if that should be fewer.
            deadline: until when its batch must have started, on the clock of `time.monotonic`.
            priority: bulk gives way to interactive, as the class says.
            member: for `BatchRecord.members`.
            began: when that began of its run which may hang, on the clock of `time.monotonic`; it may say None, not
                now. None = all of the run may.
        Raises:
            QueueFullError: `limit` images wait already.
            DeadlineTooShortError: no batch could start in time.
        """
        if self._loop is None:
            raise RuntimeError("the batcher does not run")  # rather than an answer that never comes
        if self.depth >= self.limit:
            raise QueueFullError(f"expected at most {self.limit} images waiting, got one more: try again later")
        most = self.max_batch if most is None else max(1, min(most, self.max_batch))
        item = Item(image, run, beside, most, deadline, self._loop.create_future(), member, began)
        lane = (key, priority)
        self._lanes.add(lane, item)
        self._tell_depth()
        if item.on_one_core:  # no others come that would share its batch
            self._dispatch()
        else:
            self._go_on()
        try:
            answer: BatchAnswer[Out] = await item.answer
            return answer
        except asyncio.CancelledError:
            self._lanes.remove(lane, item)
            self._tell_depth()
            for execution in self._executions.copy():
                if item in execution.items:
                    self._begin_anew(execution)
            raise

    async def wait_running(self, timeout_s: float | None = None) -> None:
        """Until what runs now has ended, or was given up."""
        if self._executions:
            await asyncio.wait([execution.over for execution in self._executions], timeout=timeout_s)

    def _go_on(self, after_s: float = 0.0) -> None:
        """See what can be started: soon, so that images that come together are seen together, or after a time."""
        if isinstance(self._due, asyncio.TimerHandle):
            self._due.cancel()
        elif self._due is not None:
            return
        if self._loop is not None:
            self._due = (
                self._loop.call_later(after_s, self._dispatch) if after_s else self._loop.call_soon(self._dispatch)
            )

    def _dispatch(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        wait_s = self._start_what_can()
        if wait_s is not None:
            self._go_on(wait_s)

    def _start_what_can(self) -> float | None:
        """Start what can be started; the seconds until the next may be, None = nothing waits for time."""
        while self._free > 0 or (self._lanes.depth and self._goes_ahead(self._lanes.earliest())):
            now = monotonic()
            self._lanes.drop_dead(now)
            self._tell_depth()
            if not self._lanes.depth:
                return None
            lane = self._lanes.next(now)
            if isinstance(lane, float):
                return lane
            first = self._lanes.first(lane)
            shares = first.on_one_core or (first.beside is not None and self.inside >= self._workers > 1)
            if self._alone or (self._free < self._workers and not shares):
                return None
            if self._free <= 0 and not self._goes_ahead(lane):
                return None
            self._free -= 1
            self._alone = not shares
            over = asyncio.get_running_loop().create_future()
            execution = _Execution(lane[0], shares, deque([self._lanes.take(lane)]), over)
            self._tell_depth()
            self._executions.add(execution)
            self._run_next(execution)
        return None

    def _goes_ahead(self, lane: Lane) -> bool:
        """Whether its first image may go to the threads while none of them is free."""
        has_room = self._free > -self._workers and not self._alone
        return has_room and lane[1] == "interactive" and self._lanes.first(lane).on_one_core

    def _run_next(self, execution: _Execution) -> None:
        """Hand the next of its batches to a thread; without one it is over."""
        loop = execution.over.get_loop()
        while execution.batches:
            execution.items = [item for item in execution.batches.popleft() if not item.answer.done()]
            if not execution.items:
                continue
            execution.started = monotonic()
            first = execution.items[0]
            run = first.beside if execution.shares and first.beside is not None else first.run
            try:
                work = self._pool.submit(_run, run, [item.image for item in execution.items])
            except RuntimeError as refused:  # no thread can be started
                self._settle(execution, refused)
                continue
            execution.work = work
            if self.timeout_s is not None:
                execution.timer = loop.call_later(self.timeout_s, self._look_at, execution)
            work.add_done_callback(partial(self._tell, loop, execution))
            return
        self._executions.discard(execution)
        execution.over.set_result(None)
        self._free += 1
        self._tell_depth()
        self._alone = self._alone and execution.shares
        self._go_on()

    def _tell(self, loop: asyncio.AbstractEventLoop, execution: _Execution, work: Future[list[Any]]) -> None:
        """In the thread: what was given up may end when nobody is there to hear it."""
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._ended, execution, work)

    def _ended(self, execution: _Execution, work: Future[list[Any]]) -> None:
        if execution.work is work:
            self._settle(execution, work.exception())
            self._run_next(execution)

    def _look_at(self, execution: _Execution) -> None:
        """Give it up if it has taken too long."""
        assert self.timeout_s is not None and execution.items  # who has no time limit, or is over, has no timer
        told = execution.items[0].began
        began = execution.started if told is None else told()
        left_s = self.timeout_s - (0.0 if began is None else monotonic() - began)
        if left_s <= 0:
            self._give_up(execution)
        else:
            execution.timer = execution.over.get_loop().call_later(left_s, self._look_at, execution)

    def _give_up(self, execution: _Execution) -> None:
        """Leave its thread to it; others from now on."""
        work = execution.work
        if work is None or work.done():  # it is over, or is about to be told to `_ended`
            return
        execution.work = None
        self._given_up.add(work)
        work.add_done_callback(self._given_up.discard)
        work.cancel()
        self._pool.shutdown(wait=False)
        self._pool = self._new_pool()
        for other in self._executions.copy():
            self._begin_anew(other)
        after_s = monotonic() - execution.started
        self._settle(
            execution, ExecutionTimeoutError(f"an execution was given up after {after_s:.1f} s: it may never end")
        )
        self._run_next(execution)

    def _begin_anew(self, execution: _Execution) -> None:
        """If no thread has begun with it: in the pool that there is now, and without images whose caller is gone."""
        work = execution.work
        if work is None or not work.cancel():
            return
        execution.work = None
        if execution.timer is not None:
            execution.timer.cancel()
        execution.batches.appendleft(execution.items)
        self._run_next(execution)

    def _settle(self, execution: _Execution, error: BaseException | None) -> None:
        """What has run is answered, or is to be run again image by image, or has failed."""
        items, execution.items = execution.items, []
        work, execution.work = execution.work, None
        timer, execution.timer = execution.timer, None
        if timer is not None:
            timer.cancel()
        assert error is None or isinstance(error, Exception)  # `_run` sees to it
        infer_s = monotonic() - execution.started
        if error is None:
            assert work is not None
            for item, output in zip(items, work.result(), strict=True):
                del item.image  # or this frame, on the event loop, might be the last to hold it
                if not item.answer.done():
                    queue_s = execution.started - item.arrived
                    item.answer.set_result(BatchAnswer(output, len(items), queue_s, infer_s))
        if self._on_batch:
            members = tuple((item.member, item.arrived) for item in items)
            self._on_batch(BatchRecord(execution.key, len(items), infer_s, error, execution.started, members))
        if error is not None and len(items) > 1 and not isinstance(error, ExecutionTimeoutError):
            execution.batches.extend([item] for item in items)
        elif error is not None:
            _fail(items, error)

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._workers, thread_name_prefix="runner")

    def _tell_depth(self) -> None:
        if self._on_depth:
            self._on_depth(self.depth)


def _fail(items: list[Item], error: Exception) -> None:
    for item in items:
        if not item.answer.done():
            item.answer.set_exception(error)


def _run(run: Run[Any, Any], images: list[Any]) -> list[Any]:
    """One execution, in a thread."""
    try:
        outputs = run(images)
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            raise
        # SystemExit would end the event loop that it is told to, and no future takes a StopIteration.
        raise RuntimeError(f"a runner raised {type(error).__name__}") from error
    if len(outputs) != len(images):
        raise ValueError(f"expected {len(images)} outputs of a run, got {len(outputs)}")
    return outputs
