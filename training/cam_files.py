"""Where a run keeps its maps."""

from __future__ import annotations

from pathlib import Path

from weakseg.recipe import Recipe


def splits(recipe: Recipe) -> list[str]:
    """The training split first, then the scored ones, each once."""
    return list(dict.fromkeys([recipe.data.train, *recipe.evaluate.splits]))


def cam_path(folder: Path, split: str, sample_id: str) -> Path:
    return folder / "cam" / split / f"{sample_id}.npz"
