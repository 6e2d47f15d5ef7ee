"""How long executions take of late, on a clock of the tests."""

import gc

import pytest

from serve.pace import LATEST, LEAST, MOST_KINDS, RECENT_S, Pace

KIND = ("segmentation", (40, 56, 3))


class Model:
    """One as far as it is told apart from others."""


@pytest.fixture
def model():
    return Model()


def test_it_is_the_median_of_the_latest(model):
    pace = Pace()
    for seconds in [9.0] * LATEST + [1.0, 2.0, 3.0] * (LATEST // 3):
        pace.ran(model, KIND, seconds, now=0.0)
    assert pace.expected_s(model, KIND, now=0.0) == 2.0


def test_a_few_say_nothing_nor_do_others(model):
    pace = Pace()
    assert pace.expected_s(model, KIND, now=0.0) == 0.0
    for n in range(LEAST):
        assert pace.expected_s(model, KIND, now=0.0) == 0.0, f"after {n}"
        pace.ran(model, KIND, 1.0, now=0.0)
    assert pace.expected_s(model, KIND, now=0.0) == 1.0
    assert pace.expected_s(model, ("classifier", KIND[1]), now=0.0) == 0.0
    assert pace.expected_s(Model(), KIND, now=0.0) == 0.0


def test_what_was_slow_is_forgotten_so_that_it_is_tried_again(model):
    pace = Pace()
    for now in range(LEAST):
        pace.ran(model, KIND, 100.0, now=now / 10)
    assert pace.expected_s(model, KIND, now=RECENT_S) == 100.0
    assert pace.expected_s(model, KIND, now=RECENT_S + 0.05) == 0.0


def test_sizes_and_models_that_come_and_go_take_no_memory_without_bound(model):
    pace = Pace()
    for side in range(2 * MOST_KINDS):
        pace.ran(model, ("segmentation", (side, side, 3)), 1.0, now=0.0)
    assert len(pace._ran[model]) == MOST_KINDS
    gone = Model()
    pace.ran(gone, KIND, 1.0, now=0.0)
    del gone
    gc.collect()
    assert len(pace._ran) == 1
