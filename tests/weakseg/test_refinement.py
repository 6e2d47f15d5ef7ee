import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weakseg.classes import IGNORE, IGNORE_U16, ClassTable
from weakseg.errors import DataError
from weakseg.refinement import REFINERS, Change, refiner_record, signs

CLASSES = ClassTable(("cat", "dog"))
CRF = REFINERS[0]


def counted(*images):
    """images: (before, after, tags)."""
    change = Change(len(CLASSES))
    for before, after, tags in images:
        change.add(np.asarray(before, np.uint8), np.asarray(after, np.uint8), tags)
    return change


def record(change, miou=None):
    return refiner_record(CRF, "val", change, CLASSES, miou or {})


def bars(n, value, out_of=100):
    """(1, out_of) label map whose first n pixels are `value`."""
    return np.where(np.arange(out_of) < n, value, 0)[None].astype(np.uint8)


def test_by_hand():
    before = [[1, 1, 0, 0], [1, 2, 0, 0]]
    after = [[1, 0, 0, 0], [1, 0, 0, 1]]
    out = counted((before, after, (0, 1))).to_dict(CLASSES)
    assert out["n_images"] == 1
    assert out["agreement"] == 5 / 8
    assert out["foreground"] == {"before": 4 / 8, "after": 3 / 8}
    assert out["images"] == {"had": 1, "lost": 1}
    assert out["classes"] == {
        "cat": {"before": 3 / 8, "after": 3 / 8, "had": 1, "lost": 0},
        "dog": {"before": 1 / 8, "after": 0, "had": 1, "lost": 1},
    }


def test_ignore_takes_no_part_in_shares():
    out = counted(([[1, IGNORE, 0, 1]], [[1, 1, IGNORE, 0]], (0,))).to_dict(CLASSES)
    assert (out["agreement"], out["foreground"]) == (1 / 2, {"before": 1.0, "after": 1 / 2})
    nothing = counted(([[IGNORE]], [[1]], (0,))).to_dict(CLASSES)
    assert (nothing["n_images"], nothing["agreement"], nothing["foreground"]["before"]) == (1, None, None)


def test_only_tagged_classes_that_were_there_can_be_lost():
    out = counted(([[0, 1]], [[0, 0]], (1,)), ([[0, 2]], [[2, 0]], (0, 1)), ([[1, 1]], [[0, 0]], ()))
    assert (out.n_images, out.n_had, out.n_lost) == (2, 1, 0), "the image without tags is left out"


def test_another_size_is_refused():
    with pytest.raises(DataError, match="keep the size"):
        counted(([[0, 1]], [[0]], (0,)))


def test_sixteen_bits():
    change = Change(300)
    change.add(np.array([[300, IGNORE_U16]], np.uint16), np.array([[300, 1]], np.uint16), (299,))
    assert change.to_dict(ClassTable(tuple(f"c{i}" for i in range(300))))["agreement"] == 1


PAIRS = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        *[hnp.arrays(np.uint8, (n, n), elements=st.sampled_from([0, 1, 2, IGNORE]))] * 2,
        st.sampled_from([(), (0,), (1,), (0, 1)]),
    )
)


@given(st.lists(PAIRS, max_size=4), st.lists(PAIRS, max_size=4))
def test_parts_add_up(first, second):
    parts = counted(*first)
    parts.merge(counted(*second))
    assert parts.to_dict(CLASSES) == counted(*first, *second).to_dict(CLASSES)


@given(st.lists(PAIRS, max_size=4))
def test_nothing_changed_is_no_reason_to_warn(pairs):
    same = record(counted(*((before, before, tags) for before, _, tags in pairs)))
    assert same["agreement"] in (None, 1) and same["images"]["lost"] == 0
    assert same["warning"] is None


def test_with_truth_miou_decides():
    wiped = counted(*[(bars(50, 1), bars(1, 1), (0,))] * 20)
    assert signs(record(wiped))
    better = record(wiped, {"cam": 0.30, "cam_crf": 0.31})
    assert (better["warning"], better["miou"]) == (None, {"before": 0.30, "after": 0.31})
    assert record(wiped, {"cam": 0.3002, "cam_crf": 0.3})["warning"] is None, "less than a report shows"
    worse = record(counted(), {"cam": 0.295, "cam_crf": 0.284})["warning"]
    assert worse.startswith("the refiner crf lowers mIoU on val from 29.5 to 28.4, by 1.1 points. Try: ")
    assert "--pseudo_label.crf none" in worse and "bilateral_sxy" in worse


@pytest.mark.parametrize(
    ("images", "sign"),
    [
        ([(bars(50, 1), bars(39, 1), (0,))], "the foreground shrinks from 50.0% to 39.0% of the pixels"),
        ([(bars(20, 1), bars(41, 1), (0,))], "the foreground grows from 20.0% to 41.0% of the pixels"),
        ([(bars(20, 1), bars(20, 1), (0,))] * 5 + [(bars(1, 2), bars(0, 2), (1,))], "vanishes from 1 of 6 images"),
        ([(bars(80, 1), bars(80, 2), (0, 1))] * 9, "only 20.0% of the pixels keep their label"),
        ([(bars(90, 1), bars(88, 1), (0,)), (bars(9, 2), bars(4, 2), (1,))] * 10, "less than half is left of dog"),
    ],
)
def test_signs_without_truth(images, sign):
    warned = record(counted(*images))["warning"]
    assert sign in warned and "without true masks" in warned and "Try: " in warned


def test_at_the_bounds_nothing_is_said():
    kept = [(bars(50, 1), bars(40, 1), (0,))]
    grown = [(bars(20, 1), bars(40, 1), (0,))]
    few = [(bars(90, 1), bars(88, 1), (0,)), (bars(9, 2), bars(4, 2), (1,))] * 9
    lost = [(bars(50, 1), bars(50, 1), (0,))] * 17 + [(bars(1, 2), bars(0, 2), (1,))] * 3
    for images in (kept, grown, few, lost):
        assert signs(record(counted(*images))) == []


def test_every_refiner_has_its_own_name_and_advice():
    assert len({refiner.name for refiner in REFINERS}) == len(REFINERS)
    assert all(refiner.before != refiner.after and refiner.advice for refiner in REFINERS)
