"""MDC: where each dilation answers, in closed form; which dilations make sense; then what they are for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from export.onnx_from_torch import onnx_from_graphs
from export.parity import check
from tests.training.cams.networks import photographs
from tests.training.methods.parts import START, batch, losses_of, model_of, total
from training import cams
from training.data import Batch
from training.graphs import ClassifierGraph
from training.losses import multilabel_soft_margin
from training.methods.mdc import default_dilations
from training.models.mdc import MdcClassifier, merged
from training.optim import parameter_groups
from weakseg.errors import ConfigError
from weakseg.recipe import MdcConfig, OptimConfig, TrainConfig


def config(crop_px: int = 256, **settings: object) -> TrainConfig:
    mdc = MdcConfig(**{"width": 16, **settings})  # type: ignore[arg-type]
    return TrainConfig(method="mdc", dropout=0.0, mdc=mdc, optim=OptimConfig(crop_px=crop_px))


class Given(nn.Module):
    """ "Images" of one channel that are the features themselves."""

    channels, strides = (1,), (1,)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images]


def over_given_features(dilations: tuple[int, ...], width: int = 8) -> MdcClassifier:
    torch.manual_seed(0)
    return MdcClassifier(Given(), 1, dropout=0.0, width=width, dilations=dilations)  # type: ignore[arg-type]


# Maps -----------------------------------------------------------------------------------------------------------------


def test_each_classifier_answers_at_its_own_distance() -> None:
    """One lit cell, weights of 1: a map is 1 at the nine cells that see it."""
    model = over_given_features((1, 3), width=1).eval()
    with torch.no_grad():
        for branch in model.branches:
            branch[0].weight.fill_(1.0)
            branch[2].weight.fill_(1.0)
        image = torch.zeros(1, 1, 9, 9)
        image[0, 0, 4, 4] = 1
        out = model(image)
    for maps, dilation in zip(out.maps[0], (1, 3), strict=True):
        expected = torch.zeros(9, 9)
        expected[4 - dilation : 5 + dilation : dilation, 4 - dilation : 5 + dilation : dilation] = 1
        assert torch.equal(maps, expected)
    assert out.cam[0, 0, 4].tolist() == [0, 1, 0, 1, 2, 1, 0, 1, 0]
    assert float(out.logits) == pytest.approx(9 / 81)


def test_the_first_counts_in_full_and_the_mean_of_the_others() -> None:
    first, second, third = torch.tensor([[3.0, -1.0, 2.0], [4.0, 2.0, -8.0], [-6.0, 2.0, 2.0]])
    assert merged((first, second, third)).tolist() == [5.0, 2.0, 3.0]
    assert merged((first,)).tolist() == [3.0, 0.0, 2.0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(2, 5), scale=st.floats(0.1, 10))
def test_the_order_of_the_others_does_not_matter_and_what_one_alone_finds_is_divided(
    seed: int, n: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, *others = torch.randn(n + 1, 2, 3, 4, 4, generator=generator)
    cam = merged((first, *others))
    torch.testing.assert_close(merged((first, *reversed(others))), cam)
    torch.testing.assert_close(merged(tuple(scale * maps for maps in (first, *others))), scale * cam)
    alone = merged((torch.zeros_like(first), others[0].abs(), *(-maps.abs() for maps in others[1:])))
    torch.testing.assert_close(alone, others[0].abs() / n)
    assert (cam >= first.relu()).all()


def test_logits_are_the_mean_of_all_and_each_has_its_loss_weighted_as_its_map_is() -> None:
    model, data = model_of("mdc", config=config()), batch()
    parts, out = losses_of("mdc", config())(model, data, START), model(data.images)
    assert list(parts) == ["classification", "dilated_1", "dilated_2", "dilated_3"]
    each = out.maps.chunk(4, dim=1)
    torch.testing.assert_close(out.logits, torch.stack(each).mean(dim=(0, 3, 4)))
    torch.testing.assert_close(out.cam, merged(each))
    for value, maps, weight in zip(parts.values(), each, (1, 1 / 3, 1 / 3, 1 / 3), strict=True):
        torch.testing.assert_close(value, weight * multilabel_soft_margin(maps.mean(dim=(2, 3)), data.tags))


def test_a_loss_teaches_its_own_classifier_and_the_features() -> None:
    model = model_of("mdc", config=config())
    losses_of("mdc", config())(model, batch(), START)["dilated_2"].backward()
    taught = [bool(branch[2].weight.grad.any()) for branch in model.branches]
    assert taught == [False, False, True, False]
    assert model.backbone.stage5[0].conv1.weight.grad.abs().sum() > 0
    rates = {id(p): group["lr_scale"] for group in parameter_groups(model, OptimConfig()) for p in group["params"]}  # type: ignore[attr-defined]
    assert {rates[id(branch[0].weight)] for branch in model.branches} == {10.0}


def test_maps_are_the_same_in_onnx(tmp_path: Path) -> None:
    graph = ClassifierGraph(model_of("mdc", config=config()).eval(), cams.get("cam"), (0.5, 1.0), flip=True).eval()
    path = tmp_path / "mdc.onnx"
    path.write_bytes(onnx_from_graphs({"mdc": graph})["mdc"])
    images = photographs(2, 75, 50).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    report = check("classifier_multiscale", graph, path, [*images])
    assert all(difference.ok for difference in report.differences)


# Dilations ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), cells=st.integers(1, 6), dilation=st.integers(1, 8))
def test_from_the_number_of_cells_on_a_convolution_sees_one_cell(seed: int, cells: int, dilation: int) -> None:
    """Which is why no such dilation is trained: on a larger image its other weights would be what they began as."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.rand(1, 2, *size, generator=generator) + 0.1 for size in ((cells, cells), (3, 3)))
    whole = F.conv2d(x, weight, padding=dilation, dilation=dilation)
    alone = F.conv2d(x, weight[..., 1:2, 1:2])
    assert torch.allclose(whole, alone) is (dilation >= cells)


@pytest.mark.parametrize(
    ("cells", "stride", "expected"),
    [(41, 8, (1, 3, 6, 9)), (20, 16, (1, 2, 3, 4)), (9, 8, (1, 3, 6)), (4, 16, (1, 2, 3)), (1, 16, (1,))],
)
def test_without_any_they_reach_as_far_as_the_authors(cells: int, stride: int, expected: tuple[int, ...]) -> None:
    assert default_dilations(cells, stride) == expected


@pytest.mark.parametrize(("crop_px", "expected"), [(256, (1, 2, 3, 4)), (48, (1, 2))])
def test_a_model_has_those_that_its_crop_has_room_for(crop_px: int, expected: tuple[int, ...]) -> None:
    model = model_of("mdc", config=config(crop_px))
    assert model.dilations == expected
    assert model.options == {"dropout": 0.0, "width": 16, "dilations": expected}
    assert [branch[0].dilation for branch in model.branches] == [(d, d) for d in expected]


@pytest.mark.parametrize("dilations", [(15,), (5, 1, 2)])
def test_those_given_are_taken_as_they_are(dilations: tuple[int, ...]) -> None:
    assert model_of("mdc", config=config(256, dilations=dilations)).dilations == dilations


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dilations": ()}, "train.mdc.dilations must be one or more, different, at least 1, got none"),
        ({"dilations": (1, 3, 3)}, "different, at least 1, got 1, 3, 3"),
        ({"dilations": (1, 0)}, "different, at least 1, got 1, 0"),
        ({"dilations": (1, 16)}, "must be smaller than the crop's 16 cells, got 1, 16: .*train.optim.crop_px"),
        ({"width": 0}, "train.mdc.width must be at least 1, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of("mdc", config=config(256, **settings))


# What it is for -------------------------------------------------------------------------------------------------------


def test_the_rest_of_an_object_gets_what_its_telling_part_has() -> None:
    """An animal is five cells long, and its head, in the middle, alone tells it. What is further away gets nothing."""
    wide, narrow = (trained(over_given_features(dilations)) for dilations in ((1, 2), (1,)))
    data = animals()
    shown = data.tags[:, 0] == 1

    def at(model: nn.Module, columns: list[int]) -> float:
        """Mean in the animal's row, as a share of the map's maximum."""
        with torch.no_grad():
            values = model(data.images).cam[shown, 0]
        return float((values[:, 4, columns] / values.amax(dim=(1, 2))[:, None]).mean())

    assert at(narrow, ENDS) < 0.05 and at(wide, ENDS) > 0.2 and at(wide, BEYOND) < 0.05


ENDS, BEYOND = [2, 6], [0, 1, 7, 8]


def trained(model: nn.Module) -> nn.Module:
    losses, optimizer = losses_of("mdc", config()), torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        total(losses(model, animals(), START)).backward()
        optimizer.step()
    return model.eval()


def animals() -> Batch:
    """32 images of 9 x 9 cells, every other with a head in the middle, of one feature."""
    tags = torch.zeros(32, 1)
    tags[::2] = 1
    images = 0.05 * torch.rand(32, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    images[::2, 0, 4, 4] = 1
    return Batch(images, tags, None, [str(i) for i in range(32)])
