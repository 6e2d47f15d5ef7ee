"""Stage `random_walk`: maps spread over the affinities that were learnt, into pseudo-masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from training.device import pick_device
from training.graphs import AffinityGraph
from training.models import load_model
from training.pseudo_masks import write_soft
from weakseg.cam_file import read_cam
from weakseg.classes import voc_palette
from weakseg.datasets import read
from weakseg.files import write_bytes_atomic
from weakseg.image import read_image
from weakseg.masks.png import png_from_labels, provenance_text
from weakseg.progress import Progress
from weakseg.pseudo_mask import Walk, agreed, band_around, refined_labels, refinement_settings, soft_labels
from weakseg.recipe import Recipe
from weakseg.run_folder import cam_path, mask_path, read_json, soft_path, walked_path
from weakseg.stages import all_splits
from weakseg.threshold import Threshold, after_walk


def run(recipe: Recipe, folder: Path, *, stage: str, progress: Progress) -> dict[str, Any]:
    """Writes <folder>/<stage>/<split>/<id>.png, IGNORE where the label depends on the threshold.

    Beside it, under <stage>/labels/, the label maps of the chosen threshold. Goes on where it stopped.
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
            for path, labels in (
                (walked_path(folder, split, sample.id), middle),
                (mask_path(folder, split, sample.id, stage), agreed(both)),
            ):
                write_bytes_atomic(path, png_from_labels(labels, voc_palette(), text))
        n_images += len(todo)
    return {"n_images": n_images}
