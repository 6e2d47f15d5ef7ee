"""Puzzle-CAM. Jo & Yu, ICIP 2021.

An image is seen whole and as its tiles, each by itself. Whole, a class is found by its most telling part, or by what
comes with it; in tiles without that part others are found. The maps of both must agree.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from training.data import Batch
from training.loop import Losses, Moment
from training.losses import equivariance, multilabel_soft_margin
from training.models import CamClassifier
from training.models.backbone import Backbone
from training.models.layers import CANVAS, wide
from weakseg.errors import ConfigError
from weakseg.recipe import PuzzleCamConfig, TrainConfig

# What one class has in VOC's mean over 20, which the authors' weight is for. Here the difference is the mean over the
# present classes, whatever their number in the data.
ONE_OF_VOC = 0.05


def build(backbone: Backbone, n_classes: int, config: TrainConfig) -> nn.Module:
    """Without dropout, as the authors have it: other channels would be dropped for the tiles than for the image."""
    puzzle, crop_px = config.puzzle_cam, config.optim.crop_px
    if puzzle.tiles < 2:
        raise ConfigError(f"train.puzzle_cam.tiles must be at least 2 a side, got {puzzle.tiles}")
    if crop_px % (puzzle.tiles * CANVAS):
        raise ConfigError(
            f"train.optim.crop_px must be a multiple of {puzzle.tiles * CANVAS}, got {crop_px}: {puzzle.tiles} tiles a "
            f"side are to be whole cells of {CANVAS} px; change it or train.puzzle_cam.tiles"
        )
    if puzzle.weight < 0:
        raise ConfigError(f"train.puzzle_cam.weight must not be negative, got {puzzle.weight:g}")
    if not 0 <= puzzle.ramp <= 1:
        raise ConfigError(f"train.puzzle_cam.ramp is a share of the training, in [0, 1], got {puzzle.ramp:g}")
    return CamClassifier(backbone, n_classes, dropout=0.0)


def losses_of(config: TrainConfig) -> Losses:
    return partial(losses, config=config.puzzle_cam)


def losses(model: nn.Module, batch: Batch, moment: Moment, config: PuzzleCamConfig) -> dict[str, Tensor]:
    """L_cls + L_tiles + a L_re, with a of `weight_at`; for any network that gives logits and cam.

    L_cls, L_tiles: multi-label soft margin of the image's maps M, pooled, and of the joined maps of its tiles M'.
    L_re = mean |M - M'|: over cells, the present classes of each image, and images. Both sides carry gradient.

    Source: Jo & Yu, "Puzzle-CAM: Improved Localization via Matching Partial and Full Features", ICIP 2021;
        shjo-april/PuzzleCAM train_classification_with_puzzle.py, where the mean is over all classes, absent ones 0.
    """
    tags, present = batch.tags, batch.tags[:, :, None, None]
    out = model(batch.images)
    whole = wide(out.cam)
    joined = join(wide(model(split(batch.images, config.tiles)).cam), config.tiles)
    return {
        "classification": multilabel_soft_margin(out.logits, tags),
        "tiles": multilabel_soft_margin(joined.mean(dim=(2, 3)), tags),
        "reconstruction": weight_at(moment, config)
        * ONE_OF_VOC
        * equivariance(whole * present, joined * present, tags),
    }


def weight_at(moment: Moment, config: PuzzleCamConfig) -> float:
    """Grows from 0 in a straight line to `weight`, which it has from the share `ramp` of the training on."""
    return config.weight * (1.0 if moment.done >= config.ramp else moment.done / config.ramp)


def split(images: Tensor, n: int) -> Tensor:
    """(B, K, n h, n w) -> (B n n, K, h, w): the tiles of an image row by row, then those of the next."""
    batch, channels, height, width = images.shape
    tiles = images.reshape(batch, channels, n, height // n, n, width // n)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch * n * n, channels, height // n, width // n)


def join(tiles: Tensor, n: int) -> Tensor:
    """The inverse of `split`: (B n n, K, h, w) -> (B, K, n h, n w)."""
    _, channels, height, width = tiles.shape
    rows = tiles.reshape(-1, n, n, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return rows.reshape(-1, channels, n * height, n * width)
