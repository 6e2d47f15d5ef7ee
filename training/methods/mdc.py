"""MDC: multi-dilated convolution. Wei et al., CVPR 2018.

A classifier answers where a class is told best. Dilated ones beside it answer at cells around, so that the rest of the
object gets what its telling part has.
"""

from __future__ import annotations

from torch import Tensor, nn

from training.data import Batch
from training.loop import Losses, Moment
from training.losses import multilabel_soft_margin
from training.models.backbone import Backbone
from training.models.mdc import MdcClassifier
from weakseg.errors import ConfigError
from weakseg.recipe import TrainConfig

NETWORK = MdcClassifier
AUTHORS = (1, 3, 6, 9)  # dilations of the paper, over a network of stride AUTHORS_STRIDE
AUTHORS_STRIDE = 8


def build(backbone: Backbone, n_classes: int, config: TrainConfig) -> nn.Module:
    if config.mdc.width < 1:
        raise ConfigError(f"train.mdc.width must be at least 1, got {config.mdc.width}")
    cells = config.optim.crop_px // backbone.strides[-1]
    if config.mdc.dilations is None:
        dilations = default_dilations(cells, backbone.strides[-1])
    else:
        dilations = config.mdc.dilations
        check(dilations, cells)
    return MdcClassifier(backbone, n_classes, config.dropout, config.mdc.width, dilations)


def losses_of(config: TrainConfig) -> Losses:
    return losses


def losses(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
    """L_1 + mean_i>1 L_i, multi-label soft margins of the classifiers, weighted as their maps are.

    The authors add them up, which asks the more of the backbone the more dilations there are.
    """
    first, *others = model(batch.images).maps.mean(dim=(2, 3)).split(batch.tags.shape[1], dim=1)
    dilated = {f"dilated_{n}": multilabel_soft_margin(one, batch.tags) for n, one in enumerate(others, start=1)}
    return {
        "classification": multilabel_soft_margin(first, batch.tags),
        **{name: loss / len(dilated) for name, loss in dilated.items()},
    }


def default_dilations(cells: int, stride: int) -> tuple[int, ...]:
    """The authors' reach in pixels, in cells of another stride; those that see nothing but themselves are left out.

    Args:
        cells: along a side of the crop, at least 1.
    """
    reach = (max(1, round(d * AUTHORS_STRIDE / stride)) for d in AUTHORS)
    return tuple(dict.fromkeys(d for d in reach if d < max(2, cells)))


def check(dilations: tuple[int, ...], cells: int) -> None:
    """Raises ConfigError for dilations that are no list of different ones, each with a neighbour inside the crop."""
    shown = ", ".join(map(str, dilations)) or "none"
    if not dilations or len(set(dilations)) < len(dilations) or min(dilations) < 1:
        raise ConfigError(f"train.mdc.dilations must be one or more, different, at least 1, got {shown}")
    if max(dilations) >= cells:
        raise ConfigError(
            f"train.mdc.dilations must be smaller than the crop's {cells} cells, got {shown}: beyond it a convolution "
            "sees padding alone and learns nothing of it; lower them or raise train.optim.crop_px"
        )
