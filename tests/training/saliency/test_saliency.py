"""Maps that the user brings, and maps that are estimated once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from training import saliency
from training.saliency import contrast, saliency_of, write_map
from training.saliency.files import read_map
from weakseg import presets
from weakseg.datasets import Dataset, read
from weakseg.errors import ConfigError, DatasetError, SealedTruthError
from weakseg.image import read_image
from weakseg.progress import Progress
from weakseg.recipe import Recipe, SaliencyConfig
from weakseg.stages import stage_keys

QUIET = Progress("silent")
HEIGHT, WIDTH = 48, 64


@pytest.fixture
def dataset(recipe: Recipe) -> Dataset:
    """Eight images, of which 003 and 007 have no tags."""
    return read(recipe.data, "train")


@pytest.fixture
def folder(dataset: Dataset, tmp_path: Path) -> Path:
    """A map of every image that has tags, a quarter white everywhere."""
    (tmp_path / "maps").mkdir()
    for sample in dataset:
        if sample.tags:
            save(tmp_path / "maps" / f"{sample.id}.png", np.full((HEIGHT, WIDTH), 64, np.uint8))
    return tmp_path / "maps"


def save(path: Path, pixels: NDArray[np.generic]) -> None:
    Image.fromarray(pixels).save(path)


def of_folder(folder: Path, dataset: Dataset, progress: Progress = QUIET, **settings: object) -> saliency.SaliencyMaps:
    return saliency_of(SaliencyConfig(folder=str(folder), **settings), dataset, folder / "stage", progress)  # type: ignore[arg-type]


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[0, 51, 255]], np.uint8), [[0, 0.2, 1]]),
        (np.array([[0, 13107, 65535]], np.uint16), [[0, 0.2, 1]]),
        (np.array([[False, True, True]]), [[0, 1, 1]]),
    ],
)
def test_black_is_nothing_and_white_is_something(pixels: NDArray[np.generic], expected: object, tmp_path: Path) -> None:
    save(tmp_path / "a.png", pixels)
    values = read_map(tmp_path / "a.png")
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected)


def test_what_is_written_is_read_to_half_a_255th(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((5, 7), np.float32)
    write_map(tmp_path / "a.png", values)
    assert np.abs(read_map(tmp_path / "a.png") - values).max() <= 0.5 / 255 + 1e-6


def test_maps_of_a_folder_by_name(folder: Path, dataset: Dataset) -> None:
    save(folder / "001.png", np.full((HEIGHT, WIDTH), 65535, np.uint16))
    maps = of_folder(folder, dataset)
    means = [values.mean() for sample in dataset if (values := maps(sample)) is not None]
    np.testing.assert_allclose(means, [64 / 255, 1, *[64 / 255] * 4], rtol=1e-6)
    assert not (folder / "stage").exists()


@pytest.mark.parametrize("mode", ["RGB", "P", "LA"])
def test_colours_are_refused(mode: str, folder: Path, dataset: Dataset) -> None:
    Image.new(mode, (WIDTH, HEIGHT)).save(folder / "002.png")
    with pytest.raises(DatasetError, match=f"002.png: expected a grey PNG of 8 or 16 bits.* got one of mode {mode}"):
        of_folder(folder, dataset)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"not a picture"])
def test_a_damaged_file_is_named(content: bytes, folder: Path, dataset: Dataset) -> None:
    (folder / "004.png").write_bytes(content)
    with pytest.raises(DatasetError, match="004.png: expected a grey PNG, got a file that cannot be decoded"):
        of_folder(folder, dataset)


def test_half_a_file_is_refused(folder: Path, dataset: Dataset) -> None:
    save(folder / "004.png", np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8))
    (folder / "004.png").write_bytes((folder / "004.png").read_bytes()[:-600])
    with pytest.raises(DatasetError, match="004.png: expected a grey PNG"):
        of_folder(folder, dataset)


def test_other_sizes_are_counted_and_named(folder: Path, dataset: Dataset) -> None:
    save(folder / "000.png", np.zeros((WIDTH, HEIGHT), np.uint8))
    save(folder / "005.png", np.zeros((24, 32), np.uint8))
    with pytest.raises(DatasetError, match=r"000.png 48x64 for 64x48, 005.png 32x24 for 64x48: 2 of 6 are of another"):
        of_folder(folder, dataset)


def test_missing_ones_are_refused(folder: Path, dataset: Dataset) -> None:
    for name in ("001", "006"):
        (folder / f"{name}.png").unlink()
    with pytest.raises(
        DatasetError, match=r"2 of 6 are missing \(001, 006\): add them, or let .* saliency.missing skip"
    ):
        of_folder(folder, dataset)


def test_or_skipped_and_named(folder: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("001", "006"):
        (folder / f"{name}.png").unlink()
    maps = of_folder(folder, dataset, Progress("lines"), missing="skip")
    assert [sample.id for sample in dataset if maps(sample) is None] == ["001", "003", "006", "007"]
    assert "warning: 2 of 6 images have no saliency map (001, 006)" in capsys.readouterr().err


def test_an_image_without_tags_needs_none(folder: Path, dataset: Dataset) -> None:
    maps = of_folder(folder, dataset)
    assert [sample.id for sample in dataset if maps(sample) is None] == ["003", "007"]
    assert not any(sample.tags for sample in dataset if maps(sample) is None)


def test_files_of_images_without_tags_are_not_looked_at(folder: Path, dataset: Dataset) -> None:
    (folder / "003.png").write_bytes(b"not a picture")
    maps = of_folder(folder, dataset)
    assert [sample.id for sample in dataset if maps(sample) is None] == ["003", "007"]


def test_none_at_all_is_the_wrong_folder(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"6 of 6 are missing \(000, 001, 002, 004, 005, …\)"):
        of_folder(tmp_path / "empty", dataset, missing="skip")
    with pytest.raises(ConfigError, match="got no such folder"):
        of_folder(tmp_path / "nowhere", dataset)


def test_true_masks_are_no_saliency_maps(recipe: Recipe, dataset: Dataset) -> None:
    with pytest.raises(SealedTruthError):
        of_folder(Path(recipe.data.root) / "SegmentationClass", dataset)


# Estimates ------------------------------------------------------------------------------------------------------------


def test_estimates_are_made_once_of_images_that_have_tags(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = saliency_of(SaliencyConfig(), dataset, tmp_path, QUIET)
    for sample in dataset:
        values = maps(sample)
        assert (values is None) == (not sample.tags)
        if values is not None:
            np.testing.assert_allclose(values, contrast.saliency(read_image(sample.image)), atol=0.5 / 255 + 1e-6)
    lost = tmp_path / "saliency/train/004.png"
    before = lost.read_bytes()
    lost.unlink()
    made = []
    monkeypatch.setattr(contrast, "saliency", lambda image: made.append(1) or np.zeros(image.shape[:2], np.float32))
    saliency_of(SaliencyConfig(), dataset, tmp_path, QUIET)
    assert len(made) == 1 and lost.read_bytes() != before


def test_of_the_squares_most_are_found(dataset: Dataset, tmp_path: Path) -> None:
    maps = saliency_of(SaliencyConfig(), dataset, tmp_path, QUIET)
    for sample in dataset:
        if (values := maps(sample)) is not None:
            image = read_image(sample.image).astype(int)
            square = np.ptp(image, axis=2) > 90  # they alone have a colour
            assert values[square].mean() > values[~square].mean() + 0.3


# Stage keys -----------------------------------------------------------------------------------------------------------


def test_a_folder_counts_by_its_content(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    def key(method: str, path: Path | None) -> str:
        made = presets.with_method(recipe, method)
        config = SaliencyConfig(folder=None if path is None else str(path))
        section = replace(made.train.eps, saliency=config)
        return stage_keys(replace(made, name="x", train=replace(made.train, eps=section)))["train"]

    moved = folder.rename(tmp_path / "moved")
    first = key("eps", moved)
    folder = moved.rename(tmp_path / "again")
    assert key("eps", folder) == first != key("eps", None)
    save(folder / "001.png", np.full((HEIGHT, WIDTH), 65, np.uint8))
    assert key("eps", folder) != first
    assert key("cam", folder) == key("cam", None), "a section counts where its method is in use"
    with pytest.raises(ConfigError, match=r"train.eps.saliency.folder: expected a folder of grey PNGs, got .*moved"):
        key("eps", moved)
