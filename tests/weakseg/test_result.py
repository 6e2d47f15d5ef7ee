import io
import json

import numpy as np
import pytest
from PIL import Image

from weakseg.classes import ClassTable
from weakseg.errors import DataError, UsageError
from weakseg.masks.png import labels_from_png, png_from_labels, provenance_of
from weakseg.result import Result
from weakseg.threshold import Threshold

CLASSES = ClassTable(("cat", "dog"))
LABELS = np.array([[0, 1, 2], [255, 255, 0]], dtype=np.uint8)
PHOTO = np.full((2, 3, 3), 100, dtype=np.uint8)


def result(**fields) -> Result:
    return Result(CLASSES, CLASSES.palette(), 2, 3, **fields)


def test_mask_prefers_the_segmentation():
    assert result(segmentation=LABELS, pseudo_mask=LABELS * 0).mask is LABELS
    assert result(pseudo_mask=LABELS).mask is LABELS


def test_no_mask_says_what_to_ask_for():
    with pytest.raises(UsageError, match="outputs="):
        _ = result().mask


def test_legend_names_classes_only():
    assert result(segmentation=LABELS).legend() == {"cat": (128, 0, 0), "dog": (0, 128, 0)}


def test_overlay_mixes_colours_and_leaves_background():
    out = np.asarray(result(segmentation=LABELS, image=PHOTO).overlay(alpha=0.5))
    np.testing.assert_array_equal(out[0, 0], [100, 100, 100])
    np.testing.assert_array_equal(out[0, 1], [114, 50, 50])
    np.testing.assert_array_equal(out[0, 2], [50, 114, 50])
    np.testing.assert_array_equal(PHOTO, 100)


def test_overlay_hatches_ignore():
    labels = np.full((16, 16), 255, dtype=np.uint8)
    photo = np.zeros((16, 16, 3), dtype=np.uint8)
    out = np.asarray(Result(CLASSES, CLASSES.palette(), 16, 16, pseudo_mask=labels, image=photo).overlay(alpha=1))
    striped = (out == [224, 224, 192]).all(axis=2)
    assert striped.mean() == 0.5
    assert (out[~striped] == 0).all()


def test_overlay_ends():
    whole = result(segmentation=LABELS, image=PHOTO)
    np.testing.assert_array_equal(np.asarray(whole.overlay(alpha=0)), PHOTO)
    with pytest.raises(UsageError, match="alpha"):
        whole.overlay(alpha=1.1)


def test_overlay_needs_the_right_image():
    with pytest.raises(UsageError, match="image="):
        result(segmentation=LABELS).overlay()
    with pytest.raises(DataError, match=r"\(2, 3, 3\)"):
        result(segmentation=LABELS).overlay(image=PHOTO[:1])
    assert result(segmentation=LABELS).overlay(image=PHOTO).size == (3, 2)


def test_save_png(tmp_path):
    path = result(segmentation=LABELS).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(labels_from_png(path.read_bytes()), LABELS)
    assert [p.name for p in tmp_path.iterdir()] == ["mask.png"]


def test_a_saved_mask_says_how_it_was_made(tmp_path):
    refinement = {"band": 0.3, "crf": {"iterations": 10}}
    threshold = Threshold(0.35, "otsu", "Otsu's method, größer")
    both = result(
        segmentation=LABELS,
        pseudo_mask=LABELS * 0,
        model="m/1",
        model_sha256="ab",
        threshold=threshold,
        refinement=refinement,
    )
    segmented = {"mask": "segmentation", "model": "m/1", "model_sha256": "ab"}
    pseudo = segmented | {"mask": "pseudo_mask"} | threshold.to_dict() | refinement
    assert provenance_of(both.save(tmp_path / "mask.png").read_bytes()) == segmented
    assert provenance_of(both.mask_png("pseudo_mask")) == pseudo
    np.testing.assert_array_equal(labels_from_png(both.mask_png("pseudo_mask")), LABELS * 0)
    with np.load(both.save(tmp_path / "r.npz"), allow_pickle=False) as data:
        assert json.loads(str(data["segmentation_provenance"])) == segmented
        assert json.loads(str(data["pseudo_mask_provenance"])) == pseudo
    unknown = result(segmentation=LABELS)
    assert provenance_of(unknown.mask_png()) == {"mask": "segmentation"}
    assert unknown.mask_png() == png_from_labels(LABELS, CLASSES.palette(), unknown.mask_text("segmentation"))
    with pytest.raises(UsageError, match="no pseudo_mask"):
        unknown.mask_png("pseudo_mask")


def test_save_npz(tmp_path):
    heatmaps = {"dog": np.full((1, 1), 0.5, np.float32)}
    full = result(segmentation=LABELS, pseudo_mask=LABELS, heatmaps=heatmaps, scores={"cat": 0.1, "dog": 0.9})
    with np.load(full.save(tmp_path / "r.npz"), allow_pickle=False) as data:
        np.testing.assert_array_equal(data["segmentation"], LABELS)
        np.testing.assert_array_equal(data["pseudo_mask"], LABELS)
        assert data["classes"].tolist() == ["cat", "dog"]
        assert data["heatmap_classes"].tolist() == ["dog"]
        assert data["heatmaps"].shape == (1, 1, 1)
        np.testing.assert_allclose(data["scores"], [0.1, 0.9], rtol=1e-6)


def test_save_elsewhere_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"\.png or \.npz"):
        result(segmentation=LABELS).save(tmp_path / "mask.jpg")


def test_notebook_picture():
    shown = Image.open(io.BytesIO(result(segmentation=LABELS, image=PHOTO)._repr_png_()))
    assert shown.size == (3, 2)
    assert Image.open(io.BytesIO(result(segmentation=LABELS)._repr_png_())).mode == "P"
    assert result()._repr_png_() is None


def test_repr_is_short():
    assert repr(result(segmentation=LABELS, model="m/1")) == "<Result m/1 · 3x2 · segmentation · shows cat, dog>"
    assert repr(result(pseudo_mask=LABELS * 0)) == "<Result 3x2 · pseudo_mask · shows background only>"


def test_16_bit_masks():
    names = tuple(f"c{i}" for i in range(300))
    labels = np.array([[0, 300, 65535]], dtype=np.uint16)
    palette = np.resize(CLASSES.palette(), (65536, 3))
    big = Result(ClassTable(names), palette, 1, 3, segmentation=labels, image=np.zeros((1, 3, 3), np.uint8))
    assert list(big.legend()) == ["c299"]
    assert big.overlay().size == (3, 1)
    np.testing.assert_array_equal(labels_from_png(big.mask_png()), labels)
