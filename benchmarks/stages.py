"""Images per second of each stage: `python -m benchmarks.stages runs/demo` (`make bench-stages RUN=runs/demo`).

Stages that the run has done are read from it; what works on single images (CRF, segment, serve) is measured now, warm,
on images of the scored split.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import weakseg
from benchmarks.line import line
from weakseg.cam_file import read_cam
from weakseg.client import Client
from weakseg.datasets import Sample, read
from weakseg.errors import DataError
from weakseg.image import read_image
from weakseg.local_server import local_server
from weakseg.pseudo_mask import refined_labels
from weakseg.recipe import CrfConfig, Recipe
from weakseg.report import recipe_of
from weakseg.run_folder import cam_path, read_json, read_timings

RECORDED = ("train", "cam", "pseudo_label", "train_seg")
N_IMAGES = 60
UNIT = "images/s"


def main(folder: Path) -> None:
    recipe = recipe_of(folder)
    recorded = read_timings(folder, list(RECORDED))
    for stage in ("train", "cam"):
        _line_of(stage, recorded)
    split = recipe.evaluate.splits[-1]
    samples = read(recipe.data, split).samples[:N_IMAGES]
    line("stage.crf", _crf(recipe, folder, split, samples), unit=UNIT)
    for stage in ("pseudo_label", "train_seg"):
        _line_of(stage, recorded)
    bundle = folder / "bundle" / recipe.export.name / recipe.export.version
    images = [sample.image for sample in samples]
    with weakseg.load(bundle) as model:
        line("stage.segment", _rate(model.segment, images), unit=UNIT)
    with (
        tempfile.TemporaryDirectory() as logs,
        local_server(bundle, Path(logs) / "log") as (target, _),
        Client(target) as client,
    ):
        client.segment(images[0])
        began = time.perf_counter()
        n_done = sum(1 for _ in client.segment_many(images))
        line("stage.serve", n_done / (time.perf_counter() - began), unit=UNIT)


def _line_of(stage: str, recorded: dict[str, dict[str, Any]]) -> None:
    rate = recorded.get(stage, {}).get("images_per_s")
    if rate is None:
        raise DataError(f"expected a finished run, got one without {stage}: finish it with `weakseg run`")
    line(f"stage.{stage}", rate, unit=UNIT)


def _crf(recipe: Recipe, folder: Path, split: str, samples: Sequence[Sample]) -> float:
    """One CRF an image, its maps and pixels in memory; one process."""
    n_classes = len(read(recipe.data, split).classes)
    t = read_json(folder / "pseudo_label" / "threshold.json")["t"]
    config = recipe.pseudo_label.crf or CrfConfig()
    tagged = [sample for sample in samples if sample.tags]
    loaded = [(read_image(sample.image), read_cam(cam_path(folder, split, sample.id))) for sample in tagged]
    inputs = [(image, cam.cam01(recipe.cam.normalisation), cam.classes) for image, cam in loaded]
    return _rate(lambda one: refined_labels(*one, n_classes, [t], config), inputs)


def _rate(function: Callable[[Any], object], items: Iterable[Any]) -> float:
    """Items per second of one caller, after one call to warm up."""
    items = list(items)
    function(items[0])
    began = time.perf_counter()
    for item in items:
        function(item)
    return len(items) / (time.perf_counter() - began)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
