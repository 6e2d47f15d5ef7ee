"""The dynamic batcher over functions that the test holds back: what shares a batch does not depend on the clock."""

import asyncio
import threading
from time import monotonic

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import serve.batcher
from serve.batcher import Batcher, ExecutionTimeoutError
from weakseg.errors import DeadlineTooShortError, QueueFullError

LONG_S = 30.0


def image(value=0, height=2, width=3):
    return np.full((height, width, 3), value, np.uint8)


class Gate:
    """A run that waits until the test opens it; `sizes` are the batches it saw."""

    def __init__(self, *, is_open=False):
        self.event = threading.Event()
        self.sizes = []
        self.values = []
        if is_open:
            self.event.set()

    def __call__(self, images):
        self.sizes.append(len(images))
        self.values.append([int(image[0, 0, 0]) for image in images])
        assert self.event.wait(LONG_S)
        return [{"sum": int(image.sum()), "map": image[..., :1]} for image in images]


def run(test, **options):
    """Run `test(batcher)` in a loop of its own, with a batcher that is closed afterwards."""

    async def main():
        batcher = Batcher(**{"max_batch": 4, "max_delay_s": 0.0, "limit": 100} | options)
        batcher.start()
        try:
            return await asyncio.wait_for(test(batcher), LONG_S)
        finally:
            await batcher.close()

    return asyncio.run(main())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_an_answer_has_the_image_of_its_caller():
    gate = Gate(is_open=True)

    async def test(batcher):
        return await asyncio.gather(*(batcher.submit("k", image(i), gate) for i in range(10)))

    answers = run(test)
    assert [answer.output["sum"] for answer in answers] == [18 * i for i in range(10)]
    assert all(answer.output["map"].shape == (2, 3, 1) for answer in answers)
    assert sum(gate.sizes) == 10 and max(gate.sizes) <= 4


def test_while_the_runner_is_busy_the_next_batch_fills():
    gate = Gate()

    async def test(batcher):
        first = asyncio.create_task(batcher.submit("k", image(0), gate))
        await until(lambda: gate.sizes == [1])
        others = [asyncio.create_task(batcher.submit("k", image(i), gate)) for i in range(1, 7)]
        await until(lambda: batcher.depth == 6)
        gate.event.set()
        return [(await task).batch_size for task in [first, *others]]

    assert run(test) == [1, 4, 4, 4, 4, 2, 2]
    assert gate.sizes == [1, 4, 2]


def test_a_full_batch_does_not_wait_for_the_delay():
    gate = Gate(is_open=True)

    async def test(batcher):
        await asyncio.gather(*(batcher.submit("k", image(i), gate) for i in range(4)))

    run(test, max_delay_s=10 * LONG_S)
    assert gate.sizes == [4]


def test_a_batch_that_does_not_fill_starts_after_the_delay():
    gate = Gate(is_open=True)

    async def test(batcher):
        return await asyncio.gather(*(batcher.submit("k", image(i), gate) for i in range(3)))

    answers = run(test, max_delay_s=0.05)
    assert gate.sizes == [3]
    assert all(answer.queue_s >= 0.05 for answer in answers)


def test_keys_do_not_mix_and_the_oldest_goes_first():
    gate = Gate()

    async def test(batcher):
        tasks = [asyncio.create_task(batcher.submit("busy", image(9), gate))]
        await until(lambda: gate.sizes == [1])
        for i, key in enumerate("abab"):
            tasks.append(asyncio.create_task(batcher.submit(key, image(i, height=2 + (key == "b")), gate)))
        await until(lambda: batcher.depth == 4)
        gate.event.set()
        await asyncio.gather(*tasks)

    run(test)
    assert gate.values == [[9], [0, 2], [1, 3]]


def test_one_image_more_than_the_limit_is_refused():
    gate = Gate()

    async def test(batcher):
        tasks = [asyncio.create_task(batcher.submit("k", image(), gate))]
        await until(lambda: gate.sizes == [1])
        tasks += [asyncio.create_task(batcher.submit("k", image(), gate)) for _ in range(2)]
        await until(lambda: batcher.depth == 2)
        with pytest.raises(QueueFullError, match="at most 2"):
            await batcher.submit("k", image(), gate)
        gate.event.set()
        await asyncio.gather(*tasks)
        assert batcher.depth == 0

    run(test, limit=2)


def test_cancelled_work_leaves_the_queue_at_once_and_never_runs():
    gate = Gate()

    async def test(batcher):
        first = asyncio.create_task(batcher.submit("k", image(0), gate))
        await until(lambda: gate.sizes == [1])
        gone, stays = (asyncio.create_task(batcher.submit("k", image(i), gate)) for i in (1, 2))
        await until(lambda: batcher.depth == 2)
        gone.cancel()
        await until(gone.done)
        assert batcher.depth == 1
        gate.event.set()
        await asyncio.gather(first, stays)

    run(test)
    assert gate.values == [[0], [2]]


def test_expired_work_is_answered_and_never_runs():
    gate = Gate()

    async def test(batcher):
        first = asyncio.create_task(batcher.submit("k", image(0), gate))
        await until(lambda: gate.sizes == [1])
        late = asyncio.create_task(batcher.submit("k", image(1), gate, deadline=monotonic()))
        in_time = asyncio.create_task(batcher.submit("k", image(2), gate, deadline=monotonic() + LONG_S))
        await until(lambda: batcher.depth == 2)
        gate.event.set()
        with pytest.raises(DeadlineTooShortError, match="in the queue"):
            await late
        await asyncio.gather(first, in_time)

    run(test)
    assert gate.values == [[0], [2]]


def test_an_error_reaches_every_caller_and_the_next_batch_runs():
    records = []

    def broken(images):
        raise MemoryError("out of memory")

    async def test(batcher):
        failed = await asyncio.gather(*(batcher.submit("k", image(), broken) for _ in range(2)), return_exceptions=True)
        answer = await batcher.submit("k", image(1), Gate(is_open=True))
        return failed, answer

    failed, answer = run(test, on_batch=records.append, max_delay_s=0.01)
    assert [type(error) for error in failed] == [MemoryError] * 2
    assert answer.output["sum"] == 18
    tried = [(2, MemoryError), (1, MemoryError), (1, MemoryError), (1, type(None))]
    assert [(record.size, type(record.error)) for record in records] == tried


def test_an_image_that_fails_its_batch_fails_alone():
    def picky(images):
        if any((image == 7).any() for image in images):
            raise RuntimeError("a seven")
        return [{"sum": int(image.sum())} for image in images]

    async def test(batcher):
        calls = (batcher.submit("k", image(value), picky) for value in (6, 7, 8))
        return await asyncio.gather(*calls, return_exceptions=True)

    six, seven, eight = run(test, max_delay_s=0.01)
    assert str(seven) == "a seven"
    assert [(one.output["sum"], one.batch_size) for one in (six, eight)] == [(108, 1), (144, 1)]


def test_one_that_left_is_not_run_again_after_a_failure():
    gate = Gate()

    def broken(images):
        gate(images)
        raise RuntimeError("broken")

    async def test(batcher):
        calls = [asyncio.create_task(batcher.submit("k", image(value), broken)) for value in (1, 2)]
        await until(lambda: gate.sizes == [2])
        calls[0].cancel()
        gate.event.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    gone, stayed = run(test, max_delay_s=0.01)
    assert isinstance(gone, asyncio.CancelledError) and isinstance(stayed, RuntimeError)
    assert gate.values == [[1, 2], [2]]


@pytest.mark.parametrize("raised", [SystemExit(0), KeyboardInterrupt(), StopIteration()], ids=repr)
def test_what_would_end_the_event_loop_is_an_error_like_others(raised):
    def dying(images):
        raise raised

    async def test(batcher):
        with pytest.raises(RuntimeError, match=type(raised).__name__):
            await batcher.submit("k", image(), dying)
        return await batcher.submit("k", image(1), Gate(is_open=True))

    assert run(test).output["sum"] == 18


def test_another_number_of_outputs_is_an_error():
    async def test(batcher):
        with pytest.raises(ValueError, match="expected 1 outputs of a run, got 2"):
            await batcher.submit("k", image(), lambda images: [*images, None])

    run(test)


def test_an_execution_that_hangs_is_given_up_and_another_thread_goes_on():
    gate, records = Gate(), []

    async def test(batcher):
        calls = [batcher.submit("k", image(value), gate) for value in (1, 2)]
        hung = await asyncio.gather(*calls, return_exceptions=True)
        assert batcher.hung == 1
        answer = await batcher.submit("k", image(1), Gate(is_open=True))
        gate.event.set()
        await until(lambda: batcher.hung == 0)
        return hung, answer

    hung, answer = run(test, max_delay_s=0.01, timeout_s=0.05, on_batch=records.append)
    assert [type(error) for error in hung] == [ExecutionTimeoutError] * 2
    assert gate.sizes == [2], "it is not run again: it would hang again"
    assert answer.output["sum"] == 18
    assert [record.error is None for record in records] == [False, True]


def test_a_thread_that_cannot_be_started_fails_its_callers_and_no_others(monkeypatch):
    async def test(batcher):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("can't start")))
            with pytest.raises(RuntimeError, match="can't start"):
                await batcher.submit("k", image(), Gate(is_open=True))
        return await batcher.submit("k", image(1), Gate(is_open=True))

    assert run(test).output["sum"] == 18


def test_closing_does_not_wait_for_an_execution_that_hangs(monkeypatch):
    monkeypatch.setattr(serve.batcher, "CLOSE_S", 0.05)
    gate = Gate()

    async def test(batcher):
        call = asyncio.create_task(batcher.submit("k", image(), gate))
        await until(lambda: gate.sizes == [1])
        await batcher.close()
        assert batcher.hung == 1
        with pytest.raises(ExecutionTimeoutError):
            await call

    try:
        run(test)
    finally:
        gate.event.set()


def test_as_many_images_as_workers_run_side_by_side():
    alone, beside = Gate(), Gate()

    async def test(batcher):
        tasks = await waiting_behind(batcher, alone, "abc", beside)
        await until(lambda: beside.sizes == [1, 1, 1])
        tasks.append(asyncio.create_task(batcher.submit("d", image(), alone, beside)))
        await until(lambda: batcher.depth == 1)
        beside.event.set()
        await asyncio.gather(*tasks)

    run(test, workers=3)
    assert alone.sizes + beside.sizes == [1] * 5


async def waiting_behind(batcher, alone, keys, beside):
    """Images that could all start at one moment: what was alone before them has just ended."""
    tasks = [asyncio.create_task(batcher.submit("first", image(), alone))]
    await until(lambda: alone.sizes == [1])
    tasks += [asyncio.create_task(batcher.submit(key, image(), alone, beside)) for key in keys]
    await until(lambda: batcher.depth == len(keys))
    alone.event.set()
    return tasks


def test_fewer_images_than_workers_go_one_after_the_other_with_all_threads():
    alone, beside = Gate(), Gate()

    async def test(batcher):
        tasks = [asyncio.create_task(batcher.submit(key, image(), alone, beside)) for key in "ab"]
        await until(lambda: alone.sizes == [1])
        tasks.append(asyncio.create_task(batcher.submit("c", image(), alone, beside)))
        await until(lambda: batcher.depth == 2)
        assert alone.sizes == [1], "what has all threads is alone"
        alone.event.set()
        await asyncio.gather(*tasks)

    run(test, workers=3)
    assert (alone.sizes, beside.sizes) == ([1, 1, 1], [])


def test_what_cannot_share_the_cores_waits_for_those_beside_each_other_and_they_for_it():
    alone, beside = Gate(), Gate()

    async def test(batcher):
        tasks = await waiting_behind(batcher, alone, "ab", beside)
        await until(lambda: beside.sizes == [1, 1])
        alone.event.clear()
        tasks.append(asyncio.create_task(batcher.submit("c", image(), alone)))
        await until(lambda: batcher.depth == 1)
        beside.event.set()
        await until(lambda: alone.sizes == [1, 1])
        tasks += [asyncio.create_task(batcher.submit(key, image(), alone, beside)) for key in "de"]
        await until(lambda: batcher.depth == 2)
        assert beside.sizes == [1, 1]
        alone.event.set()
        await asyncio.gather(*tasks)

    run(test, workers=2)
    assert (alone.sizes, beside.sizes) == ([1, 1], [1, 1, 1, 1])


def test_only_what_may_hang_has_a_limit_of_time():
    """Half a second of decoding, as it were, is no execution that hangs; a graph after it may be one."""
    gate, began = Gate(), [None]

    async def test(batcher):
        call = asyncio.create_task(batcher.submit("k", image(), gate, began=lambda: began[0]))
        await asyncio.sleep(0.5)
        assert batcher.hung == 0 and not call.done()
        began[0] = monotonic()
        with pytest.raises(ExecutionTimeoutError):
            await call
        gate.event.set()
        await until(lambda: batcher.hung == 0)

    run(test, timeout_s=0.1)


def submit_on_one_core(batcher, value, gate, **options):
    return asyncio.create_task(batcher.submit("v", image(value), gate, gate, most=1, **options))


def test_what_is_on_one_core_is_not_alone_and_as_many_as_workers_are_handed_over_ahead():
    gate = Gate()

    async def test(batcher):
        tasks = [submit_on_one_core(batcher, i, gate) for i in range(6)]
        await until(lambda: len(gate.sizes) == 2)
        await until(lambda: batcher.inside == 6)
        assert (batcher.depth, batcher._lanes.depth) == (4, 2), "two wait in the threads' queue"
        gate.event.set()
        await asyncio.gather(*tasks)
        assert batcher.depth == batcher.inside == 0

    run(test, workers=2)
    assert sorted(gate.values[:2]) == [[0], [1]] and sorted(gate.values) == [[i] for i in range(6)]


def test_what_is_handed_over_ahead_was_next_and_is_never_bulk():
    """An interactive image that comes while bulk ones are computed is next, whatever waits."""
    gate, alone = Gate(), Gate(is_open=True)

    async def test(batcher):
        tasks = [submit_on_one_core(batcher, i, gate, priority="bulk") for i in range(3)]
        await until(lambda: gate.values == [[0]])
        tasks.append(asyncio.create_task(batcher.submit("k", image(3), alone)))
        await asyncio.sleep(0)
        tasks.append(submit_on_one_core(batcher, 4, gate))
        await until(lambda: batcher.depth == 4)
        assert batcher._lanes.depth == 4, "the first of these is not on one core"
        gate.event.set()
        await asyncio.gather(*tasks)

    run(test, bulk_wait_s=LONG_S)
    assert (gate.values, alone.values) == ([[0], [4], [1], [2]], [[3]])


def test_who_leaves_before_a_thread_has_begun_makes_room_for_the_next():
    gate = Gate()

    async def test(batcher):
        first = submit_on_one_core(batcher, 0, gate)
        await until(lambda: gate.values == [[0]])
        gone, waits = submit_on_one_core(batcher, 1, gate), submit_on_one_core(batcher, 2, gate)
        await until(lambda: (batcher.depth, batcher._lanes.depth) == (2, 1))
        gone.cancel()
        await until(lambda: (batcher.depth, batcher._lanes.depth) == (1, 0))
        gate.event.set()
        await asyncio.gather(first, waits)

    run(test)
    assert gate.values == [[0], [2]]


def test_what_waits_behind_one_that_hangs_is_not_given_up_with_it():
    hangs, gate = Gate(), Gate(is_open=True)

    async def test(batcher):
        hung, waits = submit_on_one_core(batcher, 0, hangs), submit_on_one_core(batcher, 1, gate)
        await until(lambda: batcher.depth == 1)
        with pytest.raises(ExecutionTimeoutError):
            await hung
        assert (await waits).output["sum"] == 18 and batcher.hung == 1
        hangs.event.set()
        await until(lambda: batcher.hung == 0)

    run(test, timeout_s=0.1)


@pytest.mark.parametrize(("most", "sizes"), [(1, [1] * 4), (3, [3, 1]), (9, [4]), (0, [1] * 4)])
def test_a_batch_may_be_smaller_than_the_largest(most, sizes):
    gate = Gate(is_open=True)

    async def test(batcher):
        return await asyncio.gather(*(batcher.submit("k", image(i), gate, most=most) for i in range(4)))

    assert [answer.batch_size for answer in run(test, max_batch=4)] == [size for size in sizes for _ in range(size)]
    assert gate.sizes == sizes


def test_closing_cancels_what_waits():
    gate = Gate()

    async def test(batcher):
        running = asyncio.create_task(batcher.submit("k", image(), gate))
        await until(lambda: gate.sizes == [1])
        waiting = asyncio.create_task(batcher.submit("k", image(), gate))
        await until(lambda: batcher.depth == 1)
        gate.event.set()
        await batcher.close()
        assert (await asyncio.gather(running, waiting, return_exceptions=True))[1].__class__ is asyncio.CancelledError
        assert batcher.depth == 0

    run(test)
    assert gate.sizes == [1]


def test_a_caller_that_leaves_as_its_time_ends_does_no_harm():
    gate = Gate()

    async def test(batcher):
        first = asyncio.create_task(batcher.submit("k", image(0), gate))
        await until(lambda: gate.sizes == [1])
        late = asyncio.create_task(batcher.submit("k", image(1), gate, deadline=monotonic()))
        gone = asyncio.create_task(batcher.submit("k", image(2), gate))
        await until(lambda: batcher.depth == 2)
        # Both are cancelled and have not been told yet when the next batch is put together.
        late.cancel()
        gone.cancel()
        batcher._lanes.drop_dead(monotonic())
        assert batcher.depth == 0
        gate.event.set()
        await first
        assert (await batcher.submit("k", image(3), gate)).output["sum"] == 54
        assert late.cancelled() and gone.cancelled()

    run(test)
    assert gate.values == [[0], [3]]


def test_a_batcher_that_does_not_run_says_so():
    async def test(batcher):
        await batcher.close()
        with pytest.raises(RuntimeError, match="does not run"):
            await batcher.submit("k", image(), Gate(is_open=True))

    run(test)


async def started(batcher, gate, *waiting, pause_s=0.0):
    """The order in which images (key, value, priority) that all wait for one busy thread go through it."""
    first = asyncio.create_task(batcher.submit("busy", image(99), gate))
    await until(lambda: gate.sizes == [1])
    tasks = []
    for key, value, priority in waiting:
        tasks.append(asyncio.create_task(batcher.submit(key, image(value), gate, priority=priority)))
        await until(lambda: batcher.depth == len(tasks))
        await asyncio.sleep(pause_s)
    gate.event.set()
    await asyncio.gather(first, *tasks)
    return gate.values[1:]


def test_interactive_images_go_before_bulk_ones_of_any_key_and_share_no_batch_with_them():
    waiting = [("a", 1, "bulk"), ("b", 2, "bulk"), ("a", 3, "interactive"), ("c", 4, "interactive"), ("a", 5, "bulk")]
    assert run(lambda batcher: started(batcher, Gate(), *waiting), bulk_wait_s=LONG_S) == [[3], [4], [1, 5], [2]]


def test_a_bulk_image_that_came_long_before_goes_first():
    waiting = [("a", 1, "bulk"), ("b", 2, "interactive")]
    assert run(lambda batcher: started(batcher, Gate(), *waiting, pause_s=0.02), bulk_wait_s=0.01) == [[1], [2]]


def test_an_interactive_image_does_not_wait_for_others_while_a_bulk_batch_takes_its_turn():
    waiting = [("a", 1, "bulk"), ("a", 2, "bulk"), ("b", 3, "interactive")]

    async def test(batcher):
        gate = Gate(is_open=True)
        # The first fills its batch, so nothing here waits for the delay but the interactive image.
        gate.event.clear()
        busy = [asyncio.create_task(batcher.submit("busy", image(99), gate)) for _ in range(2)]
        await until(lambda: gate.sizes == [2])
        tasks = [asyncio.create_task(batcher.submit(key, image(v), gate, priority=p)) for key, v, p in waiting]
        await until(lambda: batcher.depth == 3)
        gate.event.set()
        await asyncio.gather(*busy, *tasks)
        return gate.values[1:]

    assert run(test, max_batch=2, max_delay_s=10 * LONG_S, bulk_wait_s=LONG_S) == [[3], [1, 2]]


def test_a_bulk_image_has_its_turn_under_interactive_load_without_end():
    gate = Gate(is_open=True)

    async def test(batcher):
        bulk = asyncio.create_task(batcher.submit("k", image(0), gate, priority="bulk"))

        async def load():
            while not bulk.done():
                await batcher.submit("k", image(1), gate)

        await asyncio.gather(bulk, *(load() for _ in range(4)))

    run(test, max_batch=1, bulk_wait_s=0.05)
    assert [0] in gate.values


@given(
    waiting=st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=20), max_batch=st.integers(1, 4)
)
@settings(max_examples=40)
def test_nothing_bulk_starts_while_something_interactive_waits(waiting, max_batch):
    images = [(key, i, "bulk" if bulk else "interactive") for i, (key, bulk) in enumerate(waiting)]
    order = run(lambda batcher: started(batcher, Gate(), *images), max_batch=max_batch, bulk_wait_s=LONG_S)
    bulk = [waiting[value][1] for batch in order for value in batch]
    assert bulk == sorted(bulk)
    assert sorted(value for batch in order for value in batch) == list(range(len(waiting)))


@settings(max_examples=40, deadline=None)
@given(
    keys=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    cancelled=st.sets(st.integers(0, 29), max_size=10),
    expired=st.sets(st.integers(0, 29), max_size=10),
    max_batch=st.integers(1, 5),
    workers=st.integers(1, 3),
    shares=st.booleans(),
    n_turns=st.integers(0, 3),
    bulk=st.sets(st.integers(0, 29)),
    bulk_wait_s=st.sampled_from([0.0, 1e-4, LONG_S]),
)
def test_every_image_is_answered_once_or_cancelled(
    keys, cancelled, expired, max_batch, workers, shares, n_turns, bulk, bulk_wait_s
):
    gate, depths = Gate(is_open=True), []
    beside = gate if shares else None

    async def test(batcher):
        deadlines = [monotonic() if i in expired else None for i in range(len(keys))]
        priorities = ["bulk" if i in bulk else "interactive" for i in range(len(keys))]
        tasks = [
            asyncio.create_task(
                batcher.submit(key, image(i), gate, beside, deadline=deadlines[i], priority=priorities[i])
            )
            for i, key in enumerate(keys)
        ]
        for _ in range(n_turns):
            await asyncio.sleep(0)
        for i in cancelled & set(range(len(keys))):
            tasks[i].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = run(test, max_batch=max_batch, workers=workers, bulk_wait_s=bulk_wait_s, on_depth=depths.append)
    for i, answer in enumerate(answers):
        if isinstance(answer, asyncio.CancelledError):
            assert i in cancelled
        elif i in expired:
            assert isinstance(answer, DeadlineTooShortError)
        else:
            assert answer.output["sum"] == 18 * i
    assert max(gate.sizes, default=0) <= max_batch
    assert not depths or (depths[-1] == 0 and min(depths) == 0)
