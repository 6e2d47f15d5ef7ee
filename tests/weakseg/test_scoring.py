import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from weakseg.cam import labels_from_cam
from weakseg.classes import IGNORE, IGNORE_U16, ClassTable
from weakseg.errors import ConfigError, DataError, UnknownClassError
from weakseg.scoring import SWEEP_THRESHOLDS, Boundary, Calibration, Confusion, Sweep, confusion, scores

N = 3
shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
label_maps = shapes.flatmap(
    lambda shape: st.tuples(
        *[hnp.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 2, 3, IGNORE])) for _ in range(2)]
    )
)


@given(label_maps)
def test_confusion_is_a_count_of_pairs(maps: tuple[np.ndarray, np.ndarray]) -> None:
    expected = np.zeros((N + 1, N + 2), dtype=int)
    for truth, prediction in zip(maps[0].flat, maps[1].flat, strict=True):
        if truth != IGNORE:
            expected[truth, N + 1 if prediction == IGNORE else prediction] += 1
    np.testing.assert_array_equal(confusion(*maps, N), expected)


@given(label_maps, st.sampled_from([None, [0], [0, 2], [1, 2]]))
def test_scores_follow_their_definition(maps: tuple[np.ndarray, np.ndarray], scored: list[int] | None) -> None:
    truth, prediction = (m.astype(int) for m in maps)
    rows = [0, *(c + 1 for c in (range(N) if scored is None else scored))]
    kept = np.isin(truth, rows)
    decided = kept & (prediction != IGNORE)
    found = scores(confusion(*maps, N), scored)
    expected = []
    for value in range(N + 1):
        t, p = (truth == value) & decided, (prediction == value) & decided
        union = (t | p).sum()
        if value not in rows or not union:
            assert np.isnan(found.iou[value])
            assert np.isnan(found.fp[value])
            continue
        expected.append((t & p).sum() / union)
        assert found.iou[value] == pytest.approx(expected[-1])
        assert found.fp[value] == pytest.approx((p & ~t).sum() / union)
        assert found.fn[value] == pytest.approx((t & ~p).sum() / union)
        assert found.precision[value] == pytest.approx((t & p).sum() / p.sum() if p.any() else math.nan, nan_ok=True)
        assert found.recall[value] == pytest.approx((t & p).sum() / t.sum() if t.any() else math.nan, nan_ok=True)
    assert found.miou == pytest.approx(np.mean(expected) if expected else math.nan, nan_ok=True)
    coverage = decided.sum() / kept.sum() if kept.any() else math.nan
    assert found.coverage == pytest.approx(coverage, nan_ok=True)


def test_headline_voids_other_truth_and_punishes_other_predictions() -> None:
    truth = np.array([[0, 0, 1, 1, 3, 3]], dtype=np.uint8)
    prediction = np.array([[0, 0, 1, 3, 1, 3]], dtype=np.uint8)
    found = scores(confusion(truth, prediction, N), [0])
    assert found.iou[0] == 1
    assert found.iou[1] == 0.5  # the 3 in its place is wrong, the 1 on true 3 is not seen
    assert found.miou == 0.75
    assert found.scored == (0,)


def test_images_add_up() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, N + 1, (4, 2, 5, 5), dtype=np.uint8)
    total = Confusion(N)
    for truth, prediction in pairs:
        total.add(truth, prediction)
    whole = confusion(pairs[:, 0].reshape(20, 5), pairs[:, 1].reshape(20, 5), N)
    np.testing.assert_array_equal(total.matrix, whole)
    assert total.n_images == 4
    assert total.scores().miou == scores(whole).miou


def test_dtypes_may_differ_and_each_has_its_ignore() -> None:
    truth = np.array([[0, 2, IGNORE]], dtype=np.uint8)
    prediction = np.array([[0, IGNORE_U16, 1]], dtype=np.uint16)
    matrix = confusion(truth, prediction, N)
    assert matrix.sum() == 2
    assert matrix[2, N + 1] == 1


def test_many_classes() -> None:
    truth = np.array([[0, 300, IGNORE_U16]], dtype=np.uint16)
    assert confusion(truth, truth, 300)[300, 300] == 1
    assert scores(confusion(truth, truth, 300)).miou == 1


def test_unusable_maps_are_refused() -> None:
    ok = np.zeros((2, 2), dtype=np.uint8)
    with pytest.raises(DataError, match="one size"):
        confusion(ok, np.zeros((2, 3), dtype=np.uint8), N)
    with pytest.raises(DataError, match="uint8 or uint16"):
        confusion(ok.astype(int), ok, N)
    with pytest.raises(UnknownClassError, match="got 4"):
        confusion(ok + 4, ok, N)
    with pytest.raises(DataError, match=r"0\.\.2"):
        scores(confusion(ok, ok, N), [3])


def test_scores_become_json() -> None:
    classes = ClassTable(("cat", "dog", "cow"))
    found = scores(confusion(np.ones((2, 2), np.uint8), np.ones((2, 2), np.uint8), N), [0, 2]).to_dict(classes)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["iou"] == {"background": None, "cat": 1.0, "cow": None}
    assert found["miou"] == 1.0
    assert found["scored_classes"] == ["cat", "cow"]
    assert scores(np.zeros((N + 1, N + 2), dtype=np.int64)).to_dict(classes)["miou"] is None


# Exactly a threshold, the neighbours of one, or anything.
edges = st.integers(0, 70).map(lambda k: np.float32(k / 100))
one_score = st.one_of(
    edges,
    edges.map(lambda s: np.nextafter(s, np.float32(2))),
    edges.map(lambda s: np.nextafter(s, np.float32(0))),
    edges.map(lambda s: np.float32(s.astype(np.float64) * (1 + 1e-7))),
    st.floats(0, 1, width=32).map(np.float32),
)


@given(
    st.lists(
        st.tuples(
            hnp.arrays(np.uint8, (3, 4), elements=st.sampled_from([0, 1, 2, 3, IGNORE])),
            st.lists(st.integers(0, N - 1), unique=True, max_size=N).flatmap(
                lambda classes: st.tuples(
                    st.just(classes), hnp.arrays(np.float32, (len(classes), 3, 4), elements=one_score)
                )
            ),
        ),
        max_size=3,
    )
)
@settings(max_examples=40, deadline=None)
def test_one_pass_equals_sixty(images: list[tuple[np.ndarray, tuple[list[int], np.ndarray]]]) -> None:
    sweep = Sweep(N)
    for truth, (classes, cam01) in images:
        sweep.add(truth, cam01, np.array(classes, dtype=int))
    for index in range(60):
        passes = Confusion(N)
        for truth, (classes, cam01) in images:
            passes.add(truth, labels_from_cam(cam01, np.array(classes, dtype=int), index / 100, N))
        np.testing.assert_array_equal(sweep.confusion(index), passes.matrix)
    np.testing.assert_array_equal(sweep.miou([0, 2])[30], scores(sweep.confusion(30), [0, 2]).miou)


@pytest.mark.parametrize("nudge", [0, 1, -1])
def test_every_edge_is_on_its_side(nudge: int) -> None:
    towards = np.float32(2 if nudge > 0 else -1)
    values = np.nextafter(SWEEP_THRESHOLDS, towards) if nudge else SWEEP_THRESHOLDS
    sweep = Sweep(1)
    sweep.add(np.zeros((1, 60), dtype=np.uint8), values[None, None], np.array([0]))
    background = [int(sweep.confusion(i)[0, 0]) for i in range(60)]
    assert background == [int((values <= t).sum()) for t in SWEEP_THRESHOLDS]


def test_best_and_curve_agree() -> None:
    sweep = Sweep(1)
    truth = np.array([[0, 0, 1, 1, IGNORE]], dtype=np.uint8)
    sweep.add(truth, np.array([[[0.05, 0.25, 0.3, 0.9, 0.9]]], dtype=np.float32), np.array([0]))
    curve = sweep.curve()
    assert sweep.best() == (0.25, 1.0)
    assert curve["t"][25] == 0.25
    assert curve["miou"][24] < curve["miou"][25] == curve["miou"][29] == 1.0 > curve["miou"][30]
    assert len(curve["t"]) == len(curve["miou"]) == 60


def test_an_empty_sweep_has_a_curve_but_no_best() -> None:
    json.dumps(Sweep(2).curve(), allow_nan=False)
    with pytest.raises(DataError, match="no scored pixel"):
        Sweep(2).best()


def test_sweep_refuses_unusable_maps() -> None:
    truth = np.zeros((2, 2), dtype=np.uint8)
    with pytest.raises(DataError, match=r"\(1, 2, 2\)"):
        Sweep(2).add(truth, np.zeros((1, 2, 3), dtype=np.float32), np.array([0]))
    with pytest.raises(DataError, match="NaN"):
        Sweep(2).add(truth, np.full((1, 2, 2), np.nan, dtype=np.float32), np.array([0]))
    with pytest.raises(DataError, match="class indices"):
        Sweep(2).add(truth, np.zeros((1, 2, 2), dtype=np.float32), np.array([2]))


def square(left: int, value: int = 1) -> np.ndarray:
    labels = np.zeros((40, 40), dtype=np.uint8)
    labels[10:30, left : left + 20] = value
    return labels


def boundary(truth: np.ndarray, prediction: np.ndarray, tolerance_px: float, scored: list[int] | None = None) -> float:
    score = Boundary(N, tolerance_px, scored)
    score.add(truth, prediction)
    return score.mean()


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_outlines_within_the_tolerance_are_right(shift: int) -> None:
    assert boundary(square(8), square(8 + shift), 3) == 1


def test_a_shift_beyond_the_tolerance_loses_the_upright_sides() -> None:
    score = Boundary(N, 1)
    score.add(square(8), square(14))
    # Of its 76 outline pixels those near the other: columns 13..27 of both level sides, where the two overlap and 1 px
    # further, and the two pixels of the upright side next to them.
    near = score.counts[1, 1]
    assert score.counts[1].tolist() == [76, near, 76, near]
    assert near == 2 * 15 + 2
    assert score.per_class()[1] == pytest.approx(near / 76)


@given(label_maps, st.sampled_from([0, 1, 1.5, 3]))
@settings(max_examples=60)
def test_boundary_counts_match_a_slow_peer(maps: tuple[np.ndarray, np.ndarray], tolerance_px: float) -> None:
    truth, prediction = (np.where(m == IGNORE, 0, m).astype(np.uint8) for m in maps)
    score = Boundary(N, tolerance_px)
    score.add(truth, prediction)
    cross = ndimage.generate_binary_structure(2, 1)
    for value in range(N + 1):
        lines = [(m == value) & ~ndimage.binary_erosion(m == value, cross, border_value=1) for m in (prediction, truth)]
        far = [ndimage.distance_transform_edt(~line) if line.any() else np.full(line.shape, 99) for line in lines]
        expected = [
            lines[0].sum(),
            (far[1][lines[0]] <= tolerance_px).sum(),
            lines[1].sum(),
            (far[0][lines[1]] <= tolerance_px).sum(),
        ]
        assert score.counts[value].tolist() == expected


def test_a_narrow_void_band_is_tolerated() -> None:
    truth = square(10)
    edge = ndimage.binary_dilation(truth == 1, iterations=2) & ~ndimage.binary_erosion(truth == 1, iterations=2)
    truth[edge] = IGNORE
    assert boundary(truth, square(10), 3) == 1
    assert boundary(truth, np.zeros_like(truth), 3) == 0


@pytest.mark.parametrize("left", [40, 42, 45])
def test_a_wide_void_takes_no_part(left: int) -> None:
    truth = np.hstack([square(10), np.full((40, 30), IGNORE, dtype=np.uint8)])
    clean = np.hstack([square(10), np.zeros((40, 30), dtype=np.uint8)])
    wild = clean.copy()
    wild[5:20, left:60] = 2
    assert boundary(truth, clean, 3) == boundary(truth, wild, 3) == 1
    assert boundary(clean, wild, 3) < 1


def test_truth_of_other_classes_is_void_for_outlines() -> None:
    truth = np.hstack([square(10), square(10, value=3)])
    prediction = np.hstack([square(10), np.zeros((40, 40), dtype=np.uint8)])
    assert boundary(truth, prediction, 3, [0]) == 1
    assert boundary(truth, prediction, 3) < 1


def test_nothing_to_compare_is_nan() -> None:
    flat = np.zeros((5, 5), dtype=np.uint8)
    assert math.isnan(boundary(flat, flat, 3))
    assert math.isnan(boundary(np.full_like(flat, IGNORE), square(8)[:5, :5], 3))
    assert boundary(square(8), np.zeros((40, 40), dtype=np.uint8), 3) == 0
    assert math.isnan(boundary(np.zeros((1, 1), np.uint8), np.ones((1, 1), np.uint8), 3))


def test_boundary_refuses_unusable_input() -> None:
    with pytest.raises(ConfigError, match="negative"):
        Boundary(N, -1)
    with pytest.raises(DataError, match="class indices"):
        Boundary(N, 1, [N])
    with pytest.raises(DataError, match="one size"):
        Boundary(N, 1).add(square(8), square(8)[:5])


def calibration(images: list[tuple[list[float], list[int]]]) -> Calibration:
    counted = Calibration()
    for one, tags in images:
        counted.add(np.array(one, dtype=np.float32), tags)
    return counted


def test_scores_that_say_how_often_a_class_is_there() -> None:
    """Of four images with score 0.75 three show the class, of four with 0.25 one."""
    images = [([0.75, 0.25], [0, 1] if i == 0 else [0] if i < 3 else []) for i in range(4)]
    assert calibration(images).ece() == 0
    assert calibration(images).brier() == pytest.approx(0.75 * 0.25)


def test_sure_and_wrong_half_the_time() -> None:
    counted = calibration([([1.0, 0.0], [0]), ([1.0, 0.0], [1])])
    assert (counted.ece(), counted.brier()) == (0.5, 0.5)
    assert counted.counts[14].tolist() == [2, 2, 1, 1] and counted.counts[0].tolist() == [2, 0, 1, 1]


images_of_scores = st.lists(
    st.tuples(
        st.lists(st.floats(0, 1, width=32), min_size=N, max_size=N),
        st.lists(st.integers(0, N - 1), unique=True, min_size=1),
    ),
    min_size=1,
    max_size=8,
)


@given(images_of_scores)
def test_ece_follows_its_definition(images: list[tuple[list[float], list[int]]]) -> None:
    pairs = [(score, c in tags) for one, tags in images for c, score in enumerate(one)]
    expected = 0.0
    for b in range(15):
        inside = [pair for pair in pairs if min(int(pair[0] * 15), 14) == b]
        if inside:
            mean, present = (sum(part) / len(inside) for part in zip(*inside, strict=True))
            expected += len(inside) / len(pairs) * abs(mean - present)
    found = calibration(images)
    assert found.ece() == pytest.approx(expected)
    assert found.brier() == pytest.approx(sum((score - there) ** 2 for score, there in pairs) / len(pairs))
    halves = calibration(images[::2])
    halves.counts += calibration(images[1::2]).counts
    assert halves.ece() == pytest.approx(found.ece())


def test_without_tags_nothing_is_said_of_scores() -> None:
    assert math.isnan(Calibration().ece()) and math.isnan(calibration([([0.5, 0.5], [])]).brier())


def test_scores_that_are_none_are_refused() -> None:
    for bad in (-0.5, 1.5, math.nan):
        with pytest.raises(DataError, match=r"\[0, 1\]"):
            calibration([([0.5, bad], [0])])
    with pytest.raises(DataError, match="class indices"):
        calibration([([0.5, 0.5], [2])])
