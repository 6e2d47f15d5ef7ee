"""What a few true masks buy: `python -m benchmarks.few_masks runs/wsss_mini-mdc --k 0 1 2 5 10 --seeds 0 1 2`.

The semi-supervised mode of MDC (Wei et al., CVPR 2018), for a finished run of any method: of every class k training
images, drawn at random, have their true masks in place of pseudo-masks when the segmentation network learns. This opens
true masks of the training split, as the fully supervised upper bound does: none of its figures but that of k = 0 is one
of image-level labels alone.

Each k and seed of the draw is a run under --folder, resumable as any run, which shares the finished stages of RUN.
Prints mean and standard deviation over the draws of what is done so far, on the last scored split.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from weakseg.classes import voc_palette
from weakseg.datasets import Dataset, Sample, read
from weakseg.datasets.truth import open_truth, trusted
from weakseg.errors import UsageError
from weakseg.files import atomic_folder, write_bytes_atomic
from weakseg.masks.png import png_from_labels, provenance_text
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.report import recipe_of
from weakseg.run import run
from weakseg.run_folder import read_evaluations, read_json
from weakseg.stages import plan, stage_keys
from weakseg.text import table

MASKS = "masks"  # in the folder of all runs
NOTE = "with true masks of training images: the upper bound's supervision for some of them, beside tags for all"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, finished up to its pseudo-masks")
    parser.add_argument("--k", nargs="+", type=int, default=[0, 1, 2, 5, 10], help="images with masks, of each class")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the draw; the networks' is the run's")
    parser.add_argument("--folder", type=Path, help="default: runs/few_masks/<recipe>")
    args = parser.parse_args(argv)
    if min(args.k) < 0:
        parser.error(f"--k counts images: expected 0 or more, got {min(args.k)}")
    recipe = recipe_of(args.run)
    root = args.folder or Path("runs/few_masks") / recipe.name
    draws = [(k, seed if k else 0) for seed in args.seeds for k in args.k]  # without masks there is nothing to draw
    for k, seed in dict.fromkeys(draws):
        run_with_masks(recipe, args.run, root, k, seed)
        print(f"{NOTE}\n{summary(root, recipe.evaluate.splits[-1])}", flush=True)


def run_with_masks(recipe: Recipe, finished: Path, root: Path, k: int, seed: int) -> None:
    """The segmentation network of `finished`, trained and scored with k true masks of each class, in <root>/<k>-<seed>.

    Raises:
        UsageError: the run has no segmentation network, one that sees all true masks, or no pseudo-masks.
    """
    if recipe.train_seg is None or recipe.train_seg.supervision == "full":
        raise UsageError(
            f"expected a run whose segmentation network learns from pseudo-masks, got {finished} with train_seg "
            f"{'none' if recipe.train_seg is None else 'of full supervision'}: name another"
        )
    masks = None if k == 0 else write_masks(recipe, root / MASKS / f"{k}-{seed}", k, seed)
    train_seg = replace(recipe.train_seg, corrections=None if masks is None else str(masks))
    recipe = replace(recipe, train_seg=train_seg, upper_bound=False)
    share(recipe, finished, root / f"{k}-{seed}")
    run(recipe, root / f"{k}-{seed}", last="evaluate", progress=Progress())


def write_masks(recipe: Recipe, folder: Path, k: int, seed: int) -> Path:
    """<folder>/<id>.png of the images that `drawn` draws; returns the folder."""
    dataset = read(recipe.data, recipe.data.train)
    with trusted("full_supervision", __spec__.name):
        truth = open_truth(recipe.data, recipe.data.train, opener="full_supervision")
    text = provenance_text({"mask": "truth", "k": k, "seed": seed})
    with atomic_folder(folder) as masks:
        for sample in drawn(dataset, truth.has, k, seed):
            write_bytes_atomic(masks / f"{sample.id}.png", png_from_labels(truth.mask(sample.id), voc_palette(), text))
    return folder


def drawn(dataset: Dataset, has_mask: Callable[[str], bool], k: int, seed: int) -> list[Sample]:
    """k images of every class, by their tags, or all where it has fewer; in the order of the dataset.

    An image of several classes may be drawn for each of them. Of one seed, a larger k only adds images.
    """
    rng = np.random.default_rng(seed)
    ids: set[str] = set()
    for c in range(len(dataset.classes)):
        of_class = [sample.id for sample in dataset if c in sample.tags and has_mask(sample.id)]
        ids.update(of_class[i] for i in rng.permutation(len(of_class))[:k])
    return [sample for sample in dataset if sample.id in ids]


def share(recipe: Recipe, finished: Path, folder: Path) -> None:
    """Hard links in `folder` to the stages of `finished` that the recipe has in common with it.

    Raises:
        UsageError: a stage before train_seg is not among them.
    """
    keys = stage_keys(recipe)
    names = plan(recipe)
    for name in names[: names.index("bundle")]:
        done = finished / name / "done.json"
        if not done.is_file() or read_json(done)["key"] != keys[name]:
            if names.index(name) < names.index("train_seg"):
                raise UsageError(
                    f"expected a run that is finished up to its pseudo-masks, got {finished} without {name} for its "
                    "config.json: finish it with `weakseg run`"
                )
            continue
        there = folder / name / "done.json"
        if not there.is_file() or read_json(there)["key"] != keys[name]:
            with atomic_folder(folder / name) as copy:
                shutil.copytree(finished / name, copy, copy_function=os.link, dirs_exist_ok=True)


def summary(root: Path, split: str) -> str:
    """A line for each k: in how many images masks were seen, and the mIoU of the segmentation network."""
    found: dict[int, list[tuple[int, float]]] = {}
    for folder in root.glob("[0-9]*-[0-9]*"):
        scores = {r["what"]: 100 * r["miou"] for r in read_evaluations(folder) if r["split"] == split}
        if "segmentation" in scores:
            record = read_json(folder / "train_seg" / "done.json")["summary"].get("corrections", {"n_images": 0})
            found.setdefault(int(folder.name.partition("-")[0]), []).append(
                (record["n_images"], scores["segmentation"])
            )
    rows = []
    for k, runs in sorted(found.items()):
        n_images, scores_of_k = zip(*runs, strict=True)
        spread = f" ± {np.std(scores_of_k, ddof=1):.1f}" if len(runs) > 1 else ""
        rows.append([str(k), str(len(runs)), f"{np.mean(n_images):.0f}", f"{np.mean(scores_of_k):.1f}{spread}"])
    return table(["k", "draws", "images with masks", f"mIoU on {split}"], rows)


if __name__ == "__main__":
    main()
