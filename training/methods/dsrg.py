"""DSRG: deep seeded region growing. Huang et al., CVPR 2018.

SEC without expansion: seeds grow over the neighbours that the network has become sure of. They start anew each step.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from training.data import Batch, LabelSource
from training.loop import Losses, Moment
from training.methods import sec
from training.seeds import make_seed_labels, shared_out
from weakseg.classes import BACKGROUND
from weakseg.datasets import Dataset
from weakseg.errors import ConfigError
from weakseg.progress import Progress
from weakseg.recipe import DsrgConfig, OptimConfig, Recipe, TrainConfig

NETWORK = sec.NETWORK
RATIOS = (0.05, 20.0)  # of q / p, beyond which a cell of L_constrain has no gradient
EIGHT = np.ones((3, 3), dtype=bool)  # neighbours, the diagonal ones too

build = sec.build
start = sec.start


def labels_of(recipe: Recipe, dataset: Dataset, folder: Path, progress: Progress) -> LabelSource:
    check(recipe.train.dsrg)
    return make_seed_labels(recipe, recipe.train.dsrg, dataset, folder, progress)


def optim_of(config: TrainConfig) -> OptimConfig:
    return shared_out(config.optim, config.dsrg)[1]


def losses_of(config: TrainConfig) -> Losses:
    return partial(losses, config=config.dsrg)


def losses(model: nn.Module, batch: Batch, moment: Moment, config: DsrgConfig) -> dict[str, Tensor]:
    """L_seed of grown seeds + w_c L_constrain (+ w_e L_expand of SEC); a term of weight 0 is left out."""
    assert batch.labels is not None
    scores = model(batch.images).scores
    labels, real = sec.on_cells(batch.labels, (scores.shape[2], scores.shape[3]))
    p, q = sec.floored(scores.softmax(dim=1)), sec.sharpened(batch.images, scores, real)
    parts = {"seed": sec.balanced_seed(scores.log_softmax(dim=1), grow(labels, q, batch.tags, config))}
    if config.expand > 0:
        parts["expand"] = config.expand * sec.expand(p, batch.tags, real, config.expand_decay, config.background_decay)
    if config.constrain > 0:
        parts["constrain"] = config.constrain * sec.divergence(q, p, real, RATIOS)
    return parts


def check(config: DsrgConfig) -> None:
    """Raises ConfigError when a setting is none that seeds and losses can be made with."""
    sec.check(config, "dsrg")
    if not (0 <= config.sure <= 1 and 0 <= config.sure_background <= 1):
        raise ConfigError(
            f"train.dsrg: expected sure and sure_background in [0, 1], got {config.sure:g} and "
            f"{config.sure_background:g}: the paper has 0.85 and 0.99; with 1 nothing grows"
        )


def grow(seeds: Tensor, q: Tensor, tags: Tensor, config: DsrgConfig) -> Tensor:
    """`grown` of every image: seeds (B, h, w) int64, q (B, C + 1, h, w), tags (B, C) of 0 and 1 -> (B, h, w)."""
    limits = np.full(q.shape[1], config.sure)
    limits[BACKGROUND] = config.sure_background
    each = zip(seeds.cpu().numpy(), q.cpu().numpy(), tags.cpu().numpy() > 0, strict=True)
    return torch.from_numpy(np.stack([grown(*one, limits) for one in each])).to(seeds.device)


def grown(
    seeds: NDArray[np.int64], q: NDArray[np.float32], present: NDArray[np.bool_], limits: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Seeds and the cells that join them.

    A cell is a candidate of the likeliest of background and the present classes, if that is likelier than its limit.
    Each 8-connected region of a class's seeds and candidates that has a seed of it becomes the class; seeds of another
    are in nobody's region, so they are walls.

    Args:
        seeds: (h, w), 0 to C where there is a seed, else any other value. q: (C + 1, h, w), 0 where nothing may join.
        present: (C,). limits: (C + 1,).
    Source: DSRG; q is the CRF's, as in the authors' code.
    """
    values = np.concatenate([[BACKGROUND], 1 + np.flatnonzero(present)])
    likeliest = values[q[values].argmax(axis=0)]
    free = (seeds < 0) | (seeds >= len(q))
    out = seeds.copy()
    for value in values:
        mine = seeds == value
        candidates = free & (likeliest == value) & (q[value] > limits[value])
        regions, _ = ndimage.label(mine | candidates, structure=EIGHT)
        out[np.isin(regions, regions[mine])] = value
    return out
