"""Maps and label maps that methods of seeds learn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from training import seeds
from training.data import UNLABELLED, TrainingImages
from training.models import build_backbone, load_model
from training.models.pixel_classifier import PixelClassifier
from training.seeds import SeedLabels, make_seed_labels, seed_labels, seed_map, shared_out, start_backbone
from weakseg.classes import BACKGROUND, IGNORE, IGNORE_U16
from weakseg.datasets import Sample, read
from weakseg.errors import ConfigError, DatasetError
from weakseg.files import write_bytes_atomic
from weakseg.masks.png import labels_from_png, png_from_labels, provenance_of
from weakseg.progress import Progress
from weakseg.recipe import BackboneConfig, GuidedConfig, OptimConfig, Recipe, SaliencyConfig, SecConfig

QUIET = Progress("silent")


def labels_of(
    cam01: object, tags: list[int], salient: object = None, seed: float = 0.2, background: float = 0.0
) -> list[list[int]]:
    maps, classes = np.array(cam01, np.float32), np.array(tags, np.int32)
    seen = None if salient is None else np.array(salient, np.float32)
    made: list[list[int]] = seed_labels(maps, classes, seen, 9, seed, background).tolist()
    return made


# The budget -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "share", "first"), [(6, 0.5, 3), (10, 0.25, 2), (2, 0.5, 1), (3, 0.6, 2)])
def test_epochs_are_shared_out(epochs: int, share: float, first: int) -> None:
    one, other = shared_out(OptimConfig(epochs=epochs, lr=0.3), SecConfig(seeds_share=share, lr_scale=1.0))
    assert (one.epochs, other.epochs) == (first, epochs - first)
    assert replace(one, epochs=epochs) == replace(other, epochs=epochs) == OptimConfig(epochs=epochs, lr=0.3)


@pytest.mark.parametrize(("epochs", "share"), [(1, 0.5), (4, 0.0), (4, 1.0), (4, 0.1)])
def test_a_budget_of_nothing_is_refused(epochs: int, share: float) -> None:
    with pytest.raises(ConfigError, match="raise train.optim.epochs or choose a share nearer to 0.5"):
        shared_out(OptimConfig(epochs=epochs), SecConfig(seeds_share=share))


@pytest.mark.parametrize("config", [SecConfig(lr_scale=0.25), GuidedConfig(lr_scale=0.25)])
def test_seeds_are_learnt_from_at_a_share_of_the_learning_rate(config: SecConfig | GuidedConfig) -> None:
    one, other = shared_out(OptimConfig(epochs=6, lr=0.2), config)
    assert (one.lr, other.lr) == (0.2, 0.05)
    with pytest.raises(ConfigError, match="lr_scale must be above 0, got -1"):
        shared_out(OptimConfig(epochs=6), replace(config, lr_scale=-1.0))


# Seeds of drawn maps --------------------------------------------------------------------------------------------------


def test_a_class_is_seeded_where_its_map_is_a_share_of_its_maximum() -> None:
    assert labels_of([[[0.8, 0.4, 0.39, 0.0]]], [4], seed=0.5) == [[5, 5, IGNORE, IGNORE]]
    assert labels_of([[[0.8, 0.4, 0.39, 0.0]]], [4], seed=1.0) == [[5, IGNORE, IGNORE, IGNORE]]


def test_a_map_without_an_answer_has_no_seeds() -> None:
    assert labels_of([[[0.0, 0.0]], [[0.0, 1.0]]], [0, 1]) == [[IGNORE, 2]]


def test_of_several_the_one_with_fewer_seeds_has_a_pixel() -> None:
    large, small = [[1.0, 1.0, 1.0, 0.0]], [[0.0, 1.0, 1.0, 0.0]]
    assert labels_of([large, small], [0, 1]) == [[1, 2, 2, IGNORE]]
    assert labels_of([small, large], [0, 1]) == [[2, 1, 1, IGNORE]]
    assert labels_of([small, small], [0, 1]) == [[IGNORE, 2, 2, IGNORE]]  # of equals, the last


def test_background_is_where_an_image_is_least_salient() -> None:
    salient = [[0.4, 0.1, 0.2, 0.3]]
    assert labels_of([[[1.0, 0.0, 0.0, 0.0]]], [0], salient, background=0.25) == [[1, 0, IGNORE, IGNORE]]
    assert labels_of([[[1.0, 0.0, 0.0, 0.0]]], [0], salient, background=0.5) == [[1, 0, 0, IGNORE]]
    assert labels_of([[[1.0, 0.0, 0.0, 0.0]]], [0], salient, background=0.0) == [[1, IGNORE, IGNORE, IGNORE]]


def test_background_takes_part_in_conflicts() -> None:
    cam, salient = [[[1.0, 1.0, 1.0, 0.0]]], [[0.0, 0.5, 0.9, 0.8]]
    assert labels_of(cam, [0], salient, background=0.25) == [[0, 1, 1, IGNORE]]  # 1 pixel against 3
    assert labels_of([[[1.0, 0.0, 0.0, 0.0]]], [0], salient, background=0.5) == [[1, 0, IGNORE, IGNORE]]  # 2 against 1


def test_pixels_that_are_as_little_salient_go_together() -> None:
    """Files of saliency are often black but for the object: there is no tenth of a black that is blacker."""
    assert labels_of([[[1.0, 0.0, 0.0, 0.0]]], [0], [[1, 0, 0, 0]], background=0.25) == [[1, 0, 0, 0]]
    assert labels_of([[[1.0, 0.0, 0.0, 0.0]]], [0], [[3, 3, 3, 3]], background=0.25) == [[1] + 3 * [IGNORE]]


def test_without_saliency_background_is_where_all_maps_are_low() -> None:
    cam = [[[1.0, 0.0, 0.0, 0.08]], [[0.0, 0.1, 1.0, 0.05]]]
    assert labels_of(cam, [0, 1], None, background=0.25) == [[1, IGNORE, 2, 0]]


def test_an_image_without_tags_is_background() -> None:
    made = seed_labels(np.zeros((0, 2, 3), np.float32), np.zeros(0, np.int32), None, 9, 0.2, 0.1)
    assert made.tolist() == [[BACKGROUND] * 3] * 2


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 3),
    background=st.floats(0, 0.99),
    share=st.floats(0.01, 1),
    zeros=st.booleans(),
)
def test_seeds_are_of_tags_and_background(seed: int, n: int, background: float, share: float, zeros: bool) -> None:
    rng = np.random.default_rng(seed)
    cam, salient = rng.random((n, 5, 7), np.float32), rng.random((5, 7), np.float32)
    if zeros:
        cam, salient = np.maximum(cam - 0.5, 0), np.maximum(salient - 0.5, 0)
    before = cam.copy(), salient.copy()
    tags = np.sort(rng.permutation(9)[:n]).astype(np.int32)
    labels = seed_labels(cam, tags, salient, 9, share, background)
    assert labels.dtype == np.uint8 and set(np.unique(labels)) <= {BACKGROUND, IGNORE, *(tags + 1).tolist()}
    assert np.count_nonzero(labels == IGNORE) <= 35 - min(34, round(background * 35))
    for c, values in zip(tags, cam, strict=True):
        assert (values[labels == c + 1] >= share * values.max() - 1e-6).all()
    assert np.array_equal(cam, before[0]) and np.array_equal(salient, before[1])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), low=st.floats(0.01, 1), high=st.floats(0.01, 1))
def test_a_higher_share_adds_no_seeds(seed: int, low: float, high: float) -> None:
    cam = np.random.default_rng(seed).random((1, 5, 7), np.float32)
    few, many = (
        seed_labels(cam, np.array([2]), None, 9, share, 0.0) == 3 for share in (max(low, high), min(low, high))
    )
    assert few.any() and not (few & ~many).any()


# On disk --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_classes", "dtype", "beyond"), [(3, np.uint8, IGNORE), (254, np.uint16, IGNORE_U16)])
def test_what_is_undecided_is_not_what_lies_beyond_the_image(
    n_classes: int, dtype: type, beyond: int, tmp_path: Path
) -> None:
    written = np.array([[0, n_classes, IGNORE]], np.uint8)
    write_bytes_atomic(tmp_path / "seeds/labels/train/a.png", png_from_labels(written))
    labels = SeedLabels(tmp_path, "train", n_classes)(Sample("a", tmp_path / "a.jpg", ()))
    assert labels.dtype == dtype and labels.tolist() == [[0, n_classes, n_classes + 1]]
    assert beyond > n_classes + 1


@pytest.fixture
def made(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Recipe, Path, SeedLabels]:
    """Seed labels of the squares; the left of each image is least salient."""

    def source(*_: object) -> object:
        def saliency_of(sample: Sample) -> NDArray[np.float32] | None:
            assert sample.tags, "an image without tags needs no saliency"
            return None if sample.id == "001" else np.tile(np.linspace(0, 1, 64, dtype=np.float32), (48, 1))

        return saliency_of

    recipe = replace(recipe, backbone=BackboneConfig(name="small_resnet", freeze_stages=0))
    monkeypatch.setattr(seeds, "saliency_of", source)
    return recipe, tmp_path, make(recipe, tmp_path)


def make(recipe: Recipe, folder: Path) -> SeedLabels:
    return make_seed_labels(recipe, SecConfig(background=0.25), read(recipe.data, "train"), folder, QUIET)


def test_seed_labels_of_a_dataset(made: tuple[Recipe, Path, SeedLabels]) -> None:
    recipe, folder, labels = made
    for sample in read(recipe.data, "train"):
        values = labels(sample)
        assert values.shape == (48, 64) and set(np.unique(values)) <= {0, 4, *(c + 1 for c in sample.tags)}
        if not sample.tags:
            assert (values == BACKGROUND).all()
            continue
        cam = seed_map(folder, read(recipe.data, "train"), sample)
        assert cam.classes.tolist() == list(sample.tags)
        assert (values == sample.tags[0] + 1).any() == (cam.cam > 0).any()
        if sample.id != "001":
            assert not (values[:, 16:] == BACKGROUND).any() and (values[:, :16] != 4).all()
        file = (folder / f"seeds/labels/train/{sample.id}.png").read_bytes()
        assert (labels_from_png(file) == IGNORE).sum() == (values == 4).sum()
        assert provenance_of(file)["mask"] == "seeds" and provenance_of(file)["background"] == 0.25


def test_they_go_on_where_they_were_stopped(
    made: tuple[Recipe, Path, SeedLabels], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder, _ = made
    files = sorted(path for path in (folder / "seeds").rglob("*") if path.suffix in (".pt", ".npz", ".png"))
    before = {path: path.read_bytes() for path in files}
    lost = [
        folder / "seeds/labels/train/000.png",
        folder / "seeds/labels/train/003.png",
        folder / "seeds/cam/train/003.npz",
    ]
    for path in lost:
        path.unlink()
    monkeypatch.setattr(seeds, "_train", None)  # is not called again
    make(recipe, folder)
    assert {path: path.read_bytes() for path in files if path.suffix != ".npz"} == {
        path: data for path, data in before.items() if path.suffix != ".npz"
    }
    assert all(path.is_file() for path in lost)


def test_saliency_that_cannot_be_used_is_refused_before_the_training(recipe: Recipe, tmp_path: Path) -> None:
    config = SecConfig(saliency=SaliencyConfig(folder=str(tmp_path / "none")))
    with pytest.raises((ConfigError, DatasetError), match="none"):
        make_seed_labels(recipe, config, read(recipe.data, "train"), tmp_path, QUIET)
    assert not (tmp_path / "seeds").exists()


def test_in_batches_both_kinds_of_unlabelled_are_told_apart(made: tuple[Recipe, Path, SeedLabels]) -> None:
    recipe, _, labels = made
    optim = replace(recipe.train.optim, crop_px=64, long_side_px=(48, 48))
    images = TrainingImages(read(recipe.data, "train"), optim, (1, 2, 3), 0, labels)
    for i in range(len(images)):
        image, tags, values, _ = images[0, i]
        assert values is not None and (values == UNLABELLED).sum() == 64 * 64 - 48 * 36
        assert (image[:, values == UNLABELLED] == torch.tensor([[1], [2], [3]])).all()
        assert not tags.any() or (values == 4).any()


def test_the_backbone_starts_from_the_classifier(made: tuple[Recipe, Path, SeedLabels]) -> None:
    recipe, folder, _ = made
    model = PixelClassifier(build_backbone(recipe.backbone), 3)
    head = model.head.weight.clone()
    start_backbone(model, folder)
    classifier, _ = load_model(folder / "seeds/classifier.pt", kind="classifier")
    for key, value in classifier.backbone.state_dict().items():
        assert torch.equal(value, model.backbone.state_dict()[key]), key
    assert torch.equal(model.head.weight, head)
