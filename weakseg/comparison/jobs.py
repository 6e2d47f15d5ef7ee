"""The runs of a comparison: which recipe, in which folder, and what it takes over from another run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from pprint import pformat

from weakseg.comparison.names import PLAIN
from weakseg.datasets import read
from weakseg.datasets.truth import has_truth
from weakseg.errors import ConfigError, DatasetError
from weakseg.files import atomic_folder, write_bytes_atomic
from weakseg.recipe import Recipe, SegConfig
from weakseg.recipe_loading import load_recipe, override
from weakseg.run_folder import read_json
from weakseg.stages import all_splits, stage_keys

LAST = "evaluate"  # stage of every run
SHARED = ("train", "cam", "pseudo_label")  # what a segmentation network is trained on


@dataclass(frozen=True)
class Terms:
    """What is equal for all. budget: images that a training sees, None = the recipe's epochs."""

    recipe: str  # a name or file, as `weakseg run` takes it
    overrides: tuple[str, ...] = ()
    budget: int | None = None

    def base(self) -> Recipe:
        """The recipe of the plain classifier.

        Raises:
            ConfigError: a recipe of another method, which would be in all the others' maps, or a budget below 1.
            DatasetError: no true masks to compare by.
        """
        own = load_recipe(self.recipe)
        if own.train.method != PLAIN:
            raise ConfigError(
                f"--recipe {self.recipe} trains {own.train.method}: expected the recipe of the plain classifier, which "
                "every method starts from"
            )
        recipe = self.recipe_of(PLAIN, 0)
        if not has_truth(recipe.data):
            raise DatasetError(f"expected true masks of {recipe.data.root} to compare by, got none: set --data.masks")
        return recipe

    @cache  # noqa: B019  a comparison asks for the same ones again and again, and each takes a second
    def recipe_of(self, name: str, seed: int) -> Recipe:
        """The recipe of a method, up to scores of the training split and those to be scored. No random walk: what it
        is worth depends on little but the maps."""
        training, _, maps = name.partition("/")
        recipe = override(load_recipe(f"{self.recipe}:{training}"), self.overrides, prog="weakseg compare --methods")
        optim = recipe.train.optim
        if self.budget is not None:
            optim = replace(optim, epochs=epochs_of(self.budget, len(read(recipe.data, recipe.data.train))))
        return replace(
            recipe,
            train=replace(recipe.train, optim=optim),
            cam=replace(recipe.cam, method=maps) if maps else recipe.cam,
            affinity=None,
            upper_bound=False,
            evaluate=replace(recipe.evaluate, splits=all_splits(recipe)),
            seed=seed,
        )


def epochs_of(budget: int, n_images: int) -> int:
    """As many as come nearest to a budget of images; at least one."""
    if budget < 1:
        raise ConfigError(f"--budget is the number of images that a training sees, at least 1, got {budget}")
    return max(1, round(budget / n_images))


@dataclass(frozen=True)
class Job:
    """One run. name: of the method. shared: stages that it takes over where `source` has them for its settings."""

    name: str
    seed: int
    recipe: Recipe
    folder: Path
    source: Path | None = None
    shared: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}" + ("" if self.recipe.train_seg is None else ", segmentation")


def jobs_of(terms: Terms, name: str, seeds: Sequence[int], root: Path) -> list[Job]:
    """Up to scores of maps, one a seed. Another CAM method looks at the classifier that is there."""
    training, slash, _ = name.partition("/")
    recipe = replace(terms.recipe_of(name, 0), train_seg=None)
    return [
        Job(
            name,
            seed,
            replace(recipe, seed=seed),
            folder_of(root, name, seed),
            folder_of(root, training, seed) if slash else None,
            ("train",) if slash else (),
        )
        for seed in seeds
    ]


def with_segmentation(job: Job, network: SegConfig) -> Job:
    """The same maps, in a folder beside, so that neither run undoes the other's scores."""
    recipe, beside = replace(job.recipe, train_seg=network), f"{job.folder.name}-segmentation"
    return Job(job.name, job.seed, recipe, job.folder.with_name(beside), job.folder, SHARED)


def folder_of(root: Path, name: str, seed: int) -> Path:
    return root / f"{name.replace('/', '.')}-{seed}"


def prepare(job: Job) -> dict[str, str]:
    """Writes <folder>/recipe.py and takes over what can be; returns the keys of its stages."""
    keys = stage_keys(job.recipe)
    head = f"# weakseg run {job.folder / 'recipe.py'} --folder {job.folder} --to {LAST}"
    text = f"{head}\nfrom weakseg.recipe import *  # noqa: F403\n\nRECIPE = {pformat(job.recipe, width=120)}\n"
    write_bytes_atomic(job.folder / "recipe.py", text.encode())
    for stage in job.shared if job.source is not None else ():
        assert job.source is not None
        if key_of(job.source, stage) == keys[stage] != key_of(job.folder, stage):
            with atomic_folder(job.folder / stage) as copy:
                shutil.copytree(job.source / stage, copy, copy_function=os.link, dirs_exist_ok=True)
    return keys


def key_of(folder: Path, stage: str, mark: str = "done") -> str | None:
    """Of what a run has finished, or begun (`started`); None = nothing."""
    path = folder / stage / f"{mark}.json"
    return str(read_json(path)["key"]) if path.is_file() else None
