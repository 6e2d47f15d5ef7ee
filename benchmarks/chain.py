"""From maps to final masks, step by step: `python -m benchmarks.chain seam_wsss_mini_full --seeds 0 1 2`.

Each row and seed is a run of the recipe under --folder, resumable as any run. With --classifiers, a folder of
benchmarks.seam_ablation, its classifiers are taken as they are. IRN refines the same maps in a run beside. Prints mean
and standard deviation over the seeds of what is done so far, on the last scored split.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.seam_ablation import recipe_of_row
from training.recipes.wsss_mini import RECIPE as PLAIN
from weakseg.files import write_json_atomic
from weakseg.presets import AFFINITY
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.recipe_loading import load_recipe, override
from weakseg.run import run
from weakseg.run_folder import STEPS, read_evaluations
from weakseg.stages import stage_keys
from weakseg.text import table

ROWS = ("baseline", "seam")
SHARED = ("train", "cam", "pseudo_label")  # stages that IRN takes over


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--classifiers", type=Path)
    parser.add_argument("--to", help="stop every run after this stage")
    parser.add_argument("--irn", action="store_true", help="and the same maps refined by IRN")
    args, overrides = parser.parse_known_args(argv)
    base = override(load_recipe(args.recipe), overrides, prog="chain")
    root = args.folder or Path("runs/chain") / args.recipe
    for seed in args.seeds:
        for row in args.rows:
            recipe = recipe_of_chain(base, row, seed)
            folder = root / f"{row}-{seed}"
            if args.classifiers is not None:
                take_classifier(recipe, args.classifiers / f"{row}-{seed}", folder)
            run(recipe, folder, last=args.to, progress=Progress())
            if args.irn:
                with_irn(recipe, folder, root / f"{row} irn-{seed}")
            print(summary(root, recipe.evaluate.splits[-1]), flush=True)


def recipe_of_chain(base: Recipe, row: str, seed: int) -> Recipe:
    """The plain classifier has the maps that suit it: no PCM."""
    recipe = recipe_of_row(base, row, seed)
    return recipe if row == "seam" else replace(recipe, cam=PLAIN.cam)


def take_classifier(recipe: Recipe, trained: Path, folder: Path) -> None:
    """A finished training of the same recipe as this run's stage `train`."""
    if (folder / "train").exists():
        return
    shutil.copytree(trained / "train", folder / "train")
    record = {"seconds": 0, "cpu_seconds": 0, "n_images": 0, "images_per_s": None, "summary": {"n_images": 0}}
    write_json_atomic(folder / "train" / "done.json", {"key": stage_keys(recipe)["train"], **record})


def with_irn(recipe: Recipe, folder: Path, beside: Path) -> None:
    """The authors' walk over boundaries that the budget of the recipe's own AffinityNet teaches."""
    assert recipe.affinity is not None
    irn = AFFINITY["irn"]
    optim = replace(recipe.affinity.optim, lr=irn.optim.lr, momentum=irn.optim.momentum, new_lr_scale=1.0)
    beside.mkdir(parents=True, exist_ok=True)
    for stage in SHARED:
        if not (beside / stage).exists():
            (beside / stage).symlink_to((folder / stage).resolve())
    affinity = replace(irn, walk=replace(irn.walk, band=recipe.affinity.walk.band), optim=optim)
    run(
        replace(recipe, affinity=affinity, train_seg=None, upper_bound=False),
        beside,
        last="evaluate",
        progress=Progress(),
    )


def summary(root: Path, split: str) -> str:
    """A line a row: mIoU of every step, and the share of full supervision that the final network reaches."""
    found: dict[str, list[dict[str, float]]] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        scores = {r["what"]: 100 * r["miou"] for r in read_evaluations(folder) if r["split"] == split}
        if scores:
            found.setdefault(folder.name.rpartition("-")[0], []).append(scores)
    head = ["row", "seeds", *STEPS, "weak / full"]
    rows = []
    for row, runs in found.items():
        cells = [_cell([run[step] for run in runs if step in run]) for step in STEPS]
        ratios = [run["segmentation"] / run["segmentation_full"] for run in runs if "segmentation_full" in run]
        rows.append([row, str(len(runs)), *cells, _cell(ratios, digits=3)])
    return table(head, rows)


def _cell(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
