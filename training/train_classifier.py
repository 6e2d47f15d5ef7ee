"""Stage `train`: image-level labels to a classifier whose maps localise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from training import cams, distributed, methods
from training.augment import resize_long_side
from training.data import TrainingImages
from training.device import pick_device
from training.graphs import ClassifierGraph
from training.loop import fit
from training.models import build_backbone, save_model
from training.models.backbone import Backbone
from training.models.layers import CANVAS
from training.randomness import seed_torch
from weakseg.cam import normalise, upsample
from weakseg.datasets import Dataset, read
from weakseg.errors import TrainingError
from weakseg.image import read_image
from weakseg.progress import Progress
from weakseg.recipe import OptimConfig, Recipe

N_PICTURES = 4
SAME = 1e-3  # spread of a feature over an image, as a share of the largest feature, below which it tells places nothing
ALIVE = 0.01  # share of features that tell places apart: 0.06 to 0.8 in trained networks, none in one that had died


def run(recipe: Recipe, folder: Path, *, stage: str, progress: Progress) -> dict[str, Any]:
    """Train `recipe.train.method`; writes <folder>/train/classifier.pt. Resumes from train/checkpoint.pt."""
    dataset = read(recipe.data, recipe.data.train)
    method: Any = methods.get(recipe.train.method)
    methods.check_batch(recipe.train, len(dataset))
    labels = None
    if hasattr(method, "labels_of"):
        labels = method.labels_of(recipe, dataset, folder / stage, progress)
    seed_torch(recipe.seed, 0)
    model = method.build(build_backbone(recipe.backbone), len(dataset.classes), recipe.train).to(pick_device())
    check_maps(model, recipe)
    if hasattr(method, "start"):
        method.start(model, folder / stage)
    optim = method.optim_of(recipe.train) if hasattr(method, "optim_of") else recipe.train.optim
    summary = fit(
        model,
        method.losses_of(recipe.train),
        TrainingImages(dataset, optim, model.backbone.mean_colour, recipe.seed, labels),
        folder / stage,
        progress=progress,
        pictures=cam_pictures(dataset, recipe),
        lower=method.memory_settings(recipe.train) if hasattr(method, "memory_settings") else None,
        cycles=method.cycles(recipe.train) if hasattr(method, "cycles") else 1,
    )
    if distributed.rank() == 0:
        save_model(
            folder / stage / "classifier.pt",
            model,
            kind="classifier",
            classes=dataset.classes.names,
            method=methods.base_of(recipe.train.method),
        )
    return summary


def check_maps(model: nn.Module, recipe: Recipe) -> None:
    """Make those of a small image, so that a classifier or a layer which has none is named before the training.

    Raises:
        ConfigError: by the CAM method.
    """
    method = cams.get(recipe.cam.method, recipe.cam.layer)
    image = torch.zeros(1, 3, 4 * CANVAS, 4 * CANVAS, device=next(model.parameters()).device)
    with torch.no_grad():
        method.maps(model.eval(), image)
    model.train()


def cam_pictures(dataset: Dataset, recipe: Recipe) -> Callable[[nn.Module], dict[str, Tensor]]:
    """A function from model to TensorBoard pictures: image and heatmap of the first tag, side by side.

    It raises TrainingError for a model that `check_alive` finds dead.
    """
    chosen = [sample for sample in dataset if sample.tags][:N_PICTURES]
    optim = recipe.train.optim
    loaded = [(s.id, s.tags[0], resize_long_side(read_image(s.image), None, optim.crop_px)[0]) for s in chosen]

    def pictures(model: nn.Module) -> dict[str, Tensor]:
        was_training = model.training
        graph = ClassifierGraph(model.eval(), cams.get("cam"))
        device = next(model.parameters()).device
        try:
            with torch.no_grad():
                check_alive(model, [image for _, _, image in loaded], optim)
                return {
                    f"cam/{sample_id} {dataset.classes.names[c]}": _side_by_side(graph, image, c, device)
                    for sample_id, c, image in loaded
                }
        finally:
            model.train(was_training)

    return pictures


def check_alive(model: nn.Module, images: list[np.ndarray[Any, Any]], optim: OptimConfig) -> None:
    """Steps that were too large leave a network whose features are the same all over an image: it has no maps any more.

    Its loss is finite, that of tags that come as often as they do, so nothing else tells.

    Args:
        model: in evaluation mode. images: (H, W, 3) uint8 each.
    Raises:
        TrainingError: fewer than ALIVE of the features differ between the places of any image.
    """
    if not isinstance(model.backbone, Backbone):  # a transformer's have no part that is cut off at 0
        return
    device, alive = next(model.parameters()).device, []
    for image in images:
        x = torch.from_numpy(image).permute(2, 0, 1)[None].to(device)
        features = model.backbone(x)[-1][0].flatten(1).float()
        if not torch.isfinite(features).all():  # it has diverged: the next step's loss says so, and names the images
            return
        alive.append(features.std(dim=1) > SAME * features.abs().max())
    if alive and float(torch.stack(alive).any(dim=0).float().mean()) < ALIVE:
        raise TrainingError(
            "the network has died: its features are the same all over an image, so that no map can be. Lower "
            f"train.optim.lr (it is {optim.lr:g}) or train.optim.new_lr_scale ({optim.new_lr_scale:g}), raise "
            f"train.optim.warmup_steps ({optim.warmup_steps}), and train anew (--from train)"
        )


def _side_by_side(graph: nn.Module, image: np.ndarray[Any, Any], c: int, device: torch.device) -> Tensor:
    maps = graph(torch.from_numpy(image[None]).to(device))["cam"][0, c : c + 1].cpu().numpy()
    maps = np.nan_to_num(maps)  # a run that has diverged ends by its loss, which names the images
    heat = upsample(normalise(maps), *image.shape[:2])[0]
    coloured = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    both = np.concatenate([image, (0.5 * image + 0.5 * coloured).astype(np.uint8)], axis=1)
    return torch.from_numpy(both).permute(2, 0, 1).float() / 255
