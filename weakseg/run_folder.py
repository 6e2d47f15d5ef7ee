"""Reading a run folder; its layout is in docs/architecture.md. No torch, no true masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weakseg.errors import DataError

STEPS = (
    "cam",
    "cam_crf",
    "random_walk",
    "pseudo_mask",
    "segmentation",
    "segmentation_crf",
    "segmentation_full",
    "segmentation_full_crf",
)  # `what` of evaluations, in order
FEW_IMAGES = 13


def cam_path(folder: Path, split: str, sample_id: str) -> Path:
    """Where a run keeps an image's maps (weakseg.cam_file)."""
    return folder / "cam" / split / f"{sample_id}.npz"


def mask_path(folder: Path, split: str, sample_id: str, stage: str = "pseudo_label") -> Path:
    """Where a run keeps an image's pseudo-mask, of the stages `pseudo_label` and `random_walk`."""
    return folder / stage / split / f"{sample_id}.png"


def soft_path(folder: Path, split: str, sample_id: str, stage: str = "pseudo_label") -> Path:
    """Where a run keeps an image's soft labels (weakseg.pseudo_mask.soft_labels), beside its pseudo-mask."""
    return folder / stage / "soft" / split / f"{sample_id}.npz"


def walk_pictures(folder: Path) -> Path:
    """Where a run keeps a few pictures of its random walk, <id>.webp."""
    return folder / "random_walk" / "pictures"


def walked_path(folder: Path, split: str, sample_id: str) -> Path:
    """Where a run keeps the label map of a random walk at the chosen threshold, without IGNORE."""
    return folder / "random_walk" / "labels" / split / f"{sample_id}.png"


def prediction_path(folder: Path, network: str, split: str, sample_id: str) -> Path:
    """Where a run keeps what a network (`segmentation`, `segmentation_full`) or its CRF (<network>_crf) predicts."""
    return folder / "evaluate" / network / split / f"{sample_id}.png"


def read_json(path: Path) -> Any:
    """Raises DataError when the file is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a JSON file that a run wrote, got: {error}") from error


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The records of evaluate/*.json, in the order of the chain, splits by name; empty before that stage."""
    records = [
        read_json(path) for path in sorted((folder / "evaluate").glob("*.json")) if path.stem.partition("-")[0] in STEPS
    ]
    return sorted(records, key=lambda record: STEPS.index(record["what"]))


def read_refinements(folder: Path) -> list[dict[str, Any]]:
    """The records of evaluate/refiner-*.json, refiners and splits by name; empty where there are none."""
    return [read_json(path) for path in sorted((folder / "evaluate").glob("refiner-*.json"))]


def read_timings(folder: Path, stages: list[str]) -> dict[str, dict[str, Any]]:
    """{stage: done.json} of the finished stages."""
    return {name: read_json(folder / name / "done.json") for name in stages if (folder / name / "done.json").is_file()}


def rate_text(record: dict[str, Any]) -> str:
    """Images per second of a done.json; empty for stages of few images (bundle, report), where it says nothing."""
    rate = record["images_per_s"]
    return "" if rate is None or record["n_images"] < FEW_IMAGES else f"{rate:,.1f}"


def read_metrics(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The rows of <stage>/metrics.jsonl; empty when there is none. A last line cut off by a crash is left out."""
    path = folder / stage / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
