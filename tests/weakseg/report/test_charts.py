import math
import re
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from weakseg.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Mark, Series, line_chart, nice_ticks, number
from weakseg.report.colours import class_colours


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_even_round_and_cover_the_range(low, span):
    high = low + span
    ticks = nice_ticks(low, high)
    steps = [b - a for a, b in pairwise(ticks)]
    step = steps[0]
    slack = 1e-6 * max(step, abs(low), abs(high))
    assert 2 <= len(ticks) <= 8
    assert all(math.isclose(other, step, rel_tol=1e-6, abs_tol=slack) for other in steps)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack


def test_ticks_closed_form():
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert nice_ticks(0, 47) == [0, 10, 20, 30, 40, 50]
    assert nice_ticks(3, 3)[0] == 3


@pytest.mark.parametrize(("value", "said"), [(0, "0"), (1200, "1,200"), (0.35, "0.35"), (2e-5, "2e-05"), (40.0, "40")])
def test_numbers(value, said):
    assert number(value) == said


def test_points_lie_where_their_values_say():
    svg = line_chart([Series("a", [0, 10], [0, 1])], x="step", y="loss", title="t", marks=[Mark("m", 5, 0.5, "chosen")])
    points = re.search(r'points="([^"]*)"', svg)[1]
    left, right, top, bottom = float(LEFT), float(WIDTH - RIGHT), float(TOP), float(HEIGHT - BOTTOM)
    assert points == f"{left},{bottom} {right},{top}"
    assert f'cx="{(left + right) / 2}" cy="{(top + bottom) / 2}"' in svg


def test_nothing_to_draw_is_nothing():
    assert line_chart([Series("a", [], [])], x="", y="", title="") == ""


def test_forty_classes_have_forty_colours():
    assert len(set(class_colours(range(40)).values())) == 40
