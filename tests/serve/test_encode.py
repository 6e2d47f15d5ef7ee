"""What serve/encode.py writes, weakseg/wire.py reads: for any label map and any CAM."""

import numpy as np
import pycocotools.mask as mask_api
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serve.encode import check_mask_encoding, class_infos, duration_from_seconds, heatmap_from_cam01, mask_from_labels
from weakseg.classes import IGNORE, IGNORE_U16, ClassTable
from weakseg.errors import DataError, OutputUnsupportedError
from weakseg.manifest import colour_table, palette_for
from weakseg.masks.png import text_of
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.wire import cam01_from_heatmap, info_from_message, labels_from_mask

SIDES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)
FEW, MANY = ClassTable(tuple("abc")), ClassTable(tuple(f"c{i}" for i in range(300)))
ENCODINGS = ("PNG_INDEX", "COCO_RLE", "POLYGON", "RAW_U8", "RAW_U16")


def encoding(name):
    return getattr(pb, f"MASK_ENCODING_{name}")


@settings(max_examples=40, deadline=None)
@given(labels=hnp.arrays(np.uint8, SIDES, elements=st.sampled_from([0, 1, 2, 3, IGNORE])))
@pytest.mark.parametrize("name", ENCODINGS)
def test_a_label_map_survives(name, labels):
    mask = mask_from_labels(labels, encoding(name), colour_table(palette_for(FEW)), ignore=True)
    back = labels_from_mask(pb.Mask.FromString(mask.SerializeToString()), FEW)
    np.testing.assert_array_equal(back, labels)
    assert back.dtype == np.uint8 and mask.ignore_index == IGNORE


@settings(max_examples=40, deadline=None)
@given(labels=hnp.arrays(np.uint16, SIDES, elements=st.sampled_from([0, 1, 255, 300, IGNORE_U16])))
@pytest.mark.parametrize("name", ["PNG_INDEX", "COCO_RLE", "POLYGON", "RAW_U16"])
def test_a_label_map_of_many_classes_survives(name, labels):
    mask = mask_from_labels(labels, encoding(name), colour_table(palette_for(MANY)), ignore=True)
    back = labels_from_mask(mask, MANY)
    np.testing.assert_array_equal(back, labels)
    assert back.dtype == np.uint16 and mask.ignore_index == IGNORE_U16


@settings(max_examples=40, deadline=None)
@given(cam01=hnp.arrays(np.float32, SIDES, elements=st.floats(0, 1, width=32)))
@pytest.mark.parametrize(("name", "atol"), [("RAW_F32", 0), ("RAW_F16", 5e-4), ("PNG_GRAY8", 0.5 / 255 + 1e-6)])
def test_a_heatmap_survives(name, atol, cam01):
    heatmap = heatmap_from_cam01(cam01, 2, getattr(pb, f"HEATMAP_ENCODING_{name}"))
    np.testing.assert_allclose(cam01_from_heatmap(heatmap), cam01, atol=atol, rtol=0)
    assert (heatmap.class_id, heatmap.height, heatmap.width) == (2, *cam01.shape)


def test_unspecified_is_png():
    palette = colour_table(palette_for(FEW))
    labels = np.zeros((2, 3), np.uint8)
    assert mask_from_labels(labels, encoding("UNSPECIFIED"), palette, ignore=False).encoding == encoding("PNG_INDEX")
    assert heatmap_from_cam01(labels.astype(np.float32), 1, 0).encoding == pb.HEATMAP_ENCODING_PNG_GRAY8


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools under NumPy 2
def test_coco_rle_is_cocos():
    labels = np.array([[0, 1, 1], [2, 2, 1]], np.uint8)
    mask = mask_from_labels(labels, encoding("COCO_RLE"), colour_table(palette_for(FEW)), ignore=False)
    assert [rle.class_id for rle in mask.rle] == [1, 2]
    for rle in mask.rle:
        np.testing.assert_array_equal(mask_api.decode({"size": [2, 3], "counts": rle.counts}), labels == rle.class_id)


def test_polygons_are_pixel_edges_from_the_top_left_corner():
    labels = np.array([[0, 0, 0, 0], [0, 2, 2, 2], [0, 2, 0, 2], [0, 2, 2, 2]], np.uint8)
    mask = mask_from_labels(labels, encoding("POLYGON"), colour_table(palette_for(FEW)), ignore=False)
    (polygon,) = mask.polygons
    assert (polygon.class_id, polygon.outer.xy) == (2, [1, 1, 4, 1, 4, 4, 1, 4])
    (hole,) = polygon.holes
    assert sorted(zip(hole.xy[::2], hole.xy[1::2], strict=True)) == [(2, 2), (2, 3), (3, 2), (3, 3)]


@settings(max_examples=40, deadline=None)
@given(labels=hnp.arrays(np.uint8, SIDES, elements=st.sampled_from([0, 1, 2, 3, IGNORE])), tolerance=st.floats(0, 0.5))
def test_a_label_map_survives_polygons_with_a_tolerance(labels, tolerance):
    palette = colour_table(palette_for(FEW))
    mask = mask_from_labels(labels, encoding("POLYGON"), palette, ignore=True, tolerance_px=tolerance)
    np.testing.assert_array_equal(labels_from_mask(pb.Mask.FromString(mask.SerializeToString()), FEW), labels)


def test_encodings_that_a_model_does_not_have():
    for name in ENCODINGS:
        check_mask_encoding(encoding(name), FEW)
    with pytest.raises(OutputUnsupportedError, match="300: ask for RAW_U16"):
        check_mask_encoding(encoding("RAW_U8"), MANY)


def test_a_png_says_how_its_mask_was_made():
    labels, palette = np.zeros((2, 3), np.uint8), colour_table(palette_for(FEW))
    for name in ENCODINGS:
        mask = mask_from_labels(labels, encoding(name), palette, ignore=False, text={"weakseg": "{}"})
        np.testing.assert_array_equal(labels_from_mask(mask, FEW), labels)
        if name == "PNG_INDEX":
            assert text_of(mask.data) == {"weakseg": "{}"}
        else:
            assert mask == mask_from_labels(labels, encoding(name), palette, ignore=False)


def test_damaged_rasters_are_errors():
    with pytest.raises(DataError, match="2 x 3 values"):
        labels_from_mask(pb.Mask(width=3, height=2, encoding=encoding("RAW_U8"), data=bytes(5)), FEW)
    mask = mask_from_labels(
        np.zeros((2, 3), np.uint8), encoding("PNG_INDEX"), colour_table(palette_for(FEW)), ignore=False
    )
    mask.width = 4
    with pytest.raises(DataError, match="4x2, got 3x2"):
        labels_from_mask(mask, FEW)


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        (pb.Polygon(class_id=1, outer=pb.Ring(xy=[0, 0, 1, 0, 1])), "pairs x, y, got 5"),
        (pb.Polygon(class_id=1), "at least 3 finite points"),
        (pb.Polygon(class_id=1, outer=pb.Ring(xy=[0, 0, 1, 0, float("nan"), 1])), "at least 3 finite points"),
        (pb.Polygon(class_id=300, outer=pb.Ring(xy=[0, 0, 1, 0, 1, 1])), "a polygon of 300"),
    ],
)
def test_damaged_polygons_are_errors(polygon, message):
    with pytest.raises(DataError, match=message):
        labels_from_mask(pb.Mask(width=3, height=2, encoding=encoding("POLYGON"), polygons=[polygon]), FEW)


def test_a_class_table_survives():
    palette = colour_table(palette_for(FEW))
    info = info_from_message(pb.Model(classes=class_infos(FEW.names, palette_for(FEW)), state=pb.MODEL_STATE_READY))
    assert (info.classes, info.state) == (FEW, "ready")
    np.testing.assert_array_equal(info.palette, palette)


@given(seconds=st.floats(0, 1e6))
def test_durations_are_exact_to_the_nanosecond(seconds):
    duration = duration_from_seconds(seconds)
    assert duration.seconds + duration.nanos / 1e9 == pytest.approx(seconds, abs=1e-9, rel=1e-15)
    assert 0 <= duration.nanos < 10**9
