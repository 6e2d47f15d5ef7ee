"""Pseudo-labels as probabilities: what is written, how it is augmented, what the network learns from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training import make_cams, pseudo_label, train_affinity, train_classifier, train_segmentation, walk
from training.augment import augment
from training.data import UNLABELLED, TrainingImages, _target
from training.losses import segmentation_cross_entropy
from training.pseudo_masks import PseudoMasks, read_soft
from training.randomness import sample_rng
from weakseg.classes import IGNORE
from weakseg.datasets import read
from weakseg.errors import DataError
from weakseg.masks.png import labels_from_png
from weakseg.progress import Progress
from weakseg.pseudo_mask import refined_labels, soft_labels
from weakseg.recipe import AffinityConfig, CrfConfig, OptimConfig, Recipe, WalkConfig
from weakseg.run_folder import soft_path, walked_path

QUIET = Progress("silent")
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("config", [None, CrfConfig(iterations=2)], ids=["maps", "crf"])
@pytest.mark.parametrize("n_classes", [5, 300])
def test_the_two_likeliest_classes_and_the_share_of_the_first(config: CrfConfig | None, n_classes: int) -> None:
    image = RNG.integers(0, 255, (20, 30, 3), dtype=np.uint8)
    cam01 = RNG.random((3, 20, 30)).astype(np.float32)
    classes = np.array([4, 0, 2])
    soft = soft_labels(image, cam01, classes, n_classes, 0.4, config)
    assert soft.shape == (20, 30, 3) and soft.dtype == (np.uint8 if n_classes == 5 else np.uint16)
    (hard,) = refined_labels(image, cam01, classes, n_classes, [0.4], config or CrfConfig(iterations=0))
    first, second, share = np.moveaxis(soft, -1, 0)
    assert (first == hard).mean() > 0.999  # ties
    assert set(np.unique(second)) <= {0, 5, 1, 3} and (first != second).all()
    assert share.min() >= 128 and share.max() <= 255 and len(np.unique(share)) > 20


def test_by_hand() -> None:
    cam01 = np.array([[[0.9, 0.5, 0.1]]], dtype=np.float32)
    soft = soft_labels(np.zeros((1, 3, 3), np.uint8), cam01, np.array([1]), 3, 0.5, None)
    # Of threshold 0.5 alpha is 1: background 0.1, 0.5, 0.9 beside maps of 0.9, 0.5, 0.1.
    assert soft[0, 0].tolist() == [2, 0, 230] and soft[0, 2].tolist() == [0, 2, 230]
    assert soft[0, 1, 2] == 128
    empty = soft_labels(np.zeros((2, 3, 3), np.uint8), np.zeros((0, 2, 3), np.float32), np.array([]), 3, 0.5, None)
    assert (empty == [0, 0, 255]).all() and empty.shape == (2, 3, 3)


def test_the_loss_is_the_cross_entropy_with_a_distribution() -> None:
    logits = torch.randn(2, 4, 3, 5, requires_grad=True)
    first, second = torch.randint(0, 4, (2, 2, 3, 5))
    share = torch.randint(128, 256, (2, 3, 5))
    target = F.one_hot(first, 4) * share[..., None] / 255 + F.one_hot(second, 4) * (1 - share[..., None] / 255)
    expected = -(target.movedim(-1, 1) * logits.log_softmax(dim=1)).sum(dim=1).mean()
    got = segmentation_cross_entropy(logits, torch.stack([first, second, share], dim=-1), UNLABELLED)
    torch.testing.assert_close(got, expected)
    certain = torch.stack([first, second, torch.full_like(share, 255)], dim=-1)
    for balance in ("none", "foreground"):
        hard = segmentation_cross_entropy(logits, first, UNLABELLED, balance)
        torch.testing.assert_close(segmentation_cross_entropy(logits, certain, UNLABELLED, balance), hard)


def test_padding_is_unlabelled_also_where_a_share_is_as_large_as_ignore() -> None:
    labels = np.zeros((10, 12, 3), np.uint8)
    labels[...] = (3, 0, 255)
    config = OptimConfig(crop_px=24, long_side_px=(12, 12), jitter=0.0)
    _, cut = augment(np.zeros((10, 12, 3), np.uint8), labels, config, (0, 0, 0), sample_rng(0, 0, "a"))
    assert cut is not None and cut.shape == (24, 24, 3)
    target = _target(cut)
    inside = target[..., 0] == 3
    assert inside.sum() == 120 and (target[inside] == torch.tensor([3, 0, 255])).all()
    assert (target[~inside][:, :2] == UNLABELLED).all()


def test_ignore_of_many_classes_is_no_class() -> None:
    """Of 300 classes 255 is one, and 65535 is IGNORE."""
    target = _target(np.array([[255, 65535, 7]], np.uint16))
    assert target.tolist() == [[255, UNLABELLED, 7]]
    assert _target(np.array([[IGNORE, 7]], np.uint8)).tolist() == [[UNLABELLED, 7]]
    assert torch.isfinite(segmentation_cross_entropy(torch.randn(1, 301, 1, 3), target[None], UNLABELLED))


def test_the_stages(recipe: Recipe, tmp_path: Path) -> None:
    optim = replace(recipe.train.optim, epochs=1, crop_px=80, long_side_px=(64, 80))
    recipe = replace(
        recipe,
        pseudo_label=replace(recipe.pseudo_label, crf=None, soft=True),
        affinity=AffinityConfig(walk=WalkConfig(steps=4), optim=optim),
    )
    for module, stage in (
        (train_classifier, "train"),
        (make_cams, "cam"),
        (pseudo_label, "pseudo_label"),
        (train_affinity, "affinity"),
        (walk, "random_walk"),
    ):
        module.run(recipe, tmp_path, stage=stage, progress=QUIET)
    dataset = read(recipe.data, "train")
    for sample in dataset:
        soft = read_soft(soft_path(tmp_path, "train", sample.id, "random_walk"))
        hard = labels_from_png(walked_path(tmp_path, "train", sample.id).read_bytes())
        assert (soft[..., 0] == hard).mean() > 0.999
    source = train_segmentation.label_source(recipe, tmp_path)
    assert source == PseudoMasks(tmp_path, "train", "random_walk", soft=True)
    batch = TrainingImages(dataset, recipe.train_seg.optim, (0, 0, 0), 0, source)[0, 0]
    assert batch[2] is not None and batch[2].shape[2] == 3
    summary = train_segmentation.run(recipe, tmp_path, stage="train_seg", progress=QUIET)
    assert summary["n_images"] > 0
    path = soft_path(tmp_path, "train", dataset.samples[0].id, "random_walk")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="expected soft labels that a run wrote"):
        source(dataset.samples[0])
