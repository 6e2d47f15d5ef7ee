"""From maps to final masks, step by step: `python -m benchmarks.chain seam_wsss_mini_full --seeds 0 1 2`.

Each row and seed is a run of the recipe under --folder, resumable as any run: in the folder of
benchmarks.seam_ablation, with the same settings of the classifier, this is trained already. IRN refines the same maps
in a run beside. Prints mean and standard deviation over the seeds of what is done so far, on the last scored split.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.seam_ablation import parser_of_rows, recipe_of_row
from weakseg.files import atomic_folder
from weakseg.presets import AFFINITY
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.recipe_loading import load_recipe, override
from weakseg.run import run
from weakseg.run_folder import STEPS, read_evaluations
from weakseg.text import table

ROWS = ("baseline", "seam")
SHARED = ("train", "cam", "pseudo_label")  # stages that IRN takes over


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of_rows(__doc__, ROWS)
    parser.add_argument("--to", help="stop every run after this stage")
    parser.add_argument("--irn", action="store_true", help="and the same maps refined by IRN")
    args, overrides = parser.parse_known_args(argv)
    if args.irn and args.to in SHARED[:-1]:
        parser.error(f"--irn needs the stages {', '.join(SHARED)}: leave out --to {args.to}")
    base = override(load_recipe(args.recipe), overrides, prog="chain")
    root = args.folder or Path("runs/chain") / args.recipe
    for seed in args.seeds:
        for row in args.rows:
            recipe = recipe_of_chain(base, row, seed)
            folder = root / f"{row}-{seed}"
            run(recipe, folder, last=args.to, progress=Progress())
            if args.irn:
                with_irn(recipe, folder, root / f"{row} irn-{seed}")
            print(summary(root, recipe.evaluate.splits[-1]), flush=True)


def recipe_of_chain(base: Recipe, row: str, seed: int) -> Recipe:
    """The plain classifier has the maps that suit it, those of the plain recipe of these images: no PCM."""
    recipe = recipe_of_row(base, row, seed)
    plain = base.name.removeprefix("seam_").removesuffix("_full")
    return recipe if row == "seam" else replace(recipe, cam=load_recipe(plain).cam)


def with_irn(recipe: Recipe, folder: Path, beside: Path) -> None:
    """Boundaries that the budget of the recipe's own AffinityNet teaches.

    Walk of 16 steps with its background: chosen on `tune`. After so short a training boundaries leak; the authors' 256
    steps flow together.
    """
    assert recipe.affinity is not None
    ours, irn = recipe.affinity, AFFINITY["irn"]
    budget = {name: getattr(ours.optim, name) for name in ("epochs", "batch_size", "crop_px", "long_side_px")}
    walk = replace(irn.walk, steps=16, background=None, band=ours.walk.band)
    affinity = replace(irn, walk=walk, optim=replace(irn.optim, **budget))
    for stage in SHARED:
        done = [path / stage / "done.json" for path in (folder, beside)]
        if not done[1].is_file() or done[0].read_bytes() != done[1].read_bytes():
            with atomic_folder(beside / stage) as copy:
                shutil.copytree(folder / stage, copy, copy_function=os.link, dirs_exist_ok=True)
    only_masks = replace(recipe, affinity=affinity, train_seg=None, upper_bound=False)
    run(only_masks, beside, last="evaluate", progress=Progress())


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
