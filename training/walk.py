"""Stage `random_walk`: maps spread over the affinities that were learnt, into pseudo-masks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from training.device import pick_device
from training.graphs import AffinityGraph
from training.models import load_model
from training.pseudo_masks import write_soft
from weakseg.cam_file import read_cam
from weakseg.classes import voc_palette
from weakseg.datasets import Dataset, Sample, read
from weakseg.files import write_bytes_atomic
from weakseg.image import read_image
from weakseg.masks.png import png_from_labels, provenance_text
from weakseg.progress import Progress
from weakseg.pseudo_mask import Walk, agreed, band_around, refined_labels, refinement_settings, soft_labels
from weakseg.recipe import Recipe
from weakseg.run_folder import cam_path, mask_path, read_json, soft_path, walk_pictures, walked_path
from weakseg.stages import all_splits
from weakseg.threshold import Threshold, after_walk
from weakseg.walk_picture import walk_picture

N_PICTURES = 4


def run(recipe: Recipe, folder: Path, *, stage: str, progress: Progress) -> dict[str, Any]:
    """Writes <folder>/<stage>/<split>/<id>.png, IGNORE where the label depends on the threshold.

    Beside it, under <stage>/labels/, the label maps of the chosen threshold, and a few pictures of the walk. Goes on
    where it stopped.
    """
    assert recipe.affinity is not None
    config = recipe.affinity.walk
    model, _ = load_model(folder / "affinity" / "affinity.pt", kind="affinity")
    device = pick_device()
    graph = AffinityGraph(model).to(device).eval()
    graph.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    chosen = after_walk(Threshold.from_dict(read_json(folder / "pseudo_label" / "threshold.json")), config)
    band = band_around(chosen.t, config.band)
    fields = {"mask": "pseudo_mask", "recipe": recipe.name, "seed": recipe.seed}
    text = provenance_text(fields | chosen.to_dict() | refinement_settings(recipe.pseudo_label, config))
    n_images = 0
    last = all_splits(recipe)[-1]
    pictured = {(last, sample.id) for sample in _examples(read(recipe.data, last))}
    for split in all_splits(recipe):
        dataset = read(recipe.data, split)
        todo = [sample for sample in dataset if not mask_path(folder, split, sample.id, stage).is_file()]
        for sample in progress.each(todo, f"{stage} {split}", total=len(todo)):
            cam, image = read_cam(cam_path(folder, split, sample.id)), read_image(sample.image)
            with torch.inference_mode():
                found = graph(torch.from_numpy(image[None]).to(device))["affinities"][0].cpu().numpy()
            cam01, walk = cam.cam01(recipe.cam.normalisation), Walk(found, graph.stride, config)
            middle, *both = refined_labels(
                image, cam01, cam.classes, len(dataset.classes), [chosen.t, *band], None, walk
            )
            if recipe.pseudo_label.soft:
                soft = soft_labels(image, cam01, cam.classes, len(dataset.classes), chosen.t, None, walk)
                write_soft(soft_path(folder, split, sample.id, stage), soft)
            if (split, sample.id) in pictured and len(cam01):
                strongest = cam.classes[int(cam01.max(axis=(1, 2)).argmax())]
                drawn = walk_picture(image, cam01, chosen.t, walk, dataset.classes.names[strongest])
                write_bytes_atomic(walk_pictures(folder) / f"{sample.id}.webp", _webp(drawn))
            for path, labels in (
                (walked_path(folder, split, sample.id), middle),
                (mask_path(folder, split, sample.id, stage), agreed(both)),
            ):
                write_bytes_atomic(path, png_from_labels(labels, voc_palette(), text))
        n_images += len(todo)
    return {"n_images": n_images}


def _examples(dataset: Dataset) -> list[Sample]:
    """A few of the images with tags, evenly spaced."""
    tagged = [sample for sample in dataset if sample.tags]
    return [tagged[i * len(tagged) // N_PICTURES] for i in range(min(N_PICTURES, len(tagged)))]


def _webp(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", method=4, quality=80)
    return buffer.getvalue()
