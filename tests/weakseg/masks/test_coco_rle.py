import contextlib

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from pycocotools import mask as coco

from weakseg.errors import DataError
from weakseg.masks.coco_rle import (
    counts_from_string,
    labels_from_rles,
    mask_from_rle,
    rle_from_mask,
    rles_from_labels,
    string_from_counts,
)

# pycocotools 2.0.11 predates NumPy 2's `copy` keyword and is warned about it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)
masks = hnp.arrays(bool, shapes)
label_maps = hnp.arrays(np.uint8, shapes, elements=st.sampled_from([0, 1, 2, 7, 255]))


@given(masks)
def test_encodes_as_pycocotools(mask):
    expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    assert rle_from_mask(mask) == expected


@given(masks)
def test_decodes_what_pycocotools_wrote(mask):
    counts = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    np.testing.assert_array_equal(mask_from_rle(counts, *mask.shape), mask)


@given(label_maps)
def test_labels_round_trip(labels):
    rles = rles_from_labels(labels)
    assert list(rles) == [v for v in np.unique(labels) if v != 0]
    np.testing.assert_array_equal(labels_from_rles(rles, *labels.shape), labels)
    for value, rle in rles.items():
        decoded = coco.decode({"size": list(labels.shape), "counts": rle})
        np.testing.assert_array_equal(decoded.astype(bool), labels == value)


@given(hnp.arrays(np.int64, st.integers(0, 30), elements=st.integers(0, 2**40)))
def test_counts_round_trip(counts):
    before = counts.copy()
    np.testing.assert_array_equal(counts_from_string(string_from_counts(counts)), counts)
    np.testing.assert_array_equal(counts, before)


def test_large_runs_as_pycocotools():
    mask = np.zeros((3000, 2000), dtype=bool)
    mask[5:2900, 3:1990] = True
    mask[100:120] = False
    assert rle_from_mask(mask) == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]


def test_uint16_labels():
    labels = np.array([[0, 300], [65535, 300]], dtype=np.uint16)
    rles = rles_from_labels(labels)
    assert list(rles) == [300, 65535]
    np.testing.assert_array_equal(labels_from_rles(rles, 2, 2, np.uint16), labels)


@pytest.mark.parametrize("bad", [b"04", b"\x0f", b"~~", b"0P", b"", b"PPPPPPPPPPPPP0"])
def test_damaged_counts_are_refused(bad):
    with pytest.raises(DataError, match="run lengths"):
        mask_from_rle(bad, 2, 3)


def test_runs_whose_sum_wraps_around():
    rle = string_from_counts(np.array([2**58] * 63 + [2**58 + 12]))
    with pytest.raises(DataError, match="expected run lengths of 3 x 4 pixels, got a sum of 18446744073709551628"):
        mask_from_rle(rle, 3, 4)


@given(st.binary(max_size=40))
def test_any_bytes_decode_or_raise(data):
    with contextlib.suppress(DataError):
        assert mask_from_rle(data, 2, 3).shape == (2, 3)
