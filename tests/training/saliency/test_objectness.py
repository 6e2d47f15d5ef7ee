"""A network that learns from generated scenes: what it is shown, that it learns, and where it is refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from training import distributed
from training.data import UNLABELLED, Batch, Batches
from training.models import CamClassifier, build_backbone, load_model
from training.saliency import objectness, saliency_of
from training.saliency.objectness import BACKBONE, OPTIM, SEED, SIZE_PX, Objectness, Scenes, losses, train
from training.step import Moment
from weakseg.classes import ClassTable
from weakseg.datasets import read
from weakseg.datasets.synthetic import CLASS_NAMES, synthetic_scene
from weakseg.errors import ConfigError
from weakseg.progress import Progress
from weakseg.recipe import OptimConfig, Recipe, SaliencyConfig

QUIET = Progress("silent")
SHORT = replace(OPTIM, epochs=1, batch_size=2, crop_px=32, long_side_px=(32, 48), workers=0)
WHOLE = OptimConfig(crop_px=192, long_side_px=(192, 192), flip=False, jitter=0.0)


def network() -> CamClassifier:
    torch.manual_seed(0)
    return CamClassifier(build_backbone(BACKBONE), 1, dropout=0.0)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_labels_say_where_the_generators_animals_are() -> None:
    image, tags, labels, name = Scenes(4, WHOLE, (1, 2, 3))[3, 2]
    scene = synthetic_scene(SEED, name, SIZE_PX)
    assert image.shape == (3, 192, 192) and image.dtype == torch.uint8 and tags.tolist() == [1]
    assert labels is not None and set(labels.unique().tolist()) == {0, 1, UNLABELLED}
    inside = labels != UNLABELLED
    assert (labels == 1).sum() / inside.sum() == pytest.approx(np.mean(scene.labels > 0), abs=0.01)
    assert torch.equal((image == torch.tensor([1, 2, 3]).view(3, 1, 1)).all(dim=0), ~inside)


def test_every_scene_is_shown_once_and_none_is_of_the_synthetic_set() -> None:
    scenes = Scenes(2, WHOLE, (0, 0, 0))
    items = [scenes[epoch, index] for epoch in range(2) for index in range(2)]
    assert len({item[0].numpy().tobytes() for item in items}) == 4
    assert torch.equal(scenes[1, 0][0], items[2][0])
    assert not any(item[3].startswith(("train_", "val_")) for item in items)


def test_the_loss_in_closed_form() -> None:
    labels = torch.tensor([0, 0, 1, UNLABELLED]).repeat_interleave(8).expand(1, 32, 32)
    images, model = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8), network()
    with torch.no_grad():
        model.head.weight.zero_()
    loss = losses(model, Batch(images, torch.ones(1, 1), labels, ["a"]), Moment(0, 0, 0.0))["things"]
    assert loss.item() == pytest.approx(np.log(2))


def test_it_learns_where_things_are_in_scenes_of_a_few_colours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def scene(seed: int, name: str, size_px: int) -> object:
        rng = np.random.default_rng(list(name.encode()))
        image = rng.integers(90, 140, (64, 64, 3)).astype(np.uint8)
        labels = np.zeros((64, 64), np.uint8)
        y, x = rng.integers(4, 36, 2)
        labels[y : y + 24, x : x + 24] = 3
        image[labels > 0] = ((200, 40, 40), (40, 40, 200))[rng.integers(2)]
        return type("Scene", (), {"image": image, "labels": labels})

    monkeypatch.setattr(objectness, "synthetic_scene", scene)
    train(
        tmp_path, QUIET, 32, replace(SHORT, epochs=5, batch_size=8, crop_px=96, long_side_px=(160, 160), warmup_steps=2)
    )
    estimate = Objectness(load_model(tmp_path / "model.pt", kind="objectness")[0])
    one = scene(0, "new", 64)
    values = estimate(one.image)
    thing = one.labels > 0
    assert values[thing].mean() > values[~thing].mean() + 0.3


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (75, 50), (300, 500)])
def test_maps_have_the_images_size_and_mirror_with_it(size: tuple[int, int]) -> None:
    estimate = Objectness(network())
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    values = estimate(image)
    assert values.shape == size and values.dtype == np.float32 and values.min() >= 0 and values.max() <= 1
    np.testing.assert_allclose(estimate(image[:, ::-1].copy())[:, ::-1], values, atol=1e-3)


def test_it_is_trained_once_and_resumes(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectness, "train", lambda folder, progress: train(folder, progress, 4, SHORT))
    dataset, config = read(recipe.data, "train"), SaliencyConfig(estimator="objectness")
    maps = saliency_of(config, dataset, tmp_path, QUIET)
    tagged = [sample for sample in dataset if sample.tags]
    assert all(maps(sample).shape == (48, 64) for sample in tagged)
    model = tmp_path / "saliency/objectness/model.pt"
    before = sha256(model)
    monkeypatch.setattr(objectness, "train", None)  # is not called again
    (tmp_path / "saliency/train/000.png").unlink()
    again = saliency_of(config, dataset, tmp_path, QUIET)
    assert again(tagged[0]) is not None and sha256(model) == before


@pytest.mark.parametrize(("n_processes", "size"), [(1, 16), (2, 16), (3, 18), (5, 20), (6, 18), (7, 21), (16, 16)])
def test_its_batch_can_be_shared_by_any_number_of_processes(
    n_processes: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(distributed, "size", lambda: n_processes)
    monkeypatch.setattr(objectness, "fit", lambda model, losses, images, folder, **_: seen.append(images))
    train(tmp_path, QUIET)
    (images,) = seen
    assert images.config == replace(OPTIM, batch_size=size)
    assert Batches(len(images), images.config, SEED, n_processes=n_processes).share == size // n_processes


@pytest.mark.parametrize("names", [CLASS_NAMES, CLASS_NAMES[::-1], CLASS_NAMES[2:4], ("dog", CLASS_NAMES[5])])
def test_of_generated_animals_it_would_know_the_truth(
    names: tuple[str, ...], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectness, "train", None)  # is not called
    dataset = replace(read(recipe.data, "train"), classes=ClassTable(names))
    with pytest.raises(ConfigError, match=f"for .*{names[-1]} of this data set are true masks: choose contrast"):
        saliency_of(SaliencyConfig(estimator="objectness"), dataset, tmp_path, QUIET)
