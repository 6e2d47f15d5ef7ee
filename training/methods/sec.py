"""SEC: seed, expand, constrain. Kolesnikov & Lampert, ECCV 2016.

A network that scores every cell learns from the few seeds of a classifier's maps (seed), from what tags say of sizes
(expand), and from its own scores, sharpened along the edges of the image (constrain).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from training.data import UNLABELLED, Batch, LabelSource
from training.loop import Losses, Moment
from training.models.backbone import Backbone
from training.models.pixel_classifier import PixelClassifier, at_cells
from training.seeds import make_seed_labels, shared_out, start_backbone
from weakseg import crf
from weakseg.classes import BACKGROUND
from weakseg.cpu import usable_cpus
from weakseg.datasets import Dataset
from weakseg.errors import ConfigError
from weakseg.progress import Progress
from weakseg.recipe import CrfConfig, OptimConfig, Recipe, SecConfig, TrainConfig

NETWORK = PixelClassifier
start = start_backbone
SIDE = 41  # cells of an image in the paper, for which decays and widths are stated
FLOOR = 1e-4  # of probabilities, before logarithms
# Of images at the size of the cells: the authors' widths in pixels, a twelfth of them in cells.
CRF = CrfConfig(
    gaussian_sxy=3 / 12,
    gaussian_weight=3.0,
    bilateral_sxy=80 / 12,
    bilateral_srgb=13.0,
    bilateral_weight=10.0,
    reference_px=SIDE,
)


def build(backbone: Backbone, n_classes: int, config: TrainConfig) -> nn.Module:
    return PixelClassifier(backbone, n_classes, config.dropout)


def labels_of(recipe: Recipe, dataset: Dataset, folder: Path, progress: Progress) -> LabelSource:
    check(recipe.train.sec, "sec")
    return make_seed_labels(recipe, recipe.train.sec, dataset, folder, progress)


def optim_of(config: TrainConfig) -> OptimConfig:
    return shared_out(config.optim, config.sec)[1]


def losses_of(config: TrainConfig) -> Losses:
    return partial(losses, config=config.sec)


def losses(model: nn.Module, batch: Batch, moment: Moment, config: SecConfig) -> dict[str, Tensor]:
    """L_seed + w_e L_expand + w_c L_constrain; a term of weight 0 is left out."""
    assert batch.labels is not None
    scores = model(batch.images).scores
    labels, real = on_cells(batch.labels, (scores.shape[2], scores.shape[3]))
    p = floored(scores.softmax(dim=1))
    parts = {"seed": balanced_seed(scores.log_softmax(dim=1), labels)}
    if config.expand > 0:
        parts["expand"] = config.expand * expand(p, batch.tags, real, config.expand_decay, config.background_decay)
    if config.constrain > 0:
        parts["constrain"] = config.constrain * divergence(sharpened(batch.images, scores, real), p, real)
    return parts


def check(config: SecConfig, section: str) -> None:
    """Raises ConfigError when a setting is none that seeds and losses can be made with."""
    decays = config.expand_decay, config.background_decay
    if not (0 < config.seed <= 1 and 0 <= config.background < 1 and 0 <= min(decays) <= max(decays) <= 1):
        raise ConfigError(
            f"train.{section}: expected seed in (0, 1], background in [0, 1) and decays in [0, 1], got seed "
            f"{config.seed:g}, background {config.background:g}, expand_decay {decays[0]:g} and background_decay "
            f"{decays[1]:g}: the paper has 0.2, 0.1, 0.996 and 0.999"
        )


def on_cells(labels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Label maps at a cell's centre, and which cells see anything of the image.

    Args:
        labels: (B, H, W) int64 of `SeedLabels`, UNLABELLED beyond the image. size: (h, w) of the cells.
    Returns:
        (B, h, w) int64 and bool; at least one cell of an image is real.
    """
    return at_cells(labels, size), F.adaptive_max_pool2d((labels != UNLABELLED).float(), size) > 0


def floored(probabilities: Tensor) -> Tensor:
    """(p + e) / (1 + K e): in (0, 1), sums to 1 as before. The authors clip some and add to others."""
    return (probabilities + FLOOR) / (1 + probabilities.shape[1] * FLOOR)


def balanced_seed(log_p: Tensor, labels: Tensor) -> Tensor:
    """-mean_n [ mean over its seeds of background of log p + mean over its seeds of objects of log p ].

    The authors have one mean over all seeds. Balanced as in DSRG, Huang et al., CVPR 2018: seeds of background are
    more than those of a small object. Nor is p `floored`, as theirs is: a network that is sure of background where it
    is wrong would have no gradient there, and stay so (DSRG did, on photographs, after ten steps).

    Args:
        log_p: (B, K, h, w) <= 0. labels: (B, h, w) int64, 0 to K - 1 where there is a seed, else any other value.
    """
    seeds = (labels >= 0) & (labels < log_p.shape[1])
    log = log_p.gather(1, (labels * seeds)[:, None])[:, 0]

    def mean(where: Tensor) -> Tensor:
        return (log * where).sum(dim=(1, 2)) / where.sum(dim=(1, 2)).clamp(min=1)

    return -(mean(seeds & (labels == BACKGROUND)) + mean(seeds & (labels != BACKGROUND))).mean()


def expand(p: Tensor, tags: Tensor, real: Tensor, decay: float, background_decay: float) -> Tensor:
    """-mean_n [ mean_present log G_c(d) + mean_absent log(1 - max_j p_cj) + log G_0(d_0) ], G by `rank_pooling`.

    Args:
        p: (B, C + 1, h, w) in (0, 1). tags: (B, C) of 0 and 1. real: (B, h, w) bool, the cells that count.
    Source: SEC's expansion loss; its third decay, of absent classes, is 0.
    """
    present = tags > 0
    grown = rank_pooling(p[:, 1:], real, decay).log()
    shrunk = (1 - (p[:, 1:] * real[:, None]).amax(dim=(2, 3))).log()

    def mean(values: Tensor, of: Tensor) -> Tensor:
        return (values * of).sum(dim=1) / of.sum(dim=1).clamp(min=1)

    background = rank_pooling(p[:, :1], real, background_decay).log()[:, 0]
    return -(mean(grown, present) + mean(shrunk, ~present) + background).mean()


def rank_pooling(p: Tensor, real: Tensor, decay: float) -> Tensor:
    """G(d) = sum_j d^(j - 1) p_(j) / sum_j d^(j - 1), p_(1) >= p_(2) >= ... over an image's n real cells.

    d = decay^(SIDE^2 / n): the same share of an image counts, however many cells it has. 0: the largest, 1: the mean.

    Args:
        p: (B, C, h, w) >= 0. real: (B, h, w) bool, at least one cell of an image.
    Returns:
        (B, C).
    """
    real = real.flatten(1)
    n = real.sum(dim=1, keepdim=True).to(p.dtype)
    ranked = p.flatten(2).masked_fill(~real[:, None], 0).sort(dim=2, descending=True).values
    ranks = torch.arange(real.shape[1], device=p.device)
    weights = (p.new_tensor(decay) ** (ranks * (SIDE**2 / n))) * (ranks < n)  # (B, N)
    return (ranked * (weights / weights.sum(dim=1, keepdim=True))[:, None]).sum(dim=2)


@torch.no_grad()
def sharpened(images: Tensor, scores: Tensor, real: Tensor, config: CrfConfig = CRF) -> Tensor:
    """Marginals (B, K, h, w) of a dense CRF over the cells, whose unary term is the network's scores; no gradient.

    It sees the real cells alone, as a whole image; elsewhere the marginals are 0. It runs on the CPU.

    Args:
        images: (B, 3, H, W) RGB 0..255. scores: (B, K, h, w) logits. real: (B, h, w) bool, of a rectangle.
    """
    small = F.interpolate(images.float(), size=scores.shape[2:], mode="area").round().clamp(0, 255)
    colours = small.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
    # Scores that have diverged end the training by their loss, which names the images.
    likely = scores.float().softmax(dim=1).nan_to_num().cpu().numpy()
    cells, marginals = real.cpu().numpy(), np.zeros_like(likely)

    def refine(i: int) -> None:
        window = _window(cells[i])
        marginals[i][:, *window] = crf.refine(colours[i][window], likely[i][:, *window], config)

    with ThreadPoolExecutor(usable_cpus()) as pool:  # the CRF computes without the GIL
        list(pool.map(refine, range(len(cells))))
    return torch.from_numpy(marginals).to(scores.device)


def _window(cells: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Rows and columns of a rectangle of True."""
    rows, columns = np.flatnonzero(cells.any(axis=1)), np.flatnonzero(cells.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def divergence(q: Tensor, p: Tensor, real: Tensor, clip: tuple[float, float] | None = None) -> Tensor:
    """KL(q | p) = sum_k q_k log(q_k / p_k), mean over an image's real cells, then over images.

    q is what the network is to come to: a constant, so that what arrives at the scores is p - q, but for FLOOR. The
    authors' code hands a gradient to q as well, and ends it where the CRF begins.

    Args:
        q, p: (B, K, h, w), p in (0, 1); q is `floored` here. real: (B, h, w) bool.
        clip: ratios q / p beyond these limits count as the limit, and have no gradient.
    """
    q = floored(q).detach()
    ratio = q / p if clip is None else (q / p).clamp(*clip)
    cells = (q * ratio.log()).sum(dim=1) * real
    return (cells.sum(dim=(1, 2)) / real.sum(dim=(1, 2)).clamp(min=1)).mean()
