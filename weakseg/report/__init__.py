"""The HTML report of a run: one self-contained page, drawn from the run folder. No torch.

What is missing in the folder is left out of the page, so a run that is half done, or one of photographs without true
masks, has a report too. True masks are opened to show them and to choose which images
are shown; the figures are those of the evaluate stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weakseg.errors import DataError
from weakseg.files import write_bytes_atomic
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.records import RecordError, from_json
from weakseg.report.page import page
from weakseg.report.pictures import choose_pictures
from weakseg.run_folder import read_json


def run(recipe: Recipe, folder: Path, *, stage: str, progress: Progress) -> dict[str, Any]:
    """Stage `report`: writes <folder>/report.html."""
    pictures = write_report(recipe, folder, folder / "report.html", progress)
    return {"n_images": pictures}


def write_report(recipe: Recipe, folder: Path, output: Path, progress: Progress) -> int:
    """Draw the page; returns the number of images that it shows."""
    pictures = choose_pictures(recipe, folder, progress)
    write_bytes_atomic(output, page(recipe, folder, pictures).encode())
    return len(pictures.shown)


def recipe_of(folder: Path) -> Recipe:
    """The recipe that a run folder was made with.

    Raises:
        DataError: not a run folder, or one of another version of weakseg.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(f"expected a run folder with config.json, got {folder}: make one with `weakseg run RECIPE`")
    try:
        return from_json(Recipe, read_json(path), str(path))
    except RecordError as error:
        raise DataError(f"{error}: the run was made by another version of weakseg") from error
