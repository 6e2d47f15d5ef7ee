"""Online prohibitive learning: a network's own labels, without the classes that its classifier does not see."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from training import make_cams, pseudo_label, train_classifier, train_segmentation
from training.data import UNLABELLED, Batch
from training.losses import multilabel_soft_margin, segmentation_cross_entropy
from training.models import build_backbone, build_segmentation, load_model
from training.prohibitive import Prohibitive, online_labels, prohibitive_losses
from training.step import Moment
from weakseg.classes import BACKGROUND
from weakseg.errors import ConfigError
from weakseg.progress import Progress
from weakseg.recipe import BackboneConfig, Recipe, SegConfig
from weakseg.stages import stage_keys

START = Moment(0, 0, 0.0)
losses = partial(prohibitive_losses, balance="none")


def test_classes_that_the_classifier_does_not_see_are_prohibited() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    sure, unsure = 9.0, -9.0
    for logits, expected in (((sure, sure), 2), ((sure, unsure), 1), ((unsure, unsure), BACKGROUND)):
        assert online_labels(scores, torch.tensor([logits])).tolist() == [[[expected]]]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(1, 5))
def test_they_are_the_largest_of_probability_times_confidence(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(2, n + 1, 3, 4, generator=generator)
    logits = 3 * torch.randn(2, n, generator=generator)
    confidence = torch.cat([torch.ones(2, 1), logits.sigmoid()], dim=1)
    products = confidence[:, :, None, None] * scores.softmax(dim=1)
    chosen = products.gather(1, online_labels(scores, logits)[:, None])
    torch.testing.assert_close(chosen[:, 0], products.amax(dim=1))


def network() -> Prohibitive:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="small_resnet", freeze_stages=0))
    return Prohibitive(build_segmentation("deeplab_v2", backbone, 2, 16), 2).train()


def labelled() -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(-1, 3, (2, 32, 32), generator=generator)
    return Batch(images, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), labels, ["one", "other"])


def test_the_losses_are_those_of_both_labels_and_of_the_tags() -> None:
    model, data = network(), labelled()
    scores, logits = model(data.images)
    scores = nn.functional.interpolate(scores, size=(32, 32), mode="bilinear")
    expected = {
        "segmentation": segmentation_cross_entropy(scores, data.labels, UNLABELLED, "none"),  # type: ignore[arg-type]
        "online": segmentation_cross_entropy(scores, online_labels(scores, logits), UNLABELLED, "none"),
        "classification": multilabel_soft_margin(logits, data.tags),
    }
    parts = losses(model, data, START)
    assert list(parts) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value)


def test_online_labels_teach_the_network_and_tags_alone_the_classifier() -> None:
    model, data = network(), labelled()
    parts = losses(model, data, START)
    (parts["online"] + 0 * parts["segmentation"]).backward()
    assert model.classifier.weight.grad is None
    assert all(branch.weight.grad.abs().sum() > 0 for branch in model.network.branches)
    model.zero_grad(set_to_none=True)
    losses(model, data, START)["classification"].backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    assert all(branch.weight.grad is None for branch in model.network.branches)
    assert next(model.network.backbone.parameters()).grad is not None
    assert not model.network.backbone._forward_hooks


class Fixed(nn.Module):
    """A backbone that gives its images; `channels` as a real one has."""

    channels = (3,)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images]


class Scores(nn.Module):
    """A segmentation network whose scores of two images are its parameters."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.backbone, self.scores = Fixed(), nn.Parameter(scores)

    def forward(self, images: Tensor) -> Tensor:
        self.backbone(images)
        return self.scores


def test_what_the_masks_leave_out_becomes_the_class_that_the_image_has() -> None:
    """The right half of both images is IGNORE, and in both the network takes it for class 2 rather than class 1."""
    scores = torch.zeros(2, 3, 4, 8)
    scores[:, 1, :, 4:], scores[:, 2, :, 4:] = 1.0, 1.2
    labels = torch.full((2, 4, 8), UNLABELLED)
    labels[:, :2, :4] = BACKGROUND
    labels[0, 2:, :4], labels[1, 2:, :4] = 1, 2
    images = torch.zeros(2, 3, 4, 8)
    images[0, 0], images[1, 1] = 1, 1  # red and green, which the classifier learns to tell
    data = Batch(images, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), labels, ["one", "other"])
    torch.manual_seed(0)
    model = Prohibitive(Scores(scores), 2)
    optimizer = torch.optim.SGD(  # the classifier must be the faster: what a network is sure of, it teaches itself
        [{"params": model.classifier.parameters(), "lr": 10.0}, {"params": model.network.parameters(), "lr": 2.0}]
    )
    before = model(images).scores.argmax(dim=1)
    for _ in range(200):
        optimizer.zero_grad()
        torch.stack(list(losses(model, data, START).values())).sum().backward()
        optimizer.step()
    after = model(images).scores.argmax(dim=1)
    assert (before[:, :, 4:] == 2).all()
    assert (after[0, :, 4:] == 1).all() and (after[1, :, 4:] == 2).all()
    assert torch.equal(after[labels != UNLABELLED], labels[labels != UNLABELLED])


def test_what_is_stored_is_the_network_alone(recipe: Recipe, tmp_path: Path) -> None:
    optim = replace(recipe.train.optim, epochs=1)
    recipe = replace(recipe, train=replace(recipe.train, optim=optim), train_seg=SegConfig(width=16, optim=optim))
    quiet = Progress("silent")
    for module, stage in ((train_classifier, "train"), (make_cams, "cam"), (pseudo_label, "pseudo_label")):
        module.run(recipe, tmp_path, stage=stage, progress=quiet)
    states = {}
    for prohibitive in (False, True):
        folder = tmp_path / str(prohibitive)
        folder.mkdir()
        for stage in ("train", "cam", "pseudo_label"):
            (folder / stage).symlink_to(tmp_path / stage)
        some = replace(recipe, train_seg=replace(recipe.train_seg, prohibitive=prohibitive))  # type: ignore[type-var]
        train_segmentation.run(some, folder, stage="train_seg", progress=quiet)
        learnt = torch.load(folder / "train_seg/checkpoint.pt", weights_only=True)["model"]
        assert ("classifier.weight" in learnt) == prohibitive
        model, _ = load_model(folder / "train_seg/segmentation.pt", kind="segmentation")
        states[prohibitive] = model.state_dict()
    assert list(states[True]) == list(states[False])
    assert any(not torch.equal(value, states[False][key]) for key, value in states[True].items())


def test_it_is_not_for_true_masks(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"train_seg\.prohibitive makes up for what pseudo-masks leave out"):
        SegConfig(supervision="full", prohibitive=True)
    assert recipe.train_seg is not None
    both = replace(recipe, upper_bound=True)
    plain, own = stage_keys(both), stage_keys(replace(both, train_seg=replace(recipe.train_seg, prohibitive=True)))
    assert own["train_seg"] != plain["train_seg"] and own["train_seg_full"] == plain["train_seg_full"]
