"""A recipe without a segmentation network: the run ends with pseudo-masks, their scores and a bundle of the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import weakseg
from export import bundle_from_run
from training import evaluate, make_cams, pseudo_label, train_classifier
from weakseg import report
from weakseg.files import write_bytes_atomic
from weakseg.progress import Progress
from weakseg.recipe import Recipe

QUIET = Progress("silent")


def test_the_run_ends_with_pseudo_masks(recipe: Recipe, tmp_path: Path) -> None:
    optim = replace(recipe.train.optim, epochs=1)
    masks_only = replace(
        recipe,
        train=replace(recipe.train, optim=optim),
        pseudo_label=replace(recipe.pseudo_label, crf=None),
        train_seg=None,
    )
    write_bytes_atomic(tmp_path / "train_seg/segmentation.pt", b"of another recipe in the same folder")
    for module, stage in (
        (train_classifier, "train"),
        (make_cams, "cam"),
        (pseudo_label, "pseudo_label"),
        (evaluate, "evaluate"),
        (bundle_from_run, "bundle"),
        (report, "report"),
    ):
        module.run(masks_only, tmp_path, stage=stage, progress=QUIET)
    records = {path.name for path in (tmp_path / "evaluate").glob("*.json")}
    assert records == {"cam-val.json", "pseudo_mask-val.json"}
    with weakseg.load(tmp_path / "bundle", threads=1) as model:
        assert model.manifest.outputs == ("cam", "pseudo_mask")
    page = (tmp_path / "report.html").read_text()
    assert "Pseudo-masks" in page and "prediction" not in page
