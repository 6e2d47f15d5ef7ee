"""Guided labelling: seeds say what is in an image, saliency how far it reaches. Oh et al., CVPR 2017.

A plain classifier's seeds and a saliency map give a label map of each image by one of three rules; a network that
scores every cell learns from those.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from training import distributed
from training.data import UNLABELLED, Batch, LabelSource
from training.loop import Losses, Moment
from training.losses import segmentation_cross_entropy
from training.models.backbone import Backbone
from training.models.pixel_classifier import PixelClassifier, at_cells
from training.randomness import sample_rng
from training.saliency import saliency_of
from training.seeds import make_seed_maps, seed_map, shared_out, start_backbone
from weakseg import crf
from weakseg.cam import mask_values, upsample
from weakseg.cam_file import CamFile
from weakseg.classes import BACKGROUND, ignore_value, voc_palette
from weakseg.datasets import Dataset, Sample
from weakseg.errors import ConfigError
from weakseg.files import write_bytes_atomic
from weakseg.image import read_image
from weakseg.masks.png import labels_from_png, png_from_labels, provenance_text
from weakseg.progress import Progress
from weakseg.recipe import CrfConfig, GuidedConfig, OptimConfig, Recipe, TrainConfig
from weakseg.run_folder import mask_path

NETWORK = PixelClassifier
start = start_backbone
FOLDER = "guides"  # in the folder of the stage
EIGHT = np.ones((3, 3), dtype=bool)  # neighbours, the diagonal ones too
REFERENCE_PX = 500  # long side of the photographs that the authors' widths are for
BLUR = 10.0  # of seeds, where several classes are in one component
CRF = CrfConfig(
    gaussian_sxy=3.0,
    gaussian_weight=3.0,
    bilateral_sxy=121.0,
    bilateral_srgb=5.0,
    bilateral_weight=4.0,
    reference_px=REFERENCE_PX,
)


def build(backbone: Backbone, n_classes: int, config: TrainConfig) -> nn.Module:
    return PixelClassifier(backbone, n_classes, config.dropout)


def labels_of(recipe: Recipe, dataset: Dataset, folder: Path, progress: Progress) -> LabelSource:
    """Writes saliency/, seeds/ and guides/<split>/<id>.png; goes on where it stopped. Each process makes a share."""
    config = recipe.train.guided
    check(config)
    optim, _ = shared_out(recipe.train.optim, config)
    salient_of = saliency_of(config.saliency, dataset, folder, progress)  # before the training: it may refuse
    make_seed_maps(recipe, dataset, folder, optim, progress)
    labels = GuideLabels(folder, dataset.split)
    fields = {"mask": "guide", "recipe": recipe.name, "seed": recipe.seed, "rule": config.rule}
    text = provenance_text(fields | {"share_of_maximum": config.seed, "salient": config.salient})
    share = dataset.samples[distributed.rank() :: distributed.size()]
    todo = [sample for sample in share if not labels.path(sample).is_file()]
    for sample in progress.each(todo, FOLDER, total=len(todo)):
        image, rng = read_image(sample.image), sample_rng(recipe.seed, 0, sample.id)
        made = guide(image, seed_map(folder, dataset, sample), salient_of(sample), len(dataset.classes), config, rng)
        write_bytes_atomic(labels.path(sample), png_from_labels(made, voc_palette(), text))
    distributed.wait()
    return labels


def optim_of(config: TrainConfig) -> OptimConfig:
    return shared_out(config.optim, config.guided)[1]


def losses_of(config: TrainConfig) -> Losses:
    return losses


def losses(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
    """Cross-entropy of the cells, against the label at each one's centre; background and objects weigh the same."""
    assert batch.labels is not None
    scores = model(batch.images).scores
    labels = at_cells(batch.labels, (scores.shape[2], scores.shape[3]))
    return {"segmentation": segmentation_cross_entropy(scores, labels, UNLABELLED, balance="foreground")}


def check(config: GuidedConfig) -> None:
    """Raises ConfigError when label maps cannot be made so, WeaksegError when the CRF that g2 needs is not there."""
    if not (0 < config.seed <= 1 and 0 < config.salient <= 1 and 0 <= config.smallest < 1):
        raise ConfigError(
            f"train.guided: expected seed and salient in (0, 1] and smallest in [0, 1), got {config.seed:g}, "
            f"{config.salient:g} and {config.smallest:g}: the authors have 0.2, 0.5 and 0.01"
        )
    if config.rule == "g2":
        crf.check_available(CRF.backend)


@dataclass(frozen=True)
class GuideLabels:
    """Label maps (H, W) as `labels_of` has written them."""

    folder: Path
    split: str

    def path(self, sample: Sample) -> Path:
        return mask_path(self.folder, self.split, sample.id, FOLDER)

    def __call__(self, sample: Sample) -> NDArray[np.integer]:
        return labels_from_png(self.path(sample).read_bytes())


# Rules ----------------------------------------------------------------------------------------------------------------


def guide(
    image: NDArray[np.uint8],
    cam: CamFile,
    salient: NDArray[np.float32] | None,
    n_classes: int,
    config: GuidedConfig,
    rng: np.random.Generator,
) -> NDArray[Any]:
    """The label map of an image by the rule of the config; background is what nothing is said of.

    Args:
        image: (H, W, 3) RGB. cam: maps of its tags; without tags the image is background.
        salient: (H, W) in [0, 1]. None = not known: seeds of rule g2 stay, all else is IGNORE.
    Returns:
        (H, W) in `mask_dtype(n_classes)`.
    """
    values = mask_values(cam.classes, n_classes)
    if not len(values):
        return np.full(image.shape[:2], BACKGROUND, dtype=values.dtype)
    if salient is None:
        labels = np.full(image.shape[:2], ignore_value(values), dtype=values.dtype)
        seeds = seeds_of(cam.cam01(), values, config.seed)
        return np.where(seeds == BACKGROUND, labels, seeds) if config.rule == "g2" else labels
    regions, n = components(salient, config.salient, config.smallest)
    if config.rule == "g0":
        return g0(regions, n, values, rng)
    if config.rule == "g1":
        return g1(regions, n, upsample(cam.cam, cam.height, cam.width), values)
    return g2(image, regions, n, seeds_of(cam.cam01(), values, config.seed), values)


def components(salient: NDArray[np.float32], limit: float, smallest: float) -> tuple[NDArray[np.int32], int]:
    """8-connected parts of what is at least as salient as `limit`: (H, W) 1 to n, 0 elsewhere, and n.

    Those of less than the share `smallest` of the image are dropped.
    """
    regions, n = ndimage.label(salient >= np.float32(limit), structure=EIGHT)
    kept = np.bincount(regions.ravel(), minlength=n + 1) >= smallest * regions.size
    kept[0] = False
    return (np.cumsum(kept) * kept).astype(np.int32)[regions], int(kept.sum())


def seeds_of(cam01: NDArray[np.float32], values: NDArray[Any], share: float) -> NDArray[Any]:
    """(H, W) mask value of the strongest map where that is at least `share` of its maximum, BACKGROUND elsewhere.

    Args:
        cam01: (K, H, W) >= 0, K >= 1. values: (K,) their mask values.
    """
    strongest, winner = cam01.max(axis=0), cam01.argmax(axis=0)
    limits = np.float32(share) * cam01.max(axis=(1, 2))
    return np.where((strongest > 0) & (strongest >= limits[winner]), values[winner], BACKGROUND).astype(values.dtype)


def g0(regions: NDArray[np.int32], n: int, values: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Each component is one of the present classes, drawn: what saliency alone is worth."""
    return _painted(rng.choice(values, n), regions)


def g1(regions: NDArray[np.int32], n: int, maps: NDArray[np.float32], values: NDArray[Any]) -> NDArray[Any]:
    """Each component is the present class whose map has the largest mean over it.

    For a classifier that pools its maps by their mean, the class that it sees in the component alone; the authors have
    a network for components.

    Args:
        maps: (K, H, W) >= 0, unnormalised. values: (K,) their mask values.
    """
    means = np.stack([np.asarray(ndimage.mean(one, regions, np.arange(1, n + 1))) for one in maps])
    return _painted(values[means.argmax(axis=0)], regions)


def g2(
    image: NDArray[np.uint8], regions: NDArray[np.int32], n: int, seeds: NDArray[Any], values: NDArray[Any]
) -> NDArray[Any]:
    """A component in which one class has seeds is that class, one with none background; several `divide` it.

    Seeds that no component reaches, 8-connected regions of a class, keep their class.

    Args:
        regions: (H, W) 1 to n, else 0. seeds: (H, W) mask values, else BACKGROUND. values: (K,) of the classes.
    Source: coallaoh/GuidedLabelling src/guide_generation/generate.py.
    """
    claims = np.zeros((n, len(values)), dtype=bool)
    for k, value in enumerate(values):
        touched = np.unique(regions[seeds == value])
        claims[touched[touched > 0] - 1, k] = True
    firsts = np.where(claims.any(axis=1), values[claims.argmax(axis=1)], BACKGROUND)
    labels = _painted(firsts.astype(values.dtype), regions)
    contested = np.flatnonzero(claims.sum(axis=1) > 1)
    for among in np.unique(claims[contested], axis=0):
        theirs = np.isin(regions, 1 + contested[(claims[contested] == among).all(axis=1)])
        labels[theirs] = divide(image, seeds, values[among])[theirs]
    for value in values:
        own, _ = ndimage.label(seeds == value, structure=EIGHT)
        reached = np.unique(own[regions > 0])
        labels[(own > 0) & ~np.isin(own, reached)] = value
    return labels


def divide(image: NDArray[np.uint8], seeds: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """(H, W) of `values`, each pixel's likeliest by a dense CRF with the unary term -p of the blurred seeds p."""
    sigma = BLUR * max(image.shape[:2]) / REFERENCE_PX
    seeded = np.stack([np.where(seeds == value, 1 - 1e-3, 1e-3) for value in values])
    p = ndimage.gaussian_filter(seeded, (0, sigma, sigma))
    return values[crf.refine(image, np.exp(p - 1), CRF).argmax(axis=0)]  # -log of it is 1 - p


def _painted(of_components: NDArray[Any], regions: NDArray[np.int32]) -> NDArray[Any]:
    """Each component's value, BACKGROUND elsewhere."""
    return np.insert(of_components, 0, BACKGROUND)[regions]
