"""Stage `cam`: multi-scale, flipped maps of every image's tags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training import cams
from training.device import pick_device
from training.graphs import ClassifierGraph
from training.models import load_model
from weakseg.cam_file import CamFile
from weakseg.datasets import read
from weakseg.image import read_image
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.run_folder import cam_path
from weakseg.stages import all_splits

HALF_MAX = float(np.finfo(np.float16).max)  # gradients of a shallow layer add up to more than it


def run(recipe: Recipe, folder: Path, *, stage: str, progress: Progress) -> dict[str, Any]:
    """Writes <folder>/cam/<split>/<id>.npz for the training split and those to be scored; goes on where it stopped."""
    model, _ = load_model(folder / "train" / "classifier.pt", kind="classifier")
    device = pick_device()
    method = cams.get(recipe.cam.method, recipe.cam.layer)
    graph = ClassifierGraph(model, method, recipe.cam.scales, recipe.cam.flip).to(device).eval()
    graph.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    n_images = 0
    for split in all_splits(recipe):
        dataset = read(recipe.data, split)
        todo = [sample for sample in dataset if not cam_path(folder, split, sample.id).is_file()]
        for sample in progress.each(todo, f"cam {split}", total=len(todo)):
            file = image_cam(graph, read_image(sample.image), sample.tags, device)
            file.save(cam_path(folder, split, sample.id))
        n_images += len(todo)
    return {"n_images": n_images, "views": graph.n_views}


def image_cam(graph: ClassifierGraph, image: NDArray[np.uint8], tags: tuple[int, ...], device: torch.device) -> CamFile:
    """Maps of one image for its tags; the sum over views is divided by their number, which float16 holds well.

    A map with more than float16 holds is scaled down as a whole.
    """
    with torch.inference_mode():
        out = graph(torch.from_numpy(image[None]).to(device))
    maps = out["cam"][0, list(tags)] / graph.n_views
    largest = maps.amax(dim=(1, 2), keepdim=True).clamp(min=1)
    maps = (maps * (HALF_MAX / largest).clamp(max=1)).cpu().numpy().astype(np.float16)
    height, width = image.shape[:2]
    return CamFile(np.array(tags, dtype=np.int32), maps, height, width, out["scores"][0].cpu().numpy())
