"""Hide-and-Seek: patches of the training images are hidden, others each time. Singh & Lee, ICCV 2017.

Where the part that tells a class best is hidden, the rest of the object must tell it. An addition to other methods;
maps are made of whole images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.data import Batch
from training.loop import Losses, Moment
from weakseg.errors import ConfigError
from weakseg.recipe import HideAndSeekConfig, TrainConfig

CROP_PX = 224  # of the authors' images, for which sides are stated
REFUSES = dict.fromkeys(
    ("sec", "dsrg", "guided", "eps"),
    "its label maps say what every pixel shows, and would teach that hidden patches are objects",
)


def around(losses: Losses, config: TrainConfig) -> Losses:
    """The losses of images with hidden patches; tags stay as they are, as in the paper."""
    check(config.hide_and_seek)
    sides, share = sides_for(config.hide_and_seek.sides_px, config.optim.crop_px), config.hide_and_seek.hide

    def on_hidden(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        images, colour = batch.images, model.backbone.mean  # type: ignore[union-attr]
        where = draw_hidden(len(images), (images.shape[2], images.shape[3]), sides, share)
        return losses(model, batch._replace(images=hide(images, where, colour)), moment)  # type: ignore[arg-type]

    return on_hidden


def check(config: HideAndSeekConfig) -> None:
    """Raises ConfigError for sides or a share that nothing can be hidden by, or that hide everything."""
    if not config.sides_px or min(config.sides_px) < 0:
        raise ConfigError(
            "train.hide_and_seek.sides_px must be one or more sides of patches in pixels, 0 for none hidden, got "
            f"{', '.join(map(str, config.sides_px)) or 'none'}: the authors have 0, 16, 32, 44, 56"
        )
    if not 0 <= config.hide < 1:
        raise ConfigError(
            f"train.hide_and_seek.hide is a patch's probability, in [0, 1), got {config.hide:g}: the authors have 0.5"
        )


def sides_for(sides_px: Sequence[int], crop_px: int) -> tuple[int, ...]:
    """Sides that are to crops of `crop_px` what `sides_px` are to those of CROP_PX; at least a pixel, 0 stays 0."""
    return tuple(side and max(1, round(side * crop_px / CROP_PX)) for side in sides_px)


def draw_hidden(n: int, size: tuple[int, int], sides: Sequence[int], share: float) -> Tensor:
    """Hidden pixels of n images, (n, H, W) bool on the CPU.

    The side of an image's patches is drawn of `sides`, then for each of its patches, with probability `share`, that it
    is hidden. Patches start at the top left; those at the bottom and right are cut off by the border.

    Source: Singh & Lee 2017, section 3.1; kkanshul/Hide-and-Seek hide_patch.py.
    """
    drawn = torch.tensor(sides)[torch.randint(len(sides), (n,))]
    least = min((side for side in sides if side), default=1)
    rows, columns = (torch.arange(length) // drawn.clamp(min=least)[:, None] for length in size)  # (n, H) and (n, W)
    patches = torch.rand(n, *(-(-length // least) for length in size)) < share  # as many as the smallest side has
    patches &= (drawn > 0)[:, None, None]
    return patches[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def hide(images: Tensor, where: Tensor, colour: Tensor) -> Tensor:
    """The images with the colour, rounded as padding is, where they are hidden.

    Args:
        images: (B, 3, H, W) RGB 0..255, any dtype. where: (B, H, W) bool. colour: (1, 3, 1, 1), of the backbone, which
            makes it 0: what the mean of all images has there.
    """
    return torch.where(where.to(images.device, non_blocking=True)[:, None], colour.round().to(images.dtype), images)
