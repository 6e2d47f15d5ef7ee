"""SEAM: self-supervised equivariant attention mechanism. Wang et al., CVPR 2020.

The same image is seen twice, as it is and transformed. Its maps must move with it (ER), and the maps that the pixel
correlation module refines in one view must agree with the plain maps of the other (ECR).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from training.data import Batch
from training.loop import Losses, Moment
from training.losses import adaptive_min_pooling, cross_regularisation, equivariance, max_norm, multilabel_soft_margin
from training.models.backbone import Backbone
from training.models.seam import SeamClassifier, SeamOutput, strongest_only, with_background
from training.transforms import Transform, draw_transform, resized
from weakseg.errors import ConfigError
from weakseg.recipe import SeamConfig, TrainConfig

MAP_STRIDE = 4  # pixels of the second view per cell of the grid that maps are compared on
# What one class has in VOC's mean over 20. By default ER is the mean over the present classes, whatever their number in
# the data; at the full weight of that, the shortest way to agree is two maps that shrink to a point (docs/results.md).
ONE_OF_VOC = 0.05
NETWORK = SeamClassifier
LEAST_RANGE = 1.0  # of a map in logits, below which it does not count as an answer of the network


def build(backbone: Backbone, n_classes: int, config: TrainConfig) -> nn.Module:
    seam = config.seam
    if seam.sharpness < 1:
        raise ConfigError(f"train.seam.sharpness must be at least 1, got {seam.sharpness:g}")
    side = Transform(scale=_scale(seam), align_corners=seam.parity).side(config.optim.crop_px)
    if side < 2 * backbone.strides[-1]:
        raise ConfigError(
            f"the second view of SEAM would be {side} px, less than two cells of {backbone.strides[-1]} px: raise "
            f"train.optim.crop_px (now {config.optim.crop_px}) or train.seam.rescale (now {seam.rescale:g})"
        )
    return SeamClassifier(backbone, n_classes, config.dropout, seam.parity, seam.sharpness, seam.pcm_mib)


def memory_settings(config: TrainConfig) -> dict[str, object]:
    return {"train.seam.pcm_mib": config.seam.pcm_mib}


def losses_of(config: TrainConfig) -> Losses:
    return partial(losses, config=config.seam)


def losses(model: nn.Module, batch: Batch, moment: Moment, config: SeamConfig) -> dict[str, Tensor]:
    """L_cls + w_er L_ER + w_ecr L_ECR + w_min L_min; a term of weight 0 is left out."""
    tags = batch.tags
    present = (tags > 0).to(tags.dtype)  # tags may be shares (mixup_cam); a class that is there has maps of full height
    transform = draw_transform(
        config.transforms, config.rescale, config.translate, config.rotate_deg, align_corners=config.parity
    )
    images = batch.images.float()
    transformed = transform.image(images)
    first, second = model(images, present), model(transformed, present)
    size = (-(-transformed.shape[2] // MAP_STRIDE), -(-transformed.shape[3] // MAP_STRIDE))
    if config.parity:
        size = (transformed.shape[2], transformed.shape[3])
        first, second = _at_size(first, images), _at_size(second, transformed)

    classification = [multilabel_soft_margin(output.logits, tags) for output in (first, second)]
    parts = {"classification": (classification[0] + classification[1]) / 2}
    if config.min_pooling > 0:
        pooled = [adaptive_min_pooling(output.refined[:, 1:], present) for output in (first, second)]
        parts["min_pooling"] = config.min_pooling * (pooled[0] + pooled[1]) / 2

    valid = transform.valid(size, images)
    floor = 0.0 if config.parity else LEAST_RANGE
    cam_1 = transform.maps(_present(first.cam, present, floor), size)
    cam_2 = resized(_present(second.cam, present, floor), size)
    cam_1, cam_2 = with_background(cam_1) * valid, with_background(cam_2) * valid
    if config.er > 0:
        share, over = (1.0, None) if config.parity else (ONE_OF_VOC, present)
        parts["er"] = config.er * share * equivariance(cam_1[:, 1:], cam_2[:, 1:], over)
    if config.ecr > 0:
        known = torch.cat([torch.ones_like(present[:, :1]), present], dim=1)  # the background is in every image
        refined_1 = transform.maps(_present(first.refined, known), size) * valid
        refined_2 = resized(_present(second.refined, known), size, config.parity) * valid
        tops = hard_counts(present, size, config)
        parts["ecr"] = config.ecr * (
            cross_regularisation(strongest_only(cam_2), refined_1, tops)
            + cross_regularisation(strongest_only(cam_1), refined_2, tops)
        )
    return parts


def hard_counts(tags: Tensor, size: tuple[int, int], config: SeamConfig) -> Tensor:
    """(B,) how many values of each image ECR looks at: a share of those of its present classes and the background.

    In parity of all C + 1 channels: with few classes in an image that is more than are not 0.
    """
    channels = 1 + (torch.full_like(tags[:, 0], tags.shape[1]) if config.parity else tags.sum(dim=1))
    return (channels * size[0] * size[1] * config.hard_share).long().clamp(min=1)


def _scale(config: SeamConfig) -> float:
    return config.rescale if "rescale" in config.transforms else 1.0


def _present(maps: Tensor, tags: Tensor, floor: float = 0.0) -> Tensor:
    """Maps in [0, 1) by their own extremes, absent classes 0."""
    return max_norm(maps, floor) * tags[:, :, None, None].to(maps.dtype)


def _at_size(output: SeamOutput, images: Tensor) -> SeamOutput:
    """The authors' order: maps are brought to the size of the image before anything else."""
    size = (images.shape[2], images.shape[3])
    cam, refined = (resized(maps, size, align_corners=True) for maps in (output.cam, output.refined))
    return SeamOutput(cam.mean(dim=(2, 3)), cam, refined)
