"""Label maps from a trained segmentation network: multi-scale, flipped, no tags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from training.device import pick_device
from training.graphs import SegmentationGraph
from training.models import load_model
from weakseg.classes import voc_palette
from weakseg.datasets import Dataset
from weakseg.files import write_bytes_atomic
from weakseg.image import read_image
from weakseg.masks.png import png_from_labels, provenance_text
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.segmentation import labels_from_logits

NETWORKS = {"segmentation": "train_seg", "segmentation_full": "train_seg_full"}  # name in evaluate/ -> stage


def predict(
    recipe: Recipe, model_path: Path, dataset: Dataset, path: Callable[[str], Path], progress: Progress
) -> None:
    """Write a label map PNG, which says how it was made, for every sample at `path(sample id)`."""
    config = recipe.evaluate
    model, _ = load_model(model_path, kind="segmentation")
    device = pick_device()
    graph = SegmentationGraph(model, config.seg_scales, config.seg_flip).to(device).eval()
    graph.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fields = {"mask": "segmentation", "stage": model_path.parent.name, "recipe": recipe.name, "seed": recipe.seed}
    text = provenance_text(fields | {"scales": config.seg_scales, "flip": config.seg_flip})
    for sample in progress.each(dataset, f"predict {dataset.split}", total=len(dataset)):
        image = read_image(sample.image)
        with torch.inference_mode():
            logits = graph(torch.from_numpy(image[None]).to(device))["logits"][0].float().cpu().numpy()
        labels = labels_from_logits(logits, *image.shape[:2])
        write_bytes_atomic(path(sample.id), png_from_labels(labels, voc_palette(), text))
