"""Label maps from a trained segmentation network: multi-scale, flipped, no tags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from training.device import pick_device
from training.graphs import SegmentationGraph
from training.models import load_model
from weakseg.classes import voc_palette
from weakseg.datasets import Dataset, Sample
from weakseg.files import write_bytes_atomic
from weakseg.image import read_image
from weakseg.masks.png import png_from_labels, provenance_text, text_of
from weakseg.progress import Progress
from weakseg.recipe import EvaluateConfig, Recipe
from weakseg.run_folder import prediction_path
from weakseg.segmentation import crf_labels, labels_from_logits

NETWORKS = {"segmentation": "train_seg", "segmentation_full": "train_seg_full"}  # name in evaluate/ -> stage


def network(config: EvaluateConfig, model_path: Path) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """From an image (H, W, 3) RGB to logits (C + 1, ceil(H / 4), ceil(W / 4)), the mean over scales and flips."""
    model, _ = load_model(model_path, kind="segmentation")
    device = pick_device()
    graph = SegmentationGraph(model, config.seg_scales, config.seg_flip).to(device).eval()
    graph.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def logits_of(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits = graph(torch.from_numpy(image[None]).to(device))["logits"][0]
        return np.asarray(logits.float().cpu().numpy())

    return logits_of


def predict(recipe: Recipe, folder: Path, name: str, dataset: Dataset, progress: Progress) -> list[str]:
    """Write a label map PNG, which says how it was made, for every sample; with `evaluate.seg_crf` a second one.

    Leaves out images whose files are there, younger than the network and made in the same way.

    Returns:
        what they are found under in `prediction_path`: the network's name, and <name>_crf.
    """
    config, stage = recipe.evaluate, NETWORKS[name]
    logits_of = network(config, folder / stage / "segmentation.pt")
    fields = {"mask": "segmentation", "stage": stage, "recipe": recipe.name, "seed": recipe.seed}
    fields |= {"scales": config.seg_scales, "flip": config.seg_flip}
    crf = config.seg_crf
    texts = {name: provenance_text(fields)}
    if crf is not None:
        texts[f"{name}_crf"] = provenance_text(fields | {"crf": asdict(crf)})
    trained = (folder / stage / "segmentation.pt").stat().st_mtime

    def is_made(sample: Sample) -> bool:
        paths = {what: prediction_path(folder, what, dataset.split, sample.id) for what in texts}
        there = all(path.is_file() and path.stat().st_mtime >= trained for path in paths.values())
        return there and all(text_of(path.read_bytes()) == texts[what] for what, path in paths.items())

    todo = [sample for sample in dataset if not is_made(sample)]
    for sample in progress.each(todo, f"predict {dataset.split}", total=len(todo)):
        image = read_image(sample.image)
        logits = logits_of(image)
        made = {name: labels_from_logits(logits, *image.shape[:2])}
        if crf is not None:
            made[f"{name}_crf"] = crf_labels(image, logits, crf)
        for what, labels in made.items():
            path = prediction_path(folder, what, dataset.split, sample.id)
            write_bytes_atomic(path, png_from_labels(labels, voc_palette(), texts[what]))
    return list(texts)
