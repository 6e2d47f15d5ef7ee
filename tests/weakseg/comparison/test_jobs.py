"""Which recipe is run where, and what is taken over."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.weakseg.comparison.conftest import write_recipe
from weakseg.comparison.jobs import Terms, epochs_of, folder_of, jobs_of, key_of, prepare, with_segmentation
from weakseg.errors import ConfigError, DatasetError
from weakseg.files import write_bytes_atomic, write_json_atomic
from weakseg.presets import with_method
from weakseg.recipe import AffinityConfig, Recipe, SegConfig
from weakseg.recipe_loading import load_recipe
from weakseg.stages import stage_keys


@given(st.integers(1, 10**7), st.integers(1, 10**5))
def test_no_other_number_of_epochs_is_nearer_to_the_budget(budget: int, n_images: int) -> None:
    epochs = epochs_of(budget, n_images)
    assert epochs >= 1
    for other in {max(1, epochs - 1), epochs + 1}:
        assert abs(epochs * n_images - budget) <= abs(other * n_images - budget)


def test_what_is_equal_and_what_is_the_methods_own(squares: Recipe, tmp_path: Path) -> None:
    file = write_recipe(replace(squares, affinity=AffinityConfig(), upper_bound=True), tmp_path / "plain.py")
    terms = Terms(str(file), ("--train.optim.lr", "0.5"), budget=40)  # 8 images
    plain, seam, mapped = (terms.recipe_of(name, 3) for name in ("cam", "seam", "cam/layer_cam"))
    assert plain.train.optim == seam.train.optim == replace(squares.train.optim, lr=0.5, epochs=5)
    assert plain.evaluate.splits == seam.evaluate.splits == ("train", "val")
    assert seam.cam == with_method(squares, "seam").cam and seam.train.method == "seam"
    assert mapped == replace(plain, cam=replace(plain.cam, method="layer_cam"))
    assert {one.seed for one in (plain, seam, mapped)} == {3}
    assert plain.affinity is None and not plain.upper_bound


def test_terms_that_compare_nothing(squares: Recipe, recipe_file: Path, tmp_path: Path) -> None:
    assert Terms(str(recipe_file)).base().data == squares.data
    seam = write_recipe(with_method(squares, "seam"), tmp_path / "seam.py")
    with pytest.raises(ConfigError, match="trains seam: expected the recipe of the plain classifier"):
        Terms(str(seam)).base()
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        Terms(str(recipe_file), budget=0).base()
    shutil.rmtree(Path(squares.data.root) / "SegmentationClass")
    with pytest.raises(DatasetError, match="expected true masks"):
        Terms(str(recipe_file)).base()


def test_other_maps_are_of_the_same_classifier(recipe_file: Path, tmp_path: Path) -> None:
    terms = Terms(str(recipe_file))
    (plain,), (mapped,) = (jobs_of(terms, name, [0], tmp_path) for name in ("cam", "cam/grad_cam"))
    assert (plain.source, mapped.source, mapped.shared) == (None, plain.folder, ("train",))
    keys, others = stage_keys(plain.recipe), stage_keys(mapped.recipe)
    assert keys["train"] == others["train"] and keys["cam"] != others["cam"]
    assert plain.folder != mapped.folder == folder_of(tmp_path, "cam/grad_cam", 0)


def test_stages_are_taken_over_as_links_while_they_hold(recipe_file: Path, tmp_path: Path) -> None:
    (plain,) = jobs_of(Terms(str(recipe_file)), "cam", [0], tmp_path / "runs")
    job = with_segmentation(plain, SegConfig(width=16))
    keys = prepare(job)
    assert not (job.folder / "train").exists()
    for stage, key in {"train": keys["train"], "cam": "of another recipe"}.items():
        write_bytes_atomic(plain.folder / stage / "result", stage.encode())
        write_json_atomic(plain.folder / stage / "done.json", {"key": key})
    assert prepare(job) == keys
    assert (job.folder / "train/result").samefile(plain.folder / "train/result")
    assert not (job.folder / "cam").exists()
    assert key_of(job.folder, "train") == keys["train"] and key_of(job.folder, "cam") is None
    (job.folder / "train/result").unlink()
    prepare(job)
    assert not (job.folder / "train/result").exists(), "what is there for these settings is left alone"


def test_the_recipe_in_the_folder_is_the_one_that_runs(recipe_file: Path, tmp_path: Path) -> None:
    (job,) = jobs_of(Terms(str(recipe_file)), "seam", [2], tmp_path)
    prepare(job)
    assert load_recipe(str(job.folder / "recipe.py")) == job.recipe
    assert job.recipe.train_seg is None and with_segmentation(job, SegConfig()).recipe.train_seg == SegConfig()
