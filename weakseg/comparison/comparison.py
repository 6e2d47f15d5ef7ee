"""A comparison in its folder: comparison.json says on which terms it stands, what is in it and what came out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weakseg.comparison import child, figures
from weakseg.comparison.figures import Figures, Summary
from weakseg.comparison.jobs import Job, Terms, folder_of, jobs_of, with_segmentation
from weakseg.comparison.names import PLAIN
from weakseg.environment import describe
from weakseg.errors import ConfigError, UsageError
from weakseg.files import write_json_atomic
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.run_folder import read_json
from weakseg.stages import all_splits, stage_keys

FILE = "comparison.json"
ALWAYS_SEGMENTED = (PLAIN, "seam")
BEST = 2  # so many more have a segmentation network


@dataclass
class Comparison:
    """seeds: {method: its seeds}, in the order of the table. errors: {method: {seed: first line}} of runs that failed.

    segmented: methods whose maps a segmentation network learnt from. left_out: what `all` left out, and why.
    """

    root: Path
    terms: Terms
    base: Recipe
    seeds: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[str, dict[int, str]] = field(default_factory=dict)
    segmented: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

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
            "key": key_of_terms(self.base),
            "epochs": self.base.train.optim.epochs,
            "splits": list(self.splits),
            "segmented": self.segmented,
            "left_out": self.left_out,
            "methods": methods,
            "environment": describe(),
        }

    def save(self) -> None:
        write_json_atomic(self.root / FILE, self.to_json())


def key_of_terms(base: Recipe) -> str:
    """Equal keys, equal terms: data, backbone, budget, maps, thresholds, scoring, segmentation network."""
    return stage_keys(base)["evaluate"]


def load(root: Path, terms: Terms | None) -> Comparison:
    """The comparison of a folder, or a new one. terms: None = those of the folder.

    Raises:
        UsageError: the folder has a comparison on other terms, or none and no terms are given.
    """
    before: Mapping[str, Any] = read_json(root / FILE) if (root / FILE).is_file() else {}
    if terms is None:
        if not before:
            raise UsageError(f"{root} holds no comparison yet: name its --recipe")
        terms = Terms(before["recipe"], tuple(before["overrides"]), before["budget"])
    base = terms.base()
    if before and before["key"] != key_of_terms(base):
        raise UsageError(
            f"{root} holds a comparison on other terms (recipe {before['recipe']}, budget {before['budget']}, "
            f"{' '.join(before['overrides']) or 'no overrides'}, or the data were others): figures would not be "
            "comparable; choose another --folder"
        )
    found = Comparison(root, terms, base)
    for name, method in before.get("methods", {}).items():
        found.seeds[name] = method["seeds"]
        if method["errors"]:
            found.errors[name] = {int(seed): error for seed, error in method["errors"].items()}
    found.segmented, found.left_out = list(before.get("segmented", [])), list(before.get("left_out", []))
    return found


def check_segmentation(comparison: Comparison, which: str) -> None:
    """Raises ConfigError when there is no network that `segment` could train."""
    if which != "none" and comparison.base.train_seg is None:
        raise ConfigError(f"--segmentation {which} trains a network, and train_seg is none: set --segmentation none")


def add(comparison: Comparison, names: Sequence[str], seeds: Sequence[int], progress: Progress) -> Iterator[None]:
    """Bring the comparison up to date, with these methods in it; yields after each run.

    What failed before is tried again where it is named.

    Raises:
        ConfigError: settings that a method's recipe does not take.
    """
    for name in names:
        comparison.seeds[name] = sorted({*comparison.seeds.get(name, []), *seeds})
    jobs = {
        (name, job.seed): job
        for name, of_name in comparison.seeds.items()
        for job in jobs_of(comparison.terms, name, of_name, comparison.root)
    }
    comparison.save()
    for (name, seed), job in sorted(jobs.items(), key=lambda item: item[0][1]):  # a whole table of the first seed first
        if name in names or seed not in comparison.errors.get(name, {}):
            _make(comparison, job, progress)
            yield


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
    chosen = list(comparison.seeds) if which == "all" else some(comparison)
    comparison.segmented = [name for name in comparison.seeds if name in {*comparison.segmented, *chosen}]
    for name in comparison.segmented:
        failed = comparison.errors.get(name, {})
        for job in jobs_of(comparison.terms, name, comparison.seeds[name], comparison.root):
            if job.seed not in failed:
                _make(comparison, with_segmentation(job, network), progress)
                yield


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


def _make(comparison: Comparison, job: Job, progress: Progress) -> None:
    error = child.make(job, progress)
    if error is not None and job.recipe.train_seg is not None:
        error = f"segmentation: {error}"
    of_name = comparison.errors.setdefault(job.name, {})
    of_name.pop(job.seed, None)
    if error is not None:
        progress.say(f"{job.name}, seed {job.seed}: failed: {error}")
        of_name[job.seed] = error
    if not of_name:
        del comparison.errors[job.name]
    comparison.save()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return asdict(value)
