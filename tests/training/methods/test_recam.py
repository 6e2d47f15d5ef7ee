"""ReCAM: closed forms of the masked pooling and the second loss, then what its maps are for."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.training.methods.parts import START, batch, losses_of, model_of, total
from training.data import Batch
from training.losses import multilabel_soft_margin
from training.methods.recam import masked_scores, single_label
from training.models.recam import RecamClassifier
from weakseg.errors import ConfigError
from weakseg.recipe import RecamConfig, TrainConfig


def config(**settings: object) -> TrainConfig:
    return TrainConfig(method="recam", dropout=0.0, recam=RecamConfig(**settings))  # type: ignore[arg-type]


# Masked pooling -------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), n_classes=st.integers(1, 6), channels=st.integers(1, 8), rows=st.integers(1, 5))
def test_it_is_the_head_on_weighted_and_pooled_features(seed: int, n_classes: int, channels: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(2, n_classes, rows, 3, generator=generator)
    features = torch.randn(2, channels, rows, 3, generator=generator)
    weight = torch.randn(n_classes, channels, generator=generator)
    out = masked_scores(masks, F.conv2d(features, weight[:, :, None, None]))
    for b in range(2):
        for c in range(n_classes):
            pooled = (features[b] * masks[b, c]).mean(dim=(1, 2))
            torch.testing.assert_close(out[b, c], weight @ pooled, atol=1e-5, rtol=1e-4)


def test_a_mask_of_ones_pools_and_one_of_zeros_says_nothing() -> None:
    maps = torch.rand(2, 4, 3, 5)
    out = masked_scores(torch.cat([torch.ones(2, 1, 3, 5), torch.zeros(2, 1, 3, 5)], dim=1), maps)
    torch.testing.assert_close(out[:, 0], maps.mean(dim=(2, 3)))
    assert (out[:, 1] == 0).all()


# The second loss ------------------------------------------------------------------------------------------------------


def test_present_rows_count_and_no_others() -> None:
    scores = torch.zeros(2, 3, 3)
    scores[0, 0] = torch.tensor([math.log(2), 0.0, 0.0])  # softmax 1/2, 1/4, 1/4
    scores[0, 2] = torch.tensor([0.0, 0.0, math.log(6)])  # 1/8, 1/8, 3/4
    scores[:, 1] = 100 * torch.randn(2, 3)
    tags = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    expected = (-math.log(1 / 2) - math.log(3 / 4)) / 2
    assert float(single_label(scores[:1], tags[:1])) == pytest.approx(expected, abs=1e-6)
    assert float(single_label(scores, tags)) == pytest.approx(expected / 2, abs=1e-6)  # an image without tags counts 0


def test_soft_tags_are_weights() -> None:
    scores = torch.zeros(1, 2, 2)
    scores[0, 0, 0] = math.log(3)
    value = float(single_label(scores, torch.tensor([[0.75, 0.25]])))
    assert value == pytest.approx(0.75 * -math.log(3 / 4) + 0.25 * math.log(2), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), n_classes=st.integers(1, 5), shift=st.floats(-50, 50))
def test_a_batch_is_the_mean_of_its_images_and_a_common_score_is_nothing(
    seed: int, n_classes: int, shift: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, n_classes, n_classes, generator=generator)
    tags = torch.randint(0, 2, (3, n_classes), generator=generator).float()
    value = single_label(scores, tags)
    alone = torch.stack([single_label(scores[i : i + 1], tags[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(value, alone.mean())
    torch.testing.assert_close(single_label(scores + shift, tags), value, atol=1e-4, rtol=1e-4)
    assert value >= 0


def test_without_tags_there_is_no_gradient_and_no_number_that_is_none() -> None:
    model = model_of("recam")
    losses_of("recam")(model, batch(tags=[(), ()]), START)["single_label"].backward()
    assert (model.second.weight.grad == 0).all()


# The step -------------------------------------------------------------------------------------------------------------


def test_the_first_loss_is_cams_and_the_second_teaches_the_second_head_and_the_features() -> None:
    model, data = model_of("recam", config=config()), batch()
    parts = losses_of("recam", config())(model, data, START)
    out = model(data.images)
    expected = multilabel_soft_margin(model.head(model.backbone(data.images)[-1]).mean(dim=(2, 3)), data.tags)
    torch.testing.assert_close(parts["classification"], expected)
    torch.testing.assert_close(out.logits, out.first.mean(dim=(2, 3)))
    parts["single_label"].backward()
    assert model.head.weight.grad is None  # masks carry no gradient
    assert model.second.weight.grad.abs().sum() > 0
    assert model.backbone.stage5[0].conv1.weight.grad.abs().sum() > 0


def test_the_weight() -> None:
    data = batch()
    once, twice = (
        losses_of("recam", config(weight=w))(model_of("recam", config=config()), data, START) for w in (1.0, 2.0)
    )
    torch.testing.assert_close(twice["single_label"], 2 * once["single_label"])
    torch.testing.assert_close(twice["classification"], once["classification"])


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_a_second_head_that_nothing_teaches_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="train.recam.weight must be positive.*train.method cam"):
        model_of("recam", config=config(weight=weight))


# Maps -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maps", ["product", "second"])
def test_maps_are_by_the_named_weights(maps: str) -> None:
    model, data = model_of("recam", config=config(maps=maps)).eval(), batch()
    with torch.no_grad():
        out, x = model(data.images), model.backbone(data.images)[-1]
    v, w = model.second.weight[:, :, 0, 0], model.head.weight[:, :, 0, 0]
    torch.testing.assert_close(out.cam, torch.einsum("ck,bkhw->bchw", v * w if maps == "product" else v, x))
    assert model.options == {"dropout": 0.0, "maps": maps}


def test_a_class_that_comes_with_another_leaves_its_place() -> None:
    """Tables and chairs are mostly in one image, each a sign of both: by the first head, maps cover both places.

    The second head must tell the two apart, and maps by both heads' weights do.
    """
    model, data = over_given_features(), tables_and_chairs()
    losses, optimizer = losses_of("recam", config()), torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        total(losses(model, data, START)).backward()
        optimizer.step()
    with torch.no_grad():
        out = model(data.images)
    both = data.tags[:, :2].sum(dim=1) == 2
    for c, place, other in ((0, 0, 3), (1, 3, 0)):
        first, maps = (m[both, c].relu() for m in (out.first, out.cam))
        assert first[..., other].mean() > 0.3 * first[..., place].mean()
        assert maps[..., other].mean() < 0.02 * maps[..., place].mean()


def over_given_features() -> RecamClassifier:
    """Without dropout, over "images" of three channels that are the features themselves."""

    class Given(nn.Module):
        channels = (3,)

        def forward(self, images: Tensor) -> list[Tensor]:
            return [images]

    torch.manual_seed(0)
    return RecamClassifier(Given(), 3, dropout=0.0)  # type: ignore[arg-type]


def tables_and_chairs() -> Batch:
    """100 images of 4 x 4 cells, a channel each class: tables in the first column, chairs in the last, cats between."""
    tags = torch.tensor([(1, 1, 0)] * 50 + [(1, 0, 0)] * 15 + [(0, 1, 0)] * 15 + [(0, 0, 1)] * 20).float()
    images = torch.zeros(100, 3, 4, 4)
    for c, columns in enumerate(([0], [3], [1, 2])):
        images[:, c, :, columns] = tags[:, c, None, None]
    return Batch(images, tags, None, [str(i) for i in range(100)])
