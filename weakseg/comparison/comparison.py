"""A comparison in its folder: comparison.json says on which terms it stands, what is in it and what came out.

Several processes may work in one folder. Each run is made by one of them; the file is read anew before it is changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from weakseg.comparison import child, figures
from weakseg.comparison.figures import Figures, Summary
from weakseg.comparison.jobs import Job, Terms, folder_of, jobs_of, with_segmentation
from weakseg.comparison.names import PLAIN
from weakseg.environment import describe
from weakseg.errors import ConfigError, InUseError, UsageError
from weakseg.files import write_json_atomic
from weakseg.locks import locked
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.run_folder import read_json
from weakseg.stages import all_splits, stage_keys

FILE = "comparison.json"
LOCK = ".lock"  # around its changes
POLL_S = 2.0  # between looks at runs that are left to other processes
ALWAYS_SEGMENTED = (PLAIN, "seam")
BEST = 2  # so many more have a segmentation network


@dataclass
class Comparison:
    """seeds: {method: its seeds}, in the order of the table. errors: {method: {seed: first line}} of runs that failed.

    segmented: methods whose maps a segmentation network learnt from. left_out: what `all` left out, and why. tried:
    folders of the runs that this process has brought to their end, whatever it was.
    """

    root: Path
    terms: Terms
    base: Recipe
    seeds: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[str, dict[int, str]] = field(default_factory=dict)
    segmented: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    tried: set[Path] = field(default_factory=set)

    @cached_property
    def key(self) -> str:
        """Equal keys, equal terms: data, backbone, budget, maps, thresholds, scoring, segmentation network."""
        return stage_keys(self.base)["evaluate"]

    @property
    def splits(self) -> tuple[str, ...]:
        """The training split first: there methods are chosen by."""
        return all_splits(self.base)

    def figures_of(self, name: str) -> list[Figures]:
        """Of the runs of a method that have any."""
        found = []
        for seed in self.seeds[name]:
            folder = folder_of(self.root, name, seed)
            beside = folder.with_name(f"{folder.name}-segmentation")
            found.append(figures.read_figures(folder, beside, folder_of(self.root, PLAIN, seed)))
        return [one for one in found if one.splits]

    def summaries(self) -> dict[str, tuple[dict[str, dict[str, Summary]], dict[str, Summary]]]:
        """{method: ({split: {figure: summary}}, {cost: summary})} over its seeds."""
        return {name: figures.over_seeds(self.figures_of(name)) for name in self.seeds}

    def failures(self) -> Iterator[str]:
        """A line each."""
        for name, of_seeds in self.errors.items():
            for seed, error in of_seeds.items():
                yield f"{name}, seed {seed}: {error}"

    def to_json(self) -> dict[str, Any]:
        methods = {
            name: {"seeds": self.seeds[name], "splits": _plain(splits), "costs": _plain(costs)}
            | {"errors": {str(seed): error for seed, error in self.errors.get(name, {}).items()}}
            for name, (splits, costs) in self.summaries().items()
        }
        return {
            **asdict(self.terms),
            "key": self.key,
            "epochs": self.base.train.optim.epochs,
            "splits": list(self.splits),
            "segmented": self.segmented,
            "left_out": self.left_out,
            "methods": methods,
            "environment": describe(),
        }

    def refresh(self) -> None:
        """Take in what is in the file.

        Raises:
            UsageError: it stands on other terms.
        """
        before = read_json(self.root / FILE) if (self.root / FILE).is_file() else None
        if before is None:
            return
        if before["key"] != self.key:
            raise UsageError(
                f"{self.root} holds a comparison on other terms (recipe {before['recipe']}, budget {before['budget']}, "
                f"{' '.join(before['overrides']) or 'no overrides'}, or the data were others): figures would not be "
                "comparable; choose another --folder"
            )
        methods = before["methods"]
        self.seeds = {name: method["seeds"] for name, method in methods.items()}
        self.errors = {
            name: {int(seed): error for seed, error in method["errors"].items()}
            for name, method in methods.items()
            if method["errors"]
        }
        self.segmented, self.left_out = before["segmented"], before["left_out"]

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around a change: the file is read before and written after it, and no other process does so meanwhile."""
        with locked(self.root / LOCK, wait=True):
            self.refresh()
            yield
            write_json_atomic(self.root / FILE, self.to_json())


def load(root: Path, terms: Terms | None) -> Comparison:
    """The comparison of a folder, or a new one. terms: None = those of the folder.

    Raises:
        UsageError: the folder has a comparison on other terms, or none and no terms are given.
    """
    if terms is None:
        if not (root / FILE).is_file():
            raise UsageError(f"{root} holds no comparison yet: name its --recipe")
        before = read_json(root / FILE)
        terms = Terms(before["recipe"], tuple(before["overrides"]), before["budget"])
    found = Comparison(root, terms, terms.base())
    found.refresh()
    return found


def check_segmentation(comparison: Comparison, which: str) -> None:
    """Raises ConfigError when there is no network that `segment` could train."""
    if which != "none" and comparison.base.train_seg is None:
        raise ConfigError(f"--segmentation {which} trains a network, and train_seg is none: set --segmentation none")


def add(
    comparison: Comparison, names: Sequence[str], seeds: Sequence[int], left_out: Sequence[str], progress: Progress
) -> Iterator[None]:
    """Bring the comparison up to date, with these methods in it; yields after each run.

    What failed before is tried again where it is named.

    Raises:
        ConfigError: settings that a method's recipe does not take.
    """
    for name in names:
        jobs_of(comparison.terms, name, [], comparison.root)  # raises, before there is a folder
    with comparison.changing():
        for name in names:
            comparison.seeds[name] = sorted({*comparison.seeds.get(name, []), *seeds})
            comparison.errors.pop(name, None)
        comparison.left_out = list(dict.fromkeys([*comparison.left_out, *left_out]))
    yield from _make_all(comparison, lambda: _of_maps(comparison), progress)


def segment(comparison: Comparison, which: str, progress: Progress) -> Iterator[None]:
    """Segmentation networks, for none of the methods, for some or for all that have maps; yields after each run.

    some: the plain classifier, SEAM and the best two by what their masks come to on the training split. The scored
    splits have no say.

    Raises:
        ConfigError: the recipe has no segmentation network to train.
    """
    check_segmentation(comparison, which)
    if (network := comparison.base.train_seg) is None or which == "none":
        return
    with comparison.changing():
        chosen = {*comparison.segmented, *(comparison.seeds if which == "all" else some(comparison))}
        comparison.segmented = [name for name in comparison.seeds if name in chosen]

    def jobs() -> list[Job]:
        """With what another process has added meanwhile: its maps come first."""
        of_maps = _of_maps(comparison)
        chosen = [job for name in comparison.segmented for job in of_maps if job.name == name]
        return of_maps + [with_segmentation(job, network) for job in chosen]

    yield from _make_all(comparison, jobs, progress)


def _of_maps(comparison: Comparison) -> list[Job]:
    """The runs up to scores of maps, a whole table of the first seed first."""
    jobs = [
        job
        for name, seeds in comparison.seeds.items()
        for job in jobs_of(comparison.terms, name, seeds, comparison.root)
    ]
    return sorted(jobs, key=lambda job: job.seed)


def _make_all(comparison: Comparison, jobs: Callable[[], list[Job]], progress: Progress) -> Iterator[None]:
    """Make what is neither tried here nor has failed; yields after each run.

    A run that another process has is left to it, and looked at again after the rest: then it is done, or has failed, or
    that process has ended and the run is made here. Runs that take over something from it wait for that.
    """
    said: set[Path] = set()
    while todo := _to_make(comparison, jobs):
        left: set[Path] = set()
        for job in todo:
            if job.source not in left and _make(comparison, job, progress):
                yield
                break
            left.add(job.folder)
            if job.folder not in said:
                progress.say(f"{job.title}: another process has it, or what it needs: looked at again later")
            said.add(job.folder)
        else:
            time.sleep(POLL_S)


def _to_make(comparison: Comparison, jobs: Callable[[], list[Job]]) -> list[Job]:
    comparison.refresh()
    return [
        job
        for job in jobs()
        if job.folder not in comparison.tried and job.seed not in comparison.errors.get(job.name, {})
    ]


def some(comparison: Comparison) -> list[str]:
    """ALWAYS_SEGMENTED, as far as they are compared, and the BEST by mean mIoU of CAM + CRF on the training split."""
    step = "cam_crf" if comparison.base.pseudo_label.crf is not None else "cam"
    found = {
        name: splits[comparison.splits[0]][step].mean
        for name, (splits, _) in comparison.summaries().items()
        if step in splits.get(comparison.splits[0], {})
    }
    best = sorted(found, key=lambda name: -found[name])[:BEST]
    return [name for name in found if name in {*ALWAYS_SEGMENTED, *best}]


def _make(comparison: Comparison, job: Job, progress: Progress) -> bool:
    """False when another process has the run, or the one that it takes over from."""
    try:
        error = child.make(job, progress)
    except InUseError:
        return False
    comparison.tried.add(job.folder)
    with comparison.changing():
        if error is not None:
            error = error if job.recipe.train_seg is None else f"segmentation: {error}"
            progress.say(f"{job.name}, seed {job.seed}: failed: {error}")
            comparison.errors.setdefault(job.name, {})[job.seed] = error
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return asdict(value)
