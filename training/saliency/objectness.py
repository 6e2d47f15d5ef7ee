"""Saliency by a small network that has learnt what a thing is from generated scenes.

Its scenes (weakseg.datasets.synthetic) are drawn as it goes, with masks that the generator itself gives. Those are no
truth of the data: no image of it is among the scenes, and nobody has drawn a mask. Of the synthetic set they would be,
whose animals and places these are, so that there the estimator is refused: `contrast` is for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from training import distributed
from training.augment import augment, resize_long_side
from training.data import UNLABELLED, Batch, TrainingImages
from training.device import pick_device
from training.graphs import canvas_images, whole
from training.loop import Moment, fit
from training.models import CamClassifier, build_backbone, load_model, save_model
from training.models.layers import CANVAS
from training.randomness import sample_rng, seed_torch
from weakseg.classes import BACKGROUND, ClassTable
from weakseg.datasets import Dataset
from weakseg.datasets.synthetic import CLASS_NAMES, synthetic_scene
from weakseg.errors import ConfigError
from weakseg.progress import Progress
from weakseg.recipe import BackboneConfig, OptimConfig

FOLDER = "objectness"  # beside the maps
SEED = 0
N_SCENES = 512  # an epoch; those of the next are others
SIZE_PX = 128  # of scenes
SIDE = 128  # pixels of the long side of what is looked at
THING = ("thing",)
BACKBONE = BackboneConfig(name="small_resnet", output_stride=8, freeze_stages=0, freeze_bn=False)
OPTIM = OptimConfig(
    epochs=6,
    batch_size=16,
    crop_px=128,
    long_side_px=(96, 192),
    jitter=0.5,
    optimizer="adamw",
    lr=3e-3,
    weight_decay=1e-2,
    new_lr_scale=1.0,
    warmup_steps=20,
)


class Scenes(TrainingImages):
    """Generated scenes in place of a dataset's images; labels are 1 where a thing is. An epoch has `n` of its own."""

    def __init__(self, n: int, config: OptimConfig, fill: tuple[int, int, int]) -> None:
        super().__init__(Dataset(ClassTable(THING), (), "scenes", Path()), config, fill, SEED)
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None, str]:
        epoch, index = key
        name = f"{FOLDER}-{epoch}-{index}"
        scene = synthetic_scene(SEED, name, SIZE_PX)
        things = (scene.labels != BACKGROUND).astype(np.uint8)
        image, labels = augment(scene.image, things, self.config, self.fill, sample_rng(SEED, epoch, name))
        assert labels is not None
        target = np.where(labels > 1, UNLABELLED, labels.astype(np.int64))  # beyond the scene
        tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        return tensor, torch.ones(1), torch.from_numpy(target), name


def estimator(dataset: Dataset, folder: Path, progress: Progress) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """The trained network as a function from an image; <folder>/objectness/model.pt is used again if it is there.

    Raises:
        ConfigError: the data have a class of the generated scenes.
    """
    known = [name for name in dataset.classes.names if name in CLASS_NAMES]
    if known:
        raise ConfigError(
            f"saliency.estimator objectness learns from the masks of generated scenes, which for {', '.join(known)} of "
            "this data set are true masks: choose contrast"
        )
    path = folder / FOLDER / "model.pt"
    if not path.is_file():
        train(path.parent, progress)
    distributed.wait()
    model, _ = load_model(path, kind=FOLDER)
    return Objectness(model.to(pick_device()))


def train(folder: Path, progress: Progress, n: int = N_SCENES, optim: OptimConfig = OPTIM) -> None:
    """Writes model.pt under `folder`; goes on where it stopped. Minutes on a CPU.

    A batch that several processes cannot share equally is made larger: the user has no say in its size.
    """
    seed_torch(SEED, 0)
    optim = replace(optim, batch_size=whole(optim.batch_size, distributed.size()))
    model = CamClassifier(build_backbone(BACKBONE), len(THING), dropout=0.0).to(pick_device())
    fit(model, losses, Scenes(n, optim, model.backbone.mean_colour), folder, progress=progress)
    if distributed.rank() == 0:
        save_model(folder / "model.pt", model, kind=FOLDER, classes=THING, method="cam")


def losses(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
    """Binary cross-entropy of the pixels of the scenes."""
    assert batch.labels is not None
    size = (batch.labels.shape[1], batch.labels.shape[2])
    scores = F.interpolate(model(batch.images).cam.float(), size=size, mode="bilinear", align_corners=False)[:, 0]
    known = batch.labels != UNLABELLED
    return {"things": F.binary_cross_entropy_with_logits(scores[known], batch.labels[known].float())}


class Objectness:
    """(H, W, 3) RGB -> (H, W) in [0, 1], how likely each pixel is a thing's; the mean over image and mirror image."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        small, _ = resize_long_side(image, None, SIDE)
        both = np.ascontiguousarray(np.stack([small, small[:, ::-1]]))
        with torch.inference_mode():
            x = canvas_images(torch.from_numpy(both).to(self.device), self.model.backbone.mean, CANVAS)
            scores = self.model(x).cam.sigmoid()
            maps = F.interpolate(scores, size=x.shape[2:], mode="bilinear", align_corners=False)[:, 0].cpu().numpy()
        height, width = small.shape[:2]
        one, mirrored = maps[:, :height, :width]
        mean = (one + mirrored[:, ::-1]) / 2
        return np.asarray(cv2.resize(mean, image.shape[1::-1], interpolation=cv2.INTER_LINEAR), dtype=np.float32)
