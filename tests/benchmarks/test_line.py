import json

import pytest

from benchmarks.line import line, line_of_pairs


@pytest.mark.parametrize(
    ("ours", "peer", "cost", "ratio"),
    [(40.0, 8.0, False, 5.0), (2.0, 8.0, True, 4.0), (3.0, None, False, None), (1 / 3, 1, False, 0.3333)],
)
def test_a_ratio_above_one_means_ours_is_better(capsys, ours, peer, cost, ratio):
    result = line("crf.test", ours, peer, unit="images/s", cost=cost, goal=5)
    assert result["ratio"] == ratio
    assert json.loads(capsys.readouterr().out) == result


def test_the_line_says_where_it_comes_from(capsys):
    result = line("crf.test", 1.0, unit="s", cost=True)
    assert list(result) == ["name", "ours", "peer", "ratio", "unit", "cost", "goal", "machine", "commit"]
    assert " x " in result["machine"]
    assert len(result["commit"].removesuffix("-dirty")) >= 7


def test_pairs_are_compared_one_by_one(capsys):
    result = line_of_pairs("serving.test", [10.0, 40.0, 33.0], [10.0, 50.0, 30.0], unit="images/s", goal=1.5)
    assert (result["ours"], result["peer"], result["ratio"], result["half"]) == (33.0, 30.0, 1.0, [0.9, 1.05])
    assert json.loads(capsys.readouterr().out) == result
