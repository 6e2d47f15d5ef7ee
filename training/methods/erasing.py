"""AE-PSL, adversarial erasing: what a classifier finds is erased, and the next looks for more. Wei et al., CVPR 2017.

One training, a cycle for each step: in cycle k the earlier steps are done and find what is erased, and step k learns
from what is left. The paper trains one network after another, with images erased on disk in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from itertools import compress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import distributed
from training.data import Batch
from training.loop import Losses, Moment
from training.models.backbone import Backbone
from training.models.erasing import EDGE, ErasingClassifier
from training.models.layers import wide
from weakseg.errors import ConfigError
from weakseg.recipe import TrainConfig

NETWORK = ErasingClassifier
SHOWN = 5  # ids in a message
LATE = 4  # exponent of how much of a cycle is done, by which losses weigh: three quarters of it are the last fourth's


def build(backbone: Backbone, n_classes: int, config: TrainConfig) -> nn.Module:
    erasing = config.erasing
    if erasing.steps < 1:
        raise ConfigError(f"train.erasing.steps must be at least 1, got {erasing.steps}: the paper has 3")
    if not EDGE < erasing.hot <= 1:
        raise ConfigError(f"train.erasing.hot must lie in ({EDGE:g}, 1], got {erasing.hot:g}: 0.8 is usual")
    if erasing.stop <= 1:
        raise ConfigError(
            f"train.erasing.stop must be above 1, got {erasing.stop:g}: the loss of a class in the first step times "
            "this is where later steps stop looking for it; 2 is usual"
        )
    return ErasingClassifier(backbone, n_classes, config.dropout, erasing.steps, erasing.hot, erasing.stop)


def cycles(config: TrainConfig) -> int:
    return config.erasing.steps


def memory_settings(config: TrainConfig) -> dict[str, object]:
    return {"train.erasing.steps": config.erasing.steps}


def losses_of(config: TrainConfig) -> Losses:
    return partial(losses, erased=set())


def losses(model: nn.Module, batch: Batch, moment: Moment, erased: set[str]) -> dict[str, Tensor]:
    """Multi-label soft margin of the step that learns, over the classes that no earlier step has lost.

    An image of which nothing is left teaches nothing. What is known of the step's losses goes into the model's buffers,
    the same in all processes. erased: ids of the images of which nothing was left so far; those of the batch are added.
    """
    step, tags = moment.cycle, batch.tags
    images, left = model.shown(step, batch.images, tags)  # type: ignore[operator]
    if step > 0 and not bool(left.all()):
        _tell(erased, compress(batch.ids, (left == 0).tolist()))
    weights = left[:, None] * model.learning(step)  # type: ignore[operator]
    logits = wide(model.members[step](images).logits)  # type: ignore[index, operator]
    noted = tags * weights * _lateness(moment, len(model.members))  # type: ignore[arg-type]
    sums = torch.stack([(F.softplus(-logits.detach()) * noted).sum(dim=0), noted.sum(dim=0)])
    model.note(step, *_mean_over_processes(sums))  # type: ignore[operator]
    return {"classification": F.binary_cross_entropy_with_logits(logits, tags.to(logits.dtype), weights)}


def _tell(erased: set[str], ids: Iterable[str]) -> None:
    """Add the ids; warn at the first image and whenever there are twice as many, or there would be no end of it."""
    told = len(erased)
    erased.update(ids)
    if len(erased).bit_length() > told.bit_length():
        shown = ", ".join(sorted(erased)[:SHOWN]) + (", …" if len(erased) > SHOWN else "")
        warnings.warn(
            f"erasing has left no pixels of crops of {len(erased)} images ({shown}), from which later steps learn "
            "nothing: raise train.erasing.hot (an image of one colour is found as a whole at any)",
            stacklevel=3,
        )


def _lateness(moment: Moment, steps: int) -> float:
    """Weight of a loss: (share of the cycle that is done)^LATE, not 0 at its start either, where a cycle may end."""
    return float(min(max(moment.done * steps - moment.cycle, 0.01), 1.0) ** LATE)


def _mean_over_processes(values: Tensor) -> Tensor:
    if distributed.size() == 1:
        return values
    mean = distributed.mean({str(i): value for i, value in enumerate(values.flatten().tolist())})
    return values.new_tensor(list(mean.values())).view_as(values)
