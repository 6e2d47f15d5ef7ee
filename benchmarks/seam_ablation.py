"""What each part of SEAM buys: `python -m benchmarks.seam_ablation wsss_mini --rows baseline seam --seeds 0 1 2`.

Trains a row and seed after the other into --folder (default runs/seam_ablation/<recipe>), resumable: what is there is
not done again. Then maps and scores: every scale alone and all together, plain and refined, at the label-free threshold
that the maps of 200 training images give. Prints the table of what is done so far.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.device import pick_device
from training.graphs import ClassifierGraph
from training.models import load_model
from training.models.seam import SeamClassifier
from training.pseudo_label import scored_indices
from weakseg import threshold
from weakseg.cam import labels_from_cam, normalise, upsample
from weakseg.datasets import Sample, read
from weakseg.datasets.truth import open_truth, trusted
from weakseg.files import write_json_atomic
from weakseg.image import read_image
from weakseg.progress import Progress
from weakseg.pseudo_mask import refined_labels
from weakseg.recipe import Recipe
from weakseg.recipe_loading import load_recipe, override
from weakseg.run import run
from weakseg.run_folder import read_json
from weakseg.scoring import Boundary, Confusion, Sweep
from weakseg.text import table

SCALES = (0.5, 1.0, 1.5, 2.0)  # each alone, and plain maps all together
ALL = "all"  # plain maps: the sum over SCALES; refined ones: over those of the recipe
NORMALISATION: dict[str, Literal["max", "minmax"]] = {"plain": "max", "refined": "minmax"}
Maps = dict[tuple[str, str], NDArray[np.float32]]  # (kind, scale) -> (K, h, w) raw


# Rows of the paper's ablation: what is changed of the recipe's SEAM. None is the plain classifier.
ROWS: dict[str, dict[str, Any] | None] = {
    "baseline": None,
    "er": {"ecr": 0.0, "min_pooling": 0.0},
    "pcm": {"er": 0.0, "hard_share": 1.0},
    "er+pcm": {"hard_share": 1.0},
    "seam": {},  # with hard example mining
    "parity": {"parity": True},
    "flip": {"transforms": ("flip",)},
    "translate": {"transforms": ("translate",)},
    "rotate": {"transforms": ("rotate",)},
    "rescale+flip": {"transforms": ("rescale", "flip")},
    "rescale+rotate": {"transforms": ("rescale", "rotate")},
    "rescale+translate": {"transforms": ("rescale", "translate")},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of_rows(__doc__, list(ROWS))
    parser.add_argument("--on", default="val", help="val, or tune: the training images that settings may be chosen on")
    parser.add_argument("--quick", action="store_true", help="without flip")
    args, overrides = parser.parse_known_args(argv)
    base = override(load_recipe(args.recipe), overrides, prog="seam_ablation")
    root = args.folder or Path("runs/seam_ablation") / args.recipe
    for seed in args.seeds:
        for row in args.rows:
            recipe = recipe_of_row(base, row, seed)
            folder = root / f"{row}-{seed}"
            scores = folder / f"scores-{args.on}{'-quick' if args.quick else ''}.json"
            if scores.is_file():
                continue
            if not (folder / "train" / "classifier.pt").is_file():
                run(recipe, folder, last="train", progress=Progress())
            write_json_atomic(scores, scored(recipe, folder, args.on, flip=not args.quick))
            print(summary(root), flush=True)
    print(summary(root))


def parser_of_rows(doc: str | None, rows: Sequence[str]) -> argparse.ArgumentParser:
    """What every benchmark over rows and seeds is told."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--rows", nargs="+", default=list(rows), choices=list(rows))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--folder", type=Path)
    return parser


def recipe_of_row(base: Recipe, row: str, seed: int) -> Recipe:
    changes = ROWS[row]
    if changes is None:
        return replace(base, seed=seed, train=replace(base.train, method="cam"))
    return replace(base, seed=seed, train=replace(base.train, method="seam", seam=replace(base.train.seam, **changes)))


def scored(recipe: Recipe, folder: Path, on: str, flip: bool) -> dict[str, Any]:
    """{kind: {scale: scores}}."""
    model, _ = load_model(folder / "train" / "classifier.pt", kind="classifier")
    graphs = {str(s): ClassifierGraph(model, Both(), (s,), flip).to(pick_device()).eval() for s in SCALES}
    summed = {"plain": SCALES, "refined": recipe.cam.scales if recipe.cam.method == "pcm" else SCALES}
    train = read(recipe.data, recipe.data.train)
    n_classes = len(train.classes)
    indices = scored_indices(recipe, train.classes)
    sample_of_train = threshold.drawn([sample for sample in train if sample.tags])
    maxima: dict[tuple[str, str], list[NDArray[np.float32]]] = {}
    for sample in Progress().each(sample_of_train, "threshold", total=len(sample_of_train)):
        for key, cam01 in _views(graphs, summed, model, sample).items():
            maxima.setdefault(key, []).append(cam01.max(axis=0))
    chosen = {key: threshold.otsu(threshold.histogram(values)).t for key, values in maxima.items()}

    with trusted("validation_split" if on == "tune" else "scorer", __spec__.name):
        if on == "tune":
            truth = open_truth(recipe.data, recipe.data.train, opener="validation_split")
            samples = [sample for sample in train if sample.id in truth.ids]
        else:
            truth = open_truth(recipe.data, on, opener="scorer")
            samples = list(read(recipe.data, on).samples)
    tallies = {key: Tally(n_classes, indices, recipe.evaluate.boundary_px, t) for key, t in chosen.items()}
    consistency: dict[str, list[float]] = {}
    for sample in Progress().each(samples, f"score {on}", total=len(samples)):
        if not sample.tags:
            continue
        image = read_image(sample.image)
        mask = truth.mask(sample.id, image.shape[:2])
        views = _views(graphs, summed, model, sample)
        for key, cam01 in views.items():
            tallies[key].add(image, mask, cam01, np.array(sample.tags), recipe if key[1] == ALL else None)
        for kind in {kind for kind, _ in views}:
            alone = [views[kind, str(s)] for s in SCALES]
            apart = [float(np.abs(a - b).mean()) for i, a in enumerate(alone) for b in alone[:i]]
            consistency.setdefault(kind, []).append(float(np.mean(apart)) if apart else 0.0)
    return {
        kind: {scale: tallies[kind, scale].scores() for k, scale in tallies if k == kind}
        | {"apart": float(np.mean(consistency[kind]))}
        for kind in consistency
    }


class Both:
    """CAM method: plain and refined maps of one forward pass, one after the other."""

    EXPORTABLE = True

    def maps(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        out = model(images)
        parts = [out.cam.relu(), out.refined[:, 1:]] if isinstance(model, SeamClassifier) else [out.cam.relu()]
        return out.logits, torch.cat(parts, dim=1)


class Tally:
    """Everything that is scored of one kind of map at one scale."""

    def __init__(self, n_classes: int, scored: list[int] | None, boundary_px: float, t: float) -> None:
        self.scored, self.t, self.n_classes = scored, t, n_classes
        self.sweep = Sweep(n_classes)
        self.at_t, self.after_crf = Confusion(n_classes), Confusion(n_classes)
        self.boundary = Boundary(n_classes, boundary_px, scored)

    def add(
        self,
        image: NDArray[np.uint8],
        mask: NDArray[Any],
        cam01: NDArray[np.float32],
        tags: NDArray[np.intp],
        recipe: Recipe | None,
    ) -> None:
        self.sweep.add(mask, cam01, tags)
        labels = labels_from_cam(cam01, tags, self.t, self.n_classes)
        self.at_t.add(mask, labels)
        self.boundary.add(mask, labels)
        if recipe is not None and recipe.pseudo_label.crf is not None:
            config = recipe.pseudo_label.crf
            self.after_crf.add(mask, refined_labels(image, cam01, tags, self.n_classes, [self.t], config)[0])

    def scores(self) -> dict[str, Any]:
        """In percent. under, over: mean over classes of false negatives and positives as shares of the union."""
        best_t, best = self.sweep.best(self.scored)
        rows = [0, *(1 + c for c in (range(self.n_classes) if self.scored is None else self.scored))]
        matrix = self.at_t.matrix
        hit = np.diag(matrix[:, : len(matrix)])
        truth, predicted = matrix.sum(axis=1), matrix[:, : len(matrix)].sum(axis=0)
        union = np.maximum(truth + predicted - hit, 1)
        return {
            "t": self.t,
            "miou": 100 * self.at_t.scores(self.scored).miou,
            "oracle_t": best_t,
            "oracle": 100 * best,
            "crf": 100 * self.after_crf.scores(self.scored).miou if self.after_crf.n_images else None,
            "boundary_f": 100 * self.boundary.mean(),
            "under": 100 * float(((truth - hit) / union)[rows].mean()),
            "over": 100 * float(((predicted - hit) / union)[rows].mean()),
            "n_images": self.at_t.n_images,
        }


def _views(
    graphs: dict[str, ClassifierGraph], summed: dict[str, tuple[float, ...]], model: nn.Module, sample: Sample
) -> Maps:
    """cam01 (K, H, W) of the sample's tags, by kind and scale; ALL is the sum of raw maps."""
    image = read_image(sample.image)
    height, width = image.shape[:2]
    raw: Maps = {}
    for scale, graph in graphs.items():
        with torch.inference_mode():
            cam = graph(torch.from_numpy(image[None]).to(pick_device()))["cam"][0].cpu().numpy()
        n = model.n_classes if isinstance(model, SeamClassifier) else len(cam)
        for kind, first in (("plain", 0), ("refined", n)):
            if len(cam) > first:
                raw[kind, scale] = cam[[first + tag for tag in sample.tags]]
    for kind in {kind for kind, _ in raw}:
        raw[kind, ALL] = sum(raw[kind, str(s)] for s in summed[kind])  # type: ignore[assignment]
    return {key: upsample(normalise(maps, NORMALISATION[key[0]]), height, width) for key, maps in raw.items()}


def summary(root: Path) -> str:
    """A line for each row, kind and set of images: mean and standard deviation over the seeds."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for path in sorted(root.glob("*/scores-*.json")):
        for kind, scales in read_json(path).items():
            row = path.parent.name.rpartition("-")[0]
            found.setdefault((path.stem.removeprefix("scores-"), row, kind), []).append(scales)
    rows = []
    for (on, row, kind), runs in sorted(found.items()):
        whole = [run[ALL] for run in runs]
        cells = [_cell(whole, key) for key in ("miou", "oracle", "crf", "boundary_f", "under", "over")]
        singles = [_cell([run[str(s)] for run in runs], "miou") if str(s) in runs[0] else "-" for s in SCALES]
        apart = f"{np.mean([run['apart'] for run in runs]):.3f}"
        rows.append([on, row, kind, str(len(runs)), f"{np.mean([w['t'] for w in whole]):.2f}", *cells, apart, *singles])
    head = ["on", "row", "maps", "seeds", "t", "mIoU", "oracle", "+CRF", "boundary F", "under", "over", "apart"]
    return table([*head, *(f"x{s:g}" for s in SCALES)], rows)


def _cell(scores: list[dict[str, Any]], key: str) -> str:
    values = [score[key] for score in scores if score[key] is not None]
    if not values:
        return "-"
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
