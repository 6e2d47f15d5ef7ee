"""ACoL: what is erased, in closed form; who learns from what; then a situation with parts of different worth."""

from __future__ import annotations

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from export.half import Half, half_from_fp32
from export.onnx_from_torch import onnx_from_graphs
from tests.training.methods.parts import BODY, HEAD, START, GivenFeatures, animals, batch, losses_of, model_of, total
from training import cams
from training.graphs import ClassifierGraph
from training.losses import multilabel_soft_margin
from training.models.acol import AcolClassifier, fused, strongest
from weakseg.errors import ConfigError
from weakseg.recipe import AcolConfig, TrainConfig

ONNX_TYPES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


def config(**settings: object) -> TrainConfig:
    return TrainConfig(method="acol", dropout=0.0, acol=AcolConfig(**{"width": 16, **settings}))  # type: ignore[arg-type]


def seen_by_second(model: nn.Module, images: Tensor, tags: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What the second classifier is given, what the first is given, and the first's maps."""
    given: dict[str, Tensor] = {}
    handles = [
        getattr(model, name).register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[0]}))
        for name in ("first", "second")
    ]
    try:
        out = model(images, tags)
    finally:
        for handle in handles:
            handle.remove()
    return given["second"], given["first"], out.first


# What is erased -------------------------------------------------------------------------------------------------------


def test_the_largest_of_the_present_maps_by_their_own_extremes() -> None:
    maps = torch.tensor([[[-1.0, 0.0, 3.0, 1.0]], [[5.0, 2.0, 2.0, 3.0]], [[0.0, 9.0, 0.0, 0.0]]])[None]
    both, one, none = (strongest(maps, torch.tensor([tags])) for tags in ([1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0] * 3))
    torch.testing.assert_close(both[0, 0, 0], torch.tensor([1.0, 0.25, 1.0, 0.5]))
    torch.testing.assert_close(one[0, 0, 0], torch.tensor([1.0, 0.0, 0.0, 1 / 3]))
    assert (none == 0).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(0.5, 20), shift=st.floats(-10, 10), n_classes=st.integers(1, 5))
def test_it_knows_neither_scale_nor_offset_and_moves_with_the_cells(
    seed: int, scale: float, shift: float, n_classes: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, n_classes, 4, 6, generator=generator)
    present = torch.randint(0, 2, (2, n_classes), generator=generator).float()
    out = strongest(maps, present)
    assert out.min() >= 0 and out.max() <= 1
    torch.testing.assert_close(strongest(scale * maps + shift, present), out, atol=1e-4, rtol=0)
    assert torch.equal(strongest(maps.flip(3), present), out.flip(3))
    assert (strongest(maps, torch.ones_like(present)) >= out).all()  # another class erases more, never less


def test_constant_maps_erase_nothing() -> None:
    assert (strongest(torch.full((1, 2, 3, 3), -7.0), torch.ones(1, 2)) == 0).all()


@pytest.mark.parametrize("erase", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("given", [True, False])
def test_cells_are_erased_exactly_where_the_first_is_as_strong(erase: float, given: bool) -> None:
    data = batch(tags=[(0,), (1, 2), ()])
    model = model_of("acol", config=config(erase=erase))
    second, first, maps = seen_by_second(model, data.images, data.tags if given else None)
    tags = data.tags if given else (maps.mean(dim=(2, 3)) >= 0).float()  # sigmoid(0) = 0.5
    found = strongest(maps, tags) >= erase
    assert found.any() and not found.all()
    assert torch.equal(second, first * ~found)


def test_with_every_class_taken_for_absent_nothing_is_erased() -> None:
    data = batch(tags=[(), ()])
    second, first, _ = seen_by_second(model_of("acol", config=config()), data.images, data.tags)
    assert torch.equal(second, first)


# Who learns from what -------------------------------------------------------------------------------------------------


def test_each_classifier_has_its_loss_and_no_gradient_passes_what_is_erased() -> None:
    model, data = model_of("acol", config=config()), batch()
    parts, out = losses_of("acol", config())(model, data, START), model(data.images, data.tags)
    for name, maps in (("classification", out.first), ("erased", out.second)):
        torch.testing.assert_close(parts[name], multilabel_soft_margin(maps.mean(dim=(2, 3)), data.tags))
    parts["erased"].backward(retain_graph=True)
    assert all(p.grad is None for p in model.first.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.second.parameters())
    assert model.backbone.stage5[0].conv1.weight.grad.abs().sum() > 0
    parts["classification"].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.first.parameters())


def test_by_what_the_first_finds_no_tag_reaches_the_second() -> None:
    """By tags it does: the second classifier can read them off the hole."""
    data = batch()
    for by, same in (("found", True), ("tags", False)):
        model, losses = model_of("acol", config=config()), losses_of("acol", config(by=by))
        given: list[Tensor] = []
        model.second.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0]))
        for tags in (data.tags, 1 - data.tags):
            losses(model, data._replace(tags=tags), START)
        assert torch.equal(*given) is same


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"erase": 0.0}, r"train.acol.erase must lie in \(0, 1\], got 0"),
        ({"erase": 1.5}, r"train.acol.erase must lie in \(0, 1\], got 1.5"),
        ({"width": 0}, "train.acol.width must be at least 1, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of("acol", config=config(**settings))


# Maps -----------------------------------------------------------------------------------------------------------------


def test_maps_are_joined_in_units_of_their_own_maxima() -> None:
    first, second = (torch.tensor([[[values]]]) for values in ([8.0, 2.0, 0.0, -9.0], [-1.0, 1.0, 2.0, -3.0]))
    torch.testing.assert_close(fused(first, second), 5 * torch.tensor([[[[1.0, 0.5, 1.0, 0.0]]]]), atol=1e-4, rtol=0)


def test_of_two_alike_it_is_one_and_of_one_without_an_answer_half_the_other() -> None:
    maps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(fused(maps, maps), maps.relu(), atol=1e-3, rtol=0)
    torch.testing.assert_close(fused(maps, -maps.abs()), maps.relu() / 2, atol=1e-3, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(0.1, 50))
def test_it_takes_both_alike_keeps_the_unit_and_no_class_depends_on_another(seed: int, scale: float) -> None:
    first, second = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    out = fused(first, second)
    assert out.min() >= 0
    assert torch.equal(out, fused(second, first))
    torch.testing.assert_close(fused(scale * first, scale * second), scale * out, atol=1e-3 * scale, rtol=1e-3)
    assert torch.equal(out[:, 1:2], fused(first[:, 1:2], second[:, 1:2]))


def test_what_the_model_gives() -> None:
    with torch.no_grad():
        out = model_of("acol", config=config()).eval()(batch().images)
    torch.testing.assert_close(out.logits, (out.first + out.second).mean(dim=(2, 3)) / 2)
    assert torch.equal(out.cam, fused(out.first, out.second))


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_in_16_bits_its_graph_is_one(half: Half) -> None:
    """A cell is found or not, which is neither float32 nor less: as a factor of features it would have to be cast."""
    graph = ClassifierGraph(model_of("acol", config=config()).eval(), cams.get("cam")).eval()
    made = onnx.load_model_from_string(
        half_from_fp32(onnx_from_graphs({"classifier": graph})["classifier"], half)
    ).graph
    weights = {node.input[1] for node in made.node if node.op_type == "Conv"}
    assert {weight.data_type for weight in made.initializer if weight.name in weights} == {ONNX_TYPES[half]}


# What it is for -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["tags", "found"])
def test_the_second_finds_what_the_first_does_not_need(by: str) -> None:
    """Animals have a head, which nothing else has, and a body, whose colour other things have at times, too."""
    model, data = over_given_features(), animals()
    losses, optimizer = losses_of("acol", config(by=by)), torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(100):
        optimizer.zero_grad()
        total(losses(model, data, START)).backward()
        optimizer.step()
    with torch.no_grad():
        out = model.eval()(data.images)
    shown = data.tags[:, 0] == 1
    first, cam = (
        maps[shown, 0].relu() / maps[shown, 0].amax(dim=(1, 2), keepdim=True) for maps in (out.first, out.cam)
    )
    assert first[..., HEAD].mean() > 0.5 and cam[..., HEAD].mean() > 0.5
    assert first[..., BODY].mean() < 0.05
    assert cam[..., BODY].mean() > 0.25


def over_given_features() -> AcolClassifier:
    """Without dropout, over "images" of two channels that are the features themselves."""

    torch.manual_seed(0)
    return AcolClassifier(GivenFeatures(), 1, dropout=0.0, width=64)  # type: ignore[arg-type]
