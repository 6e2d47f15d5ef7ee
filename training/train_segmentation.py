"""Stages `train_seg` and `train_seg_full`: a segmentation network on pseudo-masks or, for the upper bound, on truth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from training import corrections, distributed, self_training
from training.corrections import Corrected
from training.data import UNLABELLED, Batch, LabelSource, TrainingImages
from training.device import pick_device
from training.loop import Moment, fit
from training.losses import segmentation_cross_entropy
from training.models import build_backbone, build_segmentation, load_model, save_model
from training.prohibitive import Prohibitive, prohibitive_losses
from training.pseudo_masks import LOWER_BAND, PseudoMasks, check_labelled
from training.randomness import seed_torch
from weakseg.datasets import Dataset, Sample, read
from weakseg.datasets.truth import Truth, open_truth
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.stages import mask_stage


@dataclass(frozen=True)
class TrueMasks:
    """Sealed truth, for the fully supervised upper bound alone."""

    truth: Truth

    def __call__(self, sample: Sample) -> NDArray[np.integer]:
        return self.truth.mask(sample.id)


def run(recipe: Recipe, folder: Path, *, stage: str, progress: Progress) -> dict[str, Any]:
    """Writes <folder>/<stage>/segmentation.pt; resumes from its checkpoint. `train_seg_full` is the upper bound.

    With several rounds the networks of the earlier ones, and what they make of the training images, are in
    <stage>/round-<n>/. Corrected masks (`train_seg.corrections`), in <stage>/corrections/, count in every round.
    """
    assert recipe.train_seg is not None
    if stage == "train_seg_full":
        whole = replace(recipe.train_seg, rounds=1, corrections=None, prohibitive=False)
        recipe = replace(recipe, train_seg=replace(whole, supervision="full"))
    self_training.check(recipe.train_seg)
    dataset = read(recipe.data, recipe.data.train)
    labels = label_source(recipe, folder)
    corrected, record = corrections.keep(recipe, folder / stage, dataset, progress)
    uncorrected = replace(dataset, samples=tuple(s for s in dataset if s.id not in corrected))
    if isinstance(labels, PseudoMasks):
        labels = Corrected(labels, folder / stage, corrected)
        check_labelled(labels, dataset, progress, advice=LOWER_BAND)
    n_images = 0
    for n in range(1, recipe.train_seg.rounds):
        earlier = folder / stage / f"round-{n}"
        if not (earlier / "segmentation.pt").is_file():
            n_images += _train(recipe, folder, dataset, labels, earlier, progress).get("n_images", 0)
        distributed.wait()
        sure = recipe.train_seg.sure
        n_images += self_training.relabel(recipe, earlier / "segmentation.pt", uncorrected, sure, progress)
        labels = Corrected(PseudoMasks(earlier, dataset.split, self_training.FOLDER), folder / stage, corrected)
        check_labelled(labels, dataset, progress, advice=f"lower train_seg.sure, {sure}")
    summary = _train(recipe, folder, dataset, labels, folder / stage, progress)
    summary |= {"n_images": n_images + summary.get("n_images", 0)}
    return summary if record is None else summary | {"corrections": record}


def _train(
    recipe: Recipe, folder: Path, dataset: Dataset, labels: LabelSource, into: Path, progress: Progress
) -> dict[str, Any]:
    """One round, from the start weights. Returns: what `fit` has to say, which is nothing but in the first process."""
    seed_torch(recipe.seed, 0)
    config = recipe.train_seg
    assert config is not None
    backbone = start_backbone(recipe, folder)
    model = build_segmentation(config.network, backbone, len(dataset.classes), config.width).to(pick_device())
    images = TrainingImages(dataset, config.optim, model.backbone.mean_colour, recipe.seed, labels)
    learner, losses = model, partial(segmentation_losses, balance=config.balance)
    if config.prohibitive:
        learner = Prohibitive(model, len(dataset.classes)).to(pick_device())
        losses = partial(prohibitive_losses, balance=config.balance)
    summary = fit(learner, losses, images, into, progress=progress)
    if distributed.rank() == 0:
        save_model(
            into / "segmentation.pt",
            model,
            kind="segmentation",
            classes=dataset.classes.names,
            method=f"{config.network}, {config.supervision} supervision",
        )
    return summary


def label_source(recipe: Recipe, folder: Path) -> LabelSource:
    assert recipe.train_seg is not None
    if recipe.train_seg.supervision == "full":
        return TrueMasks(open_truth(recipe.data, recipe.data.train, opener="full_supervision"))
    return PseudoMasks(folder, recipe.data.train, mask_stage(recipe), recipe.pseudo_label.soft)


def start_backbone(recipe: Recipe, folder: Path) -> Any:
    """The classifier's backbone, or the recipe's start weights.

    Noisy pseudo-labels need the classifier's: from ImageNet weights a short training collapses to background. Full
    supervision starts from the same place, so that the two differ in nothing but the labels.
    """
    assert recipe.train_seg is not None
    if recipe.train_seg.start == "weights":
        return build_backbone(recipe.backbone)
    classifier, _ = load_model(folder / "train" / "classifier.pt", kind="classifier")
    return classifier.backbone


def segmentation_losses(model: nn.Module, batch: Batch, moment: Moment, *, balance: str) -> dict[str, Tensor]:
    """Cross-entropy at the crop's full resolution."""
    assert batch.labels is not None
    logits = F.interpolate(model(batch.images), size=batch.labels.shape[1:3], mode="bilinear", align_corners=False)
    return {"segmentation": segmentation_cross_entropy(logits, batch.labels, UNLABELLED, balance)}
