"""Augmentation and batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.augment import augment, crop, jitter_colour, resize_long_side
from training.data import Batches, TrainingImages
from training.pseudo_masks import PseudoMasks
from training.randomness import epoch_order, sample_rng
from weakseg.classes import IGNORE
from weakseg.datasets import read
from weakseg.errors import DatasetError
from weakseg.recipe import OptimConfig, Recipe

FILL = (1, 2, 3)


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.sampled_from([16, 48]),
    seed=st.integers(0, 2**32 - 1),
)
def test_image_and_labels_move_together(height: int, width: int, size: int, seed: int) -> None:
    """The label map is the image's own red channel: whatever happens, it still is."""
    image = np.random.default_rng(seed).integers(4, 250, (height, width, 3)).astype(np.uint8)
    out, labels = crop(image, image[..., 0], size, FILL, np.random.default_rng(seed))
    assert labels is not None and out.shape == (size, size, 3)
    inside = labels != IGNORE
    assert np.array_equal(out[..., 0][inside], labels[inside])
    assert (out[~inside] == FILL).all()
    assert inside.sum() == min(height, size) * min(width, size)


def test_augmented_pair_keeps_its_geometry() -> None:
    image = np.zeros((60, 80, 3), np.uint8)
    image[20:40, 30:60] = 255
    labels = (image[..., 0] > 0).astype(np.uint8)
    config = OptimConfig(crop_px=64, long_side_px=(60, 120), jitter=0)
    for seed in range(20):
        out, moved = augment(image, labels, config, FILL, np.random.default_rng(seed))
        assert moved is not None
        inside = moved != IGNORE
        assert ((out[..., 0] > 127) == moved)[inside].mean() > 0.97  # but for the half-pixel rim of the two resizes


def test_jitter_of_zero_strength_is_the_identity() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    out = jitter_colour(image, 0.0, np.random.default_rng(0))
    assert np.abs(out.astype(int) - image).max() <= 1


def test_inputs_are_not_written_to() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    labels = np.zeros((50, 70), np.uint8)
    before = image.copy(), labels.copy()
    augment(image, labels, OptimConfig(crop_px=32, long_side_px=(40, 80)), FILL, np.random.default_rng(0))
    assert np.array_equal(image, before[0]) and np.array_equal(labels, before[1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_shapes_become_crops(shape: tuple[int, int]) -> None:
    image = np.zeros((*shape, 3), np.uint8)
    assert min(resize_long_side(image, None, 64)[0].shape[:2]) >= 1
    out, _ = augment(image, None, OptimConfig(crop_px=32, long_side_px=(32, 64)), FILL, np.random.default_rng(0))
    assert out.shape == (32, 32, 3)


def test_randomness_is_a_function_of_seed_epoch_and_id() -> None:
    def draw(*key: int | str) -> float:
        return float(sample_rng(*key).random())  # type: ignore[arg-type]

    assert draw(0, 1, "a") == draw(0, 1, "a")
    assert len({draw(0, 1, "a"), draw(1, 1, "a"), draw(0, 2, "a"), draw(0, 1, "b")}) == 4
    assert sorted(epoch_order(0, 3, 10)) == list(range(10))
    assert epoch_order(0, 3, 10) != epoch_order(0, 4, 10)


def test_every_epoch_sees_every_full_batch_once() -> None:
    batches = list(Batches(10, OptimConfig(epochs=2, batch_size=4), seed=0))
    assert [len(batch) for batch in batches] == [4] * 4
    for epoch in (0, 1):
        seen = [index for batch in batches for e, index in batch if e == epoch]
        assert len(seen) == len(set(seen)) == 8


def test_a_dataset_smaller_than_the_batch_still_trains() -> None:
    assert [len(b) for b in Batches(3, OptimConfig(epochs=2, batch_size=16), seed=0)] == [3, 3]


def test_skipping_to_a_step_gives_the_same_batches() -> None:
    config = OptimConfig(epochs=3, batch_size=4)
    assert list(Batches(9, config, 0, start=3)) == list(Batches(9, config, 0))[3:]


def test_a_label_map_of_another_size_is_named(recipe: Recipe, tmp_path: Path) -> None:
    from weakseg.classes import voc_palette
    from weakseg.masks.png import png_from_labels

    dataset = read(recipe.data, "train")
    (tmp_path / "pseudo_label/train").mkdir(parents=True)
    for sample in dataset:
        wrong = png_from_labels(np.zeros((5, 6), np.uint8), voc_palette())
        (tmp_path / f"pseudo_label/train/{sample.id}.png").write_bytes(wrong)
    config = replace(recipe.train_seg.optim)
    images = TrainingImages(dataset, config, FILL, 0, PseudoMasks(tmp_path, "train"))
    with pytest.raises(DatasetError, match=r"label map of 000 is 6x5, its image is 64x48"):
        images[0, 0]
