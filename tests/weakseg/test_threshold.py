import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weakseg.errors import ConfigError, DataError
from weakseg.recipe import ThresholdConfig
from weakseg.scoring import Sweep
from weakseg.threshold import MAX_IMAGES, Histogram, Threshold, area, choose, drawn, histogram, otsu


def never() -> None:
    raise AssertionError("read what the rule does not need")


def test_fixed_reads_nothing() -> None:
    chosen = choose(ThresholdConfig("fixed", 0.25), maxima=never, sweep=never)
    assert (chosen.t, chosen.rule) == (0.25, "fixed")


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, float("nan")])
def test_fixed_needs_a_value_between(value: float) -> None:
    with pytest.raises(ConfigError, match=r"\(0, 1\)"):
        choose(ThresholdConfig("fixed", value))


def test_otsu_splits_two_heaps_in_the_middle() -> None:
    scores = np.array([0.1] * 30 + [0.7] * 10, dtype=np.float32)
    chosen = choose(ThresholdConfig("otsu"), maxima=lambda: [scores[:20], scores[20:].reshape(4, 5)], sweep=never)
    assert chosen.rule == "otsu"
    assert chosen.t == pytest.approx(0.4, abs=1 / 256)
    assert chosen.provenance.endswith("2 training images (at most 200, drawn with seed 0), no mask seen")


@given(hnp.arrays(np.int64, st.integers(2, 40), elements=st.integers(0, 1000)))
def test_otsu_maximises_the_variance_between_the_sides(counts: np.ndarray) -> None:
    if np.count_nonzero(counts) < 2:
        with pytest.raises(DataError, match="fixed"):
            otsu(Histogram(counts, 1))
        return
    values = np.arange(len(counts)) + 0.5

    def between(edge: int) -> float:
        low, high = counts[:edge], counts[edge:]
        if not low.sum() or not high.sum():
            return 0.0
        means = np.average(values[:edge], weights=low), np.average(values[edge:], weights=high)
        return low.sum() * high.sum() * (means[0] - means[1]) ** 2

    edge = int(otsu(Histogram(counts, 1)).t * len(counts) + 1e-6)
    assert between(edge) == pytest.approx(max(between(e) for e in range(1, len(counts))), rel=1e-6)


def test_area_leaves_its_share_above() -> None:
    scores = np.array([0.1] * 30 + [0.7] * 10, dtype=np.float32)
    config = ThresholdConfig("area", area=0.25)
    chosen = choose(config, maxima=lambda: [scores[:20], scores[20:]], sweep=never)
    assert chosen.rule == "area" and 0.1 < chosen.t < 0.7
    assert "25% of the pixels of 2 training images" in chosen.provenance and "no mask seen" in chosen.provenance
    even = Histogram(np.full(10, 7), 1)
    assert [area(even, share).t for share in (0.9, 0.5, 0.25)] == pytest.approx([0.1, 0.5, 0.75])


@given(
    hnp.arrays(np.float32, st.integers(50, 200), elements=st.floats(0, 1, width=32), unique=True),
    st.floats(0.05, 0.95),
    st.sampled_from([0.5, 2.0]),
)
def test_area_sees_only_the_ranking(scores: np.ndarray, share: float, power: float) -> None:
    def above(values: np.ndarray) -> float:
        return float((values > area(histogram([values], 1 << 16), share).t).mean())

    remapped = scores.astype(np.float64) ** power
    in_one_bin = max(np.bincount(np.int64(v * (1 << 16)).clip(0, (1 << 16) - 1)).max() for v in (scores, remapped))
    assert above(scores) == pytest.approx(share, abs=(in_one_bin + 1) / len(scores))
    assert above(remapped) == pytest.approx(share, abs=(in_one_bin + 1) / len(scores))


@given(hnp.arrays(np.int64, st.integers(2, 40), elements=st.integers(0, 1000)), st.floats(1e-6, 1 - 1e-6))
def test_area_is_a_threshold_or_an_error(counts: np.ndarray, share: float) -> None:
    if np.count_nonzero(counts) < 2:
        with pytest.raises(DataError, match="fixed"):
            area(Histogram(counts, 1), share)
    else:
        assert 0 < area(Histogram(counts, 1), share).t < 1


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_area_must_be_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match=r"\(0, 1\)"):
        choose(ThresholdConfig("area", area=share), maxima=lambda: [np.array([0.1, 0.9], dtype=np.float32)])


def test_drawn_are_few_in_order_and_always_the_same() -> None:
    assert drawn(range(MAX_IMAGES)) == list(range(MAX_IMAGES))
    few = drawn(range(10_000))
    assert len(few) == len(set(few)) == MAX_IMAGES
    assert few == sorted(few) == drawn(range(10_000))
    assert min(few) < 500 and max(few) > 9500


def test_histogram_pools_and_keeps_the_ends() -> None:
    arrays = [np.array([0, 0.5, 1], dtype=np.float32), np.array([[1.2]], dtype=np.float32)]
    pooled = histogram(arrays, 4)
    assert (pooled.counts.tolist(), pooled.n_images) == ([1, 0, 1, 2], 2)
    assert histogram([], 4).counts.sum() == 0
    with pytest.raises(DataError, match="NaN"):
        histogram([np.array([np.nan], dtype=np.float32)])


def test_validation_split_takes_the_best_of_the_sweep() -> None:
    sweep = Sweep(1)
    sweep.add(np.array([[0, 0, 1, 1]], dtype=np.uint8), np.array([[[0, 0.2, 0.4, 0.9]]], dtype=np.float32), [0])
    chosen = choose(ThresholdConfig("validation_split"), maxima=never, sweep=lambda: sweep)
    assert chosen.rule == "validation_split"
    assert chosen.t == pytest.approx(0.2)  # the lowest of equals; 0.2 itself is background there
    assert "1 images" in chosen.provenance


def test_a_rule_without_its_input_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"data\.tune"):
        choose(ThresholdConfig("validation_split"))
    for rule in ("otsu", "area"):
        with pytest.raises(ConfigError, match=f"{rule} needs CAMs: run the stage cam"):
            choose(ThresholdConfig(rule))
    with pytest.raises(ConfigError, match="expected fixed, otsu"):
        choose(ThresholdConfig("magic"))
    with pytest.raises(DataError, match="no scored pixel"):
        choose(ThresholdConfig("validation_split"), sweep=lambda: Sweep(2))


def test_threshold_survives_json() -> None:
    threshold = Threshold(0.3, "fixed", "set in the recipe")
    assert Threshold.from_dict(json.loads(json.dumps(threshold.to_dict()))) == threshold


@pytest.mark.parametrize(
    "fields",
    [{"t": 0.3}, {"t": "0.3", "rule": "", "provenance": ""}, {"t": 0.3, "rule": 1, "provenance": ""}, {"alpha": 2}],
)
def test_a_damaged_threshold_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(DataError, match="threshold"):
        Threshold.from_dict(fields)
