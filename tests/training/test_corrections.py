"""Masks that people corrected: the network sees them, in every round and form of labels, in place of its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from training import corrections, train_segmentation
from training.corrections import Corrected, certain
from training.data import UNLABELLED, Batch, TrainingImages
from training.pseudo_masks import PseudoMasks, write_soft
from training.self_training import FOLDER
from weakseg.classes import IGNORE
from weakseg.datasets import read
from weakseg.errors import DataError
from weakseg.masks.png import labels_from_png, png_from_labels, provenance_of
from weakseg.progress import Progress
from weakseg.recipe import OptimConfig, Recipe
from weakseg.run import run
from weakseg.run_folder import mask_path, soft_path

QUIET = Progress("silent")
SIZE = (48, 64)
WHOLE = OptimConfig(crop_px=64, long_side_px=(64, 64), flip=False, jitter=0.0)  # of the squares, an image as it is


def with_corrections(recipe: Recipe, path: Path, **more: object) -> Recipe:
    assert recipe.train_seg is not None
    return replace(recipe, train_seg=replace(recipe.train_seg, corrections=str(path), **more))


def write_masks(folder: Path, **values: int) -> Path:
    """A mask of one value for each image."""
    folder.mkdir(exist_ok=True)
    for name, value in values.items():
        (folder / f"{name.removeprefix('i')}.png").write_bytes(png_from_labels(np.full(SIZE, value, np.uint8)))
    return folder


@pytest.fixture
def weak(recipe: Recipe) -> Recipe:
    """The squares without a CRF and with one epoch: the network's labels matter here, not what it learns."""
    optim = replace(recipe.train.optim, epochs=1)
    crf = replace(recipe.pseudo_label, crf=None)
    return replace(recipe, train=replace(recipe.train, optim=optim), pseudo_label=crf)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its pseudo-masks; made by the first test that needs it (the recipe fixture is per function)."""
    return tmp_path_factory.mktemp("begun") / "run"


@pytest.fixture
def folder(weak: Recipe, begun: Path, tmp_path: Path) -> Path:
    run(weak, begun, last="pseudo_label", progress=QUIET)
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[tuple[int, ...]]]:
    """{sample id: label sets of its crops}, as the loss of the segmentation network gets them."""
    sets: dict[str, set[tuple[int, ...]]] = {}
    losses = train_segmentation.segmentation_losses

    def watched(model, batch: Batch, moment, *, balance: str):
        assert batch.labels is not None
        for sample_id, labels in zip(batch.ids, batch.labels, strict=True):
            values = labels if labels.ndim == 2 else labels[..., 0]
            sets.setdefault(sample_id, set()).add(tuple(values.unique().tolist()))
        return losses(model, batch, moment, balance=balance)

    monkeypatch.setattr(train_segmentation, "segmentation_losses", watched)
    return sets


# What a source of labels gives ----------------------------------------------------------------------------------------


def test_the_network_gets_the_corrected_mask_pixel_for_pixel(weak: Recipe, tmp_path: Path) -> None:
    dataset = read(weak.data, "train")
    labels = np.random.default_rng(0).choice(np.array([0, 1, 2, 3, IGNORE], np.uint8), SIZE)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/001.png").write_bytes(png_from_labels(labels))
    ids, record = corrections.keep(with_corrections(weak, tmp_path / "masks"), tmp_path / "stage", dataset, QUIET)
    assert ids == {"001"} and record is not None and record["n_images"] == 1
    expected = np.where(labels == IGNORE, UNLABELLED, labels.astype(np.int64))
    for soft in (False, True):
        for sample in dataset:
            mask = mask_path(tmp_path, "train", sample.id)
            mask.parent.mkdir(parents=True, exist_ok=True)
            mask.write_bytes(png_from_labels(np.full(SIZE, 2, np.uint8)))
            write_soft(soft_path(tmp_path, "train", sample.id), np.full((*SIZE, 3), (2, 1, 200), np.uint8))
        source = Corrected(PseudoMasks(tmp_path, "train", soft=soft), tmp_path / "stage", ids)
        images = TrainingImages(dataset, WHOLE, (0, 0, 0), 0, source)
        for index, sample in enumerate(dataset):
            got = images[0, index][2]
            assert got is not None
            first = got[..., 0].numpy() if soft else got.numpy()
            rows = first[(first != UNLABELLED).any(axis=1)]  # without the padding of the square crop
            np.testing.assert_array_equal(rows, expected if sample.id == "001" else np.full(SIZE, 2))
            if soft and sample.id == "001":
                inside = got[(got[..., 0] != UNLABELLED).any(dim=1)]
                assert (inside[..., 2] == 255).all(), "all of it is the first class's"


def test_certain_labels_of_many_classes() -> None:
    labels = np.array([[0, 300, 65535]], np.uint16)
    assert certain(labels).tolist() == [[[0, 0, 255], [300, 300, 255], [65535, 65535, 255]]]
    assert certain(labels).dtype == np.uint16


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_learns_from_corrections_and_again_when_they_change(
    weak: Recipe, folder: Path, tmp_path: Path, seen
) -> None:
    masks = write_masks(tmp_path / "masks", i000=3, i003=2)
    plain = run(weak, folder, last="train_seg", progress=QUIET)
    assert "corrections" not in plain["train_seg"]["summary"]
    without = {sample_id: set().union(*sets) for sample_id, sets in seen.items()}
    assert 3 not in without["000"] and without["003"] <= {0, UNLABELLED}, "blue is 1, and nothing is in 003"
    first = (folder / "train_seg/segmentation.pt").read_bytes()
    seen.clear()
    done = run(with_corrections(weak, masks), folder, last="train_seg", progress=QUIET)
    assert seen["000"] <= {(3,), (UNLABELLED, 3)} and seen["003"] <= {(2,), (UNLABELLED, 2)}
    for sample_id in without.keys() - {"000", "003"}:
        assert set().union(*seen[sample_id]) == without[sample_id]
    assert (folder / "train_seg/segmentation.pt").read_bytes() != first
    record = done["train_seg"]["summary"]["corrections"]
    assert record["n_images"] == record["n_beyond_tags"] == 2 and len(record["sha256"]) == 64
    kept = mask_path(folder / "train_seg", "train", "000", "corrections").read_bytes()
    assert (labels_from_png(kept) == 3).all()
    assert provenance_of(kept) == {"mask": "correction", "recipe": "squares", "seed": 0, "sha256": record["sha256"]}

    write_masks(masks, i000=1)
    seen.clear()
    again = run(with_corrections(weak, masks), folder, last="train_seg", progress=QUIET)
    assert seen["000"] <= {(1,), (UNLABELLED, 1)} and seen["003"] <= {(2,), (UNLABELLED, 2)}
    assert [again[stage] == done[stage] for stage in again] == [True, True, True, False]
    seen.clear()
    assert run(with_corrections(weak, masks), folder, last="train_seg", progress=QUIET) == again and not seen


def test_a_round_never_relabels_a_corrected_image(weak: Recipe, folder: Path, tmp_path: Path, seen) -> None:
    """The first round from soft labels, the second from its network's."""
    weak = replace(weak, pseudo_label=replace(weak.pseudo_label, soft=True))
    config = with_corrections(weak, write_masks(tmp_path / "masks", i001=3), rounds=2, sure=0.0)
    run(config, folder, last="train_seg", progress=QUIET)
    assert seen["001"] <= {(3,), (UNLABELLED, 3)}
    relabelled = {path.stem for path in (folder / "train_seg/round-1" / FOLDER / "train").iterdir()}
    assert relabelled == {sample.id for sample in read(weak.data, "train")} - {"001"}


def test_every_image_may_be_corrected(weak: Recipe, folder: Path, tmp_path: Path, seen) -> None:
    values = {f"i{sample.id}": 2 for sample in read(weak.data, "train")}
    config = with_corrections(weak, write_masks(tmp_path / "masks", **values), rounds=2)
    run(config, folder, last="train_seg", progress=QUIET)
    assert len(seen) == 8 and set().union(*seen.values()) <= {(2,), (UNLABELLED, 2)}


def test_coco_corrections_of_a_run(weak: Recipe, folder: Path, tmp_path: Path, seen) -> None:
    height, width = SIZE
    content = {
        "images": [{"id": 4, "file_name": "002.jpg", "height": height, "width": width}],
        "annotations": [{"id": 1, "image_id": 4, "category_id": 9, "segmentation": [[0, 0, 64, 0, 64, 48, 0, 48]]}],
        "categories": [{"id": 9, "name": "green"}],
    }
    (tmp_path / "masks.json").write_text(json.dumps(content))
    run(with_corrections(weak, tmp_path / "masks.json"), folder, last="train_seg", progress=QUIET)
    assert seen["002"] <= {(2,), (UNLABELLED, 2)}


def test_bad_corrections_are_refused_before_the_classifier(weak: Recipe, tmp_path: Path, seen) -> None:
    masks = write_masks(tmp_path / "masks", i000=1, i999=1)
    with pytest.raises(DataError, match=r"got '999.png': 1 of 2 lead to an image"):
        run(with_corrections(weak, masks), tmp_path / "run", progress=QUIET)
    assert not (tmp_path / "run/train").exists() and not seen
    with pytest.raises(DataError, match=r"got '999.png'"):  # and by the stage itself
        train_segmentation.run(with_corrections(weak, masks), tmp_path / "run", stage="train_seg", progress=QUIET)


def test_where_masks_and_tags_differ_is_said(weak: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = read(weak.data, "train")
    values = {
        "i000": 1,
        "i001": 3,
        "i003": 3,
        "i004": 0,
    }  # as tagged; red for green; red for nothing; nothing for green
    masks = write_masks(tmp_path / "masks", **values)
    _, record = corrections.keep(with_corrections(weak, masks), tmp_path / "stage", dataset, Progress("lines"))
    said = capsys.readouterr().err
    assert "corrections: 4 of 8 images of train have corrected masks" in said
    assert "warning: corrected masks of 2 images have classes that their tags lack (red in 2)" in said
    assert "warning: corrected masks of 1 images are background alone" in said
    assert record is not None and (record["n_images"], record["n_beyond_tags"], record["n_empty"]) == (4, 2, 1)


def test_the_upper_bound_has_no_corrections(weak: Recipe, folder: Path, tmp_path: Path, seen) -> None:
    config = with_corrections(weak, write_masks(tmp_path / "masks", i000=3))
    summary = train_segmentation.run(config, folder, stage="train_seg_full", progress=QUIET)
    assert "corrections" not in summary and 3 not in set().union(*seen["000"])
    assert not (folder / "train_seg_full/corrections").exists()
