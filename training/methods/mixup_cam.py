"""Mixup-CAM: images and tags mixed in pairs, maps that are sure and in one place. Chang et al., BMVC 2020.

A class of which a share is shown is to be told by all of it that there is. What mixing blurs in the maps, two further
losses hold together. An addition to other methods. The paper's code is not public; what is said of it is recollection.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training.data import Batch
from training.loop import Losses, Moment
from training.models.layers import wide
from weakseg.errors import ConfigError
from weakseg.recipe import MixupCamConfig, TrainConfig

REFUSES = dict.fromkeys(
    ("sec", "dsrg", "guided", "eps"),
    "its label maps say what every pixel shows, of which two mixed images have two answers",
) | {"erasing": "each of its steps is a network of its own, and no forward pass of the whole gives maps that learn"}

LEAST_IMAGES = 2

# Mean of a map in logits, below which it counts less. The gradient of where a map lies is divided by the map's sum, so
# that noise would be pulled together at full strength; and of two mixed images, one is often next to nothing.
LEAST = 1.0
LEAST_ALPHA = 0.01  # below it, what shares are computed from is 0 in float64, and at 0.001 a quarter of them is 1/2


def around(losses: Losses, config: TrainConfig) -> Losses:
    """The losses of mixed images and tags, + w_ent L_ent + w_con L_con of the maps of their first forward pass.

    A term of weight 0 is left out.
    """
    mixup = config.mixup_cam
    check(mixup)

    def on_mixed(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        batch = mixed(batch, draw_shares(len(batch.images), mixup.alpha))
        with first_output(model) as seen:
            parts = losses(model, batch, moment)
        if not seen:
            raise ConfigError(
                "mixup_cam looks at the maps of the network's forward pass, and in training there is none with "
                f"train.method {config.method}: leave mixup_cam out"
            )
        scores = wide(seen[0].cam)
        if mixup.entropy > 0:
            parts = parts | {"entropy": mixup.entropy * entropy(scores)}
        if mixup.concentration > 0:
            parts = parts | {"concentration": mixup.concentration * concentration(scores, batch.tags)}
        return parts

    return on_mixed


def check(config: MixupCamConfig) -> None:
    """Raises ConfigError when a setting is none that images can be mixed by or losses weighed with."""
    if config.alpha < LEAST_ALPHA:
        raise ConfigError(
            f"train.mixup_cam.alpha must be at least {LEAST_ALPHA:g}, got {config.alpha:g}: the paper has 0.2"
        )
    if min(config.entropy, config.concentration) < 0:
        raise ConfigError(
            f"train.mixup_cam: expected weights of at least 0, got entropy {config.entropy:g} and concentration "
            f"{config.concentration:g}: 0 leaves a loss out"
        )


def draw_shares(n: int, alpha: float) -> Tensor:
    """(n,) of Beta(alpha, alpha), on the CPU."""
    return torch.distributions.Beta(alpha, alpha).sample((n,))


def mixed(batch: Batch, shares: Tensor) -> Batch:
    """x_i' = s_i x_i + (1 - s_i) x_j, tags alike, j the image before i, which in a shuffled batch is any of the others.

    Images become float32, still 0..255; tags are shares. A single image (the loop measures the memory that it takes;
    LEAST_IMAGES) remains what it is.

    Args:
        shares: (B,) in [0, 1].
    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; its code has one share a batch.
    """
    shares = shares.to(batch.tags)
    images, tags = batch.images.float(), batch.tags
    return batch._replace(
        images=torch.lerp(images.roll(1, dims=0), images, shares[:, None, None, None]),
        tags=torch.lerp(tags.roll(1, dims=0), tags, shares[:, None]),
    )


@contextmanager
def first_output(model: nn.Module) -> Iterator[list[Any]]:
    """A list that gets what the model's first forward pass in here gives."""
    seen: list[Any] = []

    def keep(_model: nn.Module, _inputs: Any, output: Any) -> None:
        if not seen:
            seen.append(output)

    handle = model.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def entropy(scores: Tensor) -> Tensor:
    """L_ent = -sum_c P_c log P_c, P the softmax over the classes at a cell; mean over cells and images.

    Args:
        scores: (B, C, h, w), signed.
    """
    log = scores.log_softmax(dim=1)
    return -(log.exp() * log).sum(dim=1).mean()


def concentration(maps: Tensor, tags: Tensor) -> Tensor:
    """L_con = sum_c g_c sum_u |u - m_c|^2 A_c(u),   A_c = ReLU(maps_c) / sum_u ReLU(maps_c),   m_c = sum_u u A_c(u)

    The sum is over the present classes. u: centres of cells, sides of the map being 1, so that the weight knows no size
    of maps; the paper counts cells. g_c = min(1, mean ReLU(maps_c) / LEAST), without gradient, is not in the paper.

    Args:
        maps: (B, C, h, w), signed, in logits; one without a positive cell counts 0. tags: (B, C), present above 0.
    Returns:
        The mean over images of what is below 1/2 for each class.
    """
    maps = maps.relu()
    weights = maps / maps.sum(dim=(2, 3), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    spread = variance(weights.sum(dim=3)) + variance(weights.sum(dim=2))  # rows and columns apart
    answers = maps.detach().mean(dim=(2, 3)).div(LEAST).clamp(max=1)
    return (spread * answers * (tags > 0)).sum(dim=1).mean()


def variance(shares: Tensor) -> Tensor:
    """Of a place in [0, 1], cell i of n being at (i + 1/2) / n, that has these shares (..., n) -> (...)."""
    n = shares.shape[-1]
    places = (torch.arange(n, device=shares.device, dtype=shares.dtype) + 0.5) / n
    centre = (shares * places).sum(dim=-1, keepdim=True)
    return (shares * (places - centre).square()).sum(dim=-1)
