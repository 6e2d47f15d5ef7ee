"""What a comparison has measured, read from its run folders: figures of each run, then mean and spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weakseg.comparison.child import COST
from weakseg.run_folder import read_evaluations, read_json

# Figures of a split, in the order of the table: mIoU of each step, then what is of the CAMs, then of the classifier.
STEPS = ("cam", "cam_crf", "segmentation", "segmentation_crf")
OF_MAPS = ("fp", "fn", "boundary_f", "ece", "brier")
COSTS = ("train_cpu_seconds", "train_cpu_ratio", "train_peak_mib", "train_peak_ratio", "cam_cpu_seconds")


@dataclass(frozen=True)
class Figures:
    """Of one run. splits: {split: {figure: value}}, fractions; what was not measured is missing.

    curves: {split: mIoU of the CAMs by threshold (weakseg.scoring.SWEEP_THRESHOLDS)}.
    """

    splits: dict[str, dict[str, float]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation over n seeds; sd None = of one there is none."""

    mean: float
    sd: float | None
    n: int


def read_figures(folder: Path, segmentation: Path, plain: Path) -> Figures:
    """Of a run, its segmentation network's run beside it and the plain classifier's of the same seed, whatever of it
    is there."""
    found = Figures()
    for record in read_evaluations(folder):
        of_split = found.splits.setdefault(record["split"], {})
        if record["what"] in STEPS:
            _put(of_split, record["what"], record["miou"])
        if record["what"] == "cam":
            _put(of_split, "fp", mean_of(record["fp"]))
            _put(of_split, "fn", mean_of(record["fn"]))
            for name in ("boundary_f", "ece", "brier"):
                _put(of_split, name, record.get(name))
            _put(of_split, "t", record["threshold"]["t"])
            found.curves[record["split"]] = record["curve"]["miou"]
    for record in read_evaluations(segmentation):
        if record["what"] in ("segmentation", "segmentation_crf"):
            _put(found.splits.setdefault(record["split"], {}), record["what"], record["miou"])
    found.costs.update(_costs(folder, plain))
    return found


def mean_of(of_classes: Mapping[str, float | None]) -> float | None:
    """Over background and the scored classes that are seen, as mIoU: mIoU, false positives and negatives sum to 1."""
    known = [share for share in of_classes.values() if share is not None]
    return sum(known) / len(known) if known else None


def summary(values: Sequence[float]) -> Summary | None:
    if not values:
        return None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(float(np.mean(values)), sd, len(values))


def over_seeds(runs: Sequence[Figures]) -> tuple[dict[str, dict[str, Summary]], dict[str, Summary]]:
    """({split: {figure: summary}}, {cost: summary}) of a method's runs."""
    splits = dict.fromkeys(split for run in runs for split in run.splits)
    return (
        {split: _summaries([run.splits.get(split, {}) for run in runs], (*STEPS, *OF_MAPS, "t")) for split in splits},
        _summaries([run.costs for run in runs], COSTS),
    )


def _summaries(runs: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, Summary]:
    found = {name: summary([run[name] for run in runs if name in run]) for name in names}
    return {name: one for name, one in found.items() if one is not None}


def _costs(folder: Path, plain: Path) -> dict[str, float]:
    """Absolute, and as multiples of the plain classifier's of the same seed."""
    own, other = _cost(folder), _cost(plain)
    costs: dict[str, float] = {}
    for of_train, absolute, ratio in (
        ("cpu_seconds", "train_cpu_seconds", "train_cpu_ratio"),
        ("peak_mib", "train_peak_mib", "train_peak_ratio"),
    ):
        value, base = own.get(of_train), other.get(of_train)
        _put(costs, absolute, value)
        _put(costs, ratio, value / base if value is not None and base else None)
    done = _json(folder / "cam" / "done.json")
    if done.get("n_images"):
        costs["cam_cpu_seconds"] = done["cpu_seconds"] / done["n_images"]
    return costs


def _cost(folder: Path) -> dict[str, Any]:
    return _json(folder / "train" / COST)


def _json(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}


def _put(into: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        into[name] = value
