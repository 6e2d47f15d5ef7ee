"""SEAM against its specification: closed forms and properties of each part, then the whole step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from training import cams, methods
from training.data import Batch
from training.loop import Moment
from training.losses import adaptive_min_pooling, cross_regularisation, equivariance, max_norm
from training.methods.seam import hard_counts
from training.models import build_backbone, load_model, save_model
from training.models.seam import (
    PixelCorrelation,
    SeamClassifier,
    SeamOutput,
    of_unit_power,
    pcm_input,
    pixel_correlation,
    strongest_only,
    with_background,
)
from training.optim import parameter_groups
from training.transforms import Transform, draw_transform
from weakseg.errors import ConfigError
from weakseg.recipe import BackboneConfig, OptimConfig, SeamConfig, TrainConfig

START = Moment(step=0, epoch=0, done=0.0)


def backbone() -> nn.Module:
    return build_backbone(BackboneConfig(name="small_resnet", output_stride=8, freeze_stages=0))


def batch(n_classes: int = 3, size: int = 64, tags: list[tuple[int, ...]] | None = None) -> Batch:
    tags = [(0,), (0, n_classes - 1)] if tags is None else tags
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (len(tags), 3, size, size), dtype=np.uint8))
    vector = torch.zeros(len(tags), n_classes)
    for row, present in zip(vector, tags, strict=True):
        row[list(present)] = 1
    return Batch(images, vector, None, [f"image-{i}" for i in range(len(tags))])


def config(**seam: object) -> TrainConfig:
    return TrainConfig(method="seam", dropout=0.0, seam=SeamConfig(**seam))  # type: ignore[arg-type]


def losses(model: nn.Module, data: Batch, train: TrainConfig) -> dict[str, Tensor]:
    return methods.get("seam").losses_of(train)(model, data, START)


# Pixel correlation ----------------------------------------------------------------------------------------------------


def test_one_hot_features_average_each_group() -> None:
    groups = torch.tensor([0, 1, 0, 2, 1, 0])
    features = nn.functional.one_hot(groups).T[None].float()
    maps = torch.tensor([[[3.0, 1.0, 0.0, 5.0, 2.0, 6.0]]])
    expected = torch.tensor([[[3.0, 1.5, 3.0, 5.0, 1.5, 3.0]]])
    torch.testing.assert_close(pixel_correlation(maps, features), expected, atol=1e-3, rtol=0)


def test_opposite_features_do_not_mix() -> None:
    features = torch.tensor([[[1.0, -1.0, 1.0]]])
    maps = torch.tensor([[[2.0, 7.0, 4.0]]])
    torch.testing.assert_close(pixel_correlation(maps, features), torch.tensor([[[3.0, 7.0, 3.0]]]), atol=1e-3, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(1, 30), k=st.integers(1, 4))
def test_it_is_a_convex_combination(seed: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps, features = torch.randn(2, k, n, generator=generator), torch.randn(2, 5, n, generator=generator)
    out = pixel_correlation(maps, features)
    slack = 1e-4 * maps.abs().max()
    assert (out <= maps.amax(dim=2, keepdim=True).clamp(min=0) + slack).all()
    assert (out >= maps.amin(dim=2, keepdim=True).clamp(max=0) - slack).all()
    ones = pixel_correlation(torch.ones_like(maps), features)
    torch.testing.assert_close(ones, torch.ones_like(maps), atol=1e-3, rtol=0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(1, 20))
def test_it_moves_with_the_pixels(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps, features = torch.rand(1, 2, n, generator=generator), torch.randn(1, 4, n, generator=generator)
    order = torch.randperm(n, generator=generator)
    moved = pixel_correlation(maps[..., order], features[..., order])
    torch.testing.assert_close(moved, pixel_correlation(maps, features)[..., order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("columns", [1, 3, 24])
def test_in_columns_it_is_the_same_and_so_are_its_gradients(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 25, generator=generator)
    results = []
    for limit in (None, columns * 2 * 25 * 4):
        features = torch.randn(2, 6, 25, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = pixel_correlation(maps, features, 2.0, limit)
        (out**2).sum().backward()
        results.append((out.detach(), features.grad))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)


def test_the_limit_bounds_what_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from training.models import seam

    seen: list[int] = []
    columns = seam._columns

    def watched(maps: Tensor, f: Tensor, some: Tensor, sharpness: float) -> Tensor:
        seen.append(f.shape[0] * f.shape[2] * some.shape[2] * 4)
        return columns(maps, f, some, sharpness)

    monkeypatch.setattr(seam, "_columns", watched)
    pixel_correlation(torch.rand(2, 1, 100), torch.rand(2, 3, 100), limit_bytes=8000)
    assert max(seen) <= 8000 < sum(seen) == 2 * 100 * 100 * 4


def test_sharpness_is_the_exponent_of_the_correlations() -> None:
    features = torch.tensor([[[1.0, 0.6], [0.0, 0.8]]])  # a cosine of 0.6
    maps = torch.tensor([[[0.0, 1.0]]])
    for sharpness in (1.0, 2.0, 3.5):
        share = 0.6**sharpness
        expected = torch.tensor([[[share / (1 + share), 1 / (1 + share)]]])
        torch.testing.assert_close(pixel_correlation(maps, features, sharpness), expected, atol=1e-4, rtol=0)


def test_untrained_it_averages_over_pixels_that_the_backbone_finds_alike() -> None:
    """Two kinds of pixels, scores on a part of one kind: they spread over that kind; in parity after training."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.zeros(8, 8, dtype=torch.long)
    kind[:, 4:] = 1
    low, high = (torch.randn(2, n, generator=generator)[kind].movedim(2, 0)[None] for n in (24, 40))
    images = torch.randn(1, 3, 32, 32, generator=generator)
    scores = torch.zeros(1, 1, 8, 8)
    scores[:, :, :2, :4] = 1  # a quarter of the left half
    torch.manual_seed(0)
    ours, parity = (
        PixelCorrelation(24, 40, parity, sharpness=1.0, limit_bytes=1 << 20)(scores, images, low, high)[0, 0].detach()
        for parity in (False, True)
    )
    left, right = kind == 0, kind == 1
    assert ours[left].mean() == pytest.approx(0.25, abs=0.05)
    assert ours[right].mean() < 0.3 * ours[left].mean()
    assert parity[right].mean() > 0.5 * parity[left].mean()


def test_every_channel_of_the_parts_counts_alike() -> None:
    maps = torch.stack([torch.full((2, 3, 3), 4.0), torch.zeros(2, 3, 3)])
    out = of_unit_power(maps)
    torch.testing.assert_close(out[0], torch.ones(2, 3, 3), atol=1e-4, rtol=0)
    assert (out[1] == 0).all()  # a constant image of the mean colour


# What goes into it ----------------------------------------------------------------------------------------------------


def test_present_classes_compete_and_absent_ones_do_not() -> None:
    cam = torch.zeros(1, 3, 1, 4)
    cam[0, :, 0] = torch.tensor([[4.0, 2.0, 0.0, 0.0], [1.0, 2.0, 2.0, 0.0], [9.0, 9.0, 9.0, 0.0]])
    tags = torch.tensor([[1.0, 1.0, 0.0]])
    out = pcm_input(cam, tags)[0, :, 0]
    expected = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def test_in_parity_an_absent_class_takes_pixels_away() -> None:
    """The authors' defect, kept behind the switch: the network is told that all classes compete."""
    cam = torch.tensor([4.0, 1.0, 9.0, 9.0]).view(1, 2, 1, 2)
    assert pcm_input(cam, torch.ones(1, 2))[0, 1].sum() < pcm_input(cam, torch.tensor([[1.0, 0.0]]))[0, 1].sum()


def test_without_tags_no_class_depends_on_another() -> None:
    cam = torch.rand(2, 4, 5, 6)
    together = pcm_input(cam, None)[:, 1:]
    for c in range(4):
        torch.testing.assert_close(together[:, c : c + 1], pcm_input(cam[:, c : c + 1], None)[:, 1:])


def test_an_image_without_classes_is_all_background() -> None:
    out = pcm_input(torch.rand(1, 2, 3, 3), torch.zeros(1, 2))
    assert (out[:, 0] == 1).all()
    assert (out[:, 1:] == 0).all()


def test_strongest_only_keeps_the_background() -> None:
    maps = torch.tensor([0.3, 0.2, 0.9]).view(1, 3, 1, 1)
    assert strongest_only(maps).flatten().tolist() == pytest.approx([0.3, 0.0, 0.9])


# Losses ---------------------------------------------------------------------------------------------------------------


def test_max_norm_takes_each_map_to_its_own_range() -> None:
    maps = torch.tensor([[[[-1.0, 0.0, 2.0]], [[1.0, 2.0, 3.0]], [[5.0, 5.0, 5.0]]]])
    expected = torch.tensor([[[[0.0, 0.0, 1.0]], [[0.0, 0.5, 1.0]], [[0.0, 0.0, 0.0]]]])
    torch.testing.assert_close(max_norm(maps), expected, atol=1e-4, rtol=0)


def test_min_pooling_is_the_mean_of_the_smallest_quarter() -> None:
    maps = torch.arange(8.0).view(1, 1, 2, 4)
    both = torch.cat([maps, 100 + maps], dim=1)
    assert float(adaptive_min_pooling(both, torch.tensor([[1.0, 0.0]]))) == pytest.approx(0.5)  # 0 and 1
    assert float(adaptive_min_pooling(both, torch.tensor([[1.0, 1.0]]))) == pytest.approx(100.5)
    assert float(adaptive_min_pooling(maps[..., :1, :1], torch.ones(1, 1))) == 0  # at least one pixel


def test_equivariance_is_the_mean_over_the_classes_of_each_image() -> None:
    first, second = torch.zeros(3, 4, 1, 2), torch.zeros(3, 4, 1, 2)
    first[0, 0], first[1, 1] = 1.0, torch.tensor([[0.5, 0.0]])
    tags = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert float(equivariance(first, second, tags)) == pytest.approx((1 + 0.25 / 2 + 0) / 3)
    assert float(equivariance(first, second)) == pytest.approx((2 + 0.5) / 24)  # the paper's, over all


def test_cross_regularisation_is_the_mean_of_the_largest() -> None:
    target = torch.tensor([[0.0, 0.5, 1.0, 0.25], [0.0, 0.0, 0.0, 1.0]]).view(2, 1, 2, 2).requires_grad_()
    refined = torch.zeros(2, 1, 2, 2, requires_grad=True)
    loss = cross_regularisation(target, refined, torch.tensor([2, 1]))
    assert loss.item() == pytest.approx(((1 + 0.5) / 2 + 1) / 2)
    loss.backward()
    assert target.grad is None
    assert refined.grad is not None
    assert np.count_nonzero(refined.grad.numpy()) == 3


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), share=st.floats(0.01, 1))
def test_cross_regularisation_of_a_share_is_not_below_that_of_all(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, refined = torch.rand(2, 3, 4, 4, generator=generator), torch.rand(2, 3, 4, 4, generator=generator)
    some, every = torch.full((2,), max(1, int(share * 48))), torch.full((2,), 48)
    hard, mean = (cross_regularisation(target, refined, k) for k in (some, every))
    assert hard >= mean - 1e-6
    torch.testing.assert_close(mean, (target - refined).abs().mean())


def test_hard_counts_follow_the_classes_that_are_present() -> None:
    tags = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    size = (10, 7)
    assert hard_counts(tags, size, SeamConfig()).tolist() == [28, 56, 14]
    assert hard_counts(tags, size, SeamConfig(parity=True)).tolist() == [56, 56, 56]  # floor(0.2 K h w)
    assert hard_counts(tags[:1], (1, 1), SeamConfig(hard_share=0.01)).tolist() == [1]


def test_losses_leave_their_inputs_alone() -> None:
    maps, tags = torch.rand(2, 3, 4, 4), torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    before = maps.clone(), tags.clone()
    max_norm(maps)
    adaptive_min_pooling(maps, tags)
    equivariance(maps, maps.flip(3))
    cross_regularisation(maps, maps.flip(3), torch.tensor([3, 5]))
    strongest_only(maps)
    with_background(maps)
    pcm_input(maps, tags)
    assert torch.equal(maps, before[0])
    assert torch.equal(tags, before[1])


# Transforms -----------------------------------------------------------------------------------------------------------


def test_a_flip_is_exact() -> None:
    x = torch.rand(2, 3, 16, 32)
    flip = draw_transform(("flip",), 0.3, 0.1, 20)
    torch.testing.assert_close(flip.image(x), x.flip(3), atol=1e-5, rtol=0)
    assert (flip.valid((4, 8), x) == 1).all()


def test_a_shift_moves_the_picture_and_says_what_it_lost() -> None:
    shift = Transform(torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]))  # half of [-1, 1]'s half: a quarter of the side
    x = torch.arange(16.0).view(1, 1, 1, 16).expand(1, 1, 16, 16)
    torch.testing.assert_close(shift.maps(x, (16, 16))[0, 0, 3, :12], torch.arange(4.0, 16.0), atol=1e-4, rtol=0)
    assert shift.valid((16, 16), x)[0, 0, 0].tolist() == [1.0] * 12 + [0.0] * 4


@pytest.mark.parametrize("kinds", [("rescale",), ("flip",), ("translate",), ("rotate",), ("rescale", "flip", "rotate")])
def test_of_a_function_of_single_pixels_it_makes_no_difference_what_comes_first(kinds: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    transform = draw_transform(kinds, 0.5, 0.15, 20)
    x = torch.rand(1, 3, 32, 48)
    seen = transform.image(x)
    size = (seen.shape[2], seen.shape[3])
    inside = transform.valid(size, x)
    torch.testing.assert_close(2 * seen * inside, transform.maps(2 * x, size) * inside, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("side", "expected"), [(448, 134), (224, 67)])
def test_in_parity_the_second_view_has_the_authors_size(side: int, expected: int) -> None:
    transform = draw_transform(("rescale",), 0.3, 0, 0, align_corners=True)
    assert transform.image(torch.rand(1, 3, side, side)).shape[2:] == (expected, expected)


def test_otherwise_it_is_made_of_whole_cells() -> None:
    transform = draw_transform(("rescale",), 0.3, 0, 0)
    assert transform.image(torch.rand(1, 3, 224, 20)).shape[2:] == (64, 16)


# The step -------------------------------------------------------------------------------------------------------------


class Pointwise(nn.Module):
    """A network whose maps move exactly with the image and whose refined maps are its plain ones."""

    def forward(self, images: Tensor, tags: Tensor) -> SeamOutput:
        cam = images[:, :2]
        refined = strongest_only(with_background(max_norm(cam) * tags[:, :, None, None]))
        return SeamOutput(cam.mean(dim=(2, 3)) / 255, cam, refined)


@pytest.mark.parametrize("kinds", [("flip",), ()])
def test_an_equivariant_network_has_nothing_to_learn_from_er_and_ecr(kinds: tuple[str, ...]) -> None:
    data = batch(2, 16, [(0,), (0, 1)])
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)  # red on the left, green on the right, nothing between
    images[:, 0, :, :6] = images[:, 1, :, 10:] = torch.linspace(0, 255, 96).round().to(torch.uint8).view(16, 6)
    data = data._replace(images=images)
    parts = losses(Pointwise(), data, config(transforms=kinds, min_pooling=0.0, parity=True))
    assert float(parts["er"]) < 1e-4
    assert float(parts["ecr"]) < 1e-3


@pytest.mark.parametrize("parity", [False, True])
def test_the_refined_maps_train_the_pcm_alone(parity: bool) -> None:
    model = methods.get("seam").build(backbone(), 3, config(parity=parity)).train()
    parts = losses(model, batch(), config(parity=parity))
    (parts["ecr"] + parts["min_pooling"]).backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == {"pcm.low.weight", "pcm.high.weight", "pcm.embed.weight"}


@pytest.mark.parametrize("parity", [False, True])
def test_er_reaches_the_backbone_through_both_views(parity: bool) -> None:
    model = methods.get("seam").build(backbone(), 3, config(parity=parity)).train()
    maps: list[Tensor] = []

    class Watched(nn.Module):
        def forward(self, images: Tensor, tags: Tensor) -> SeamOutput:
            output = model(images, tags)
            output.cam.retain_grad()
            maps.append(output.cam)
            return output

    losses(Watched(), batch(), config(parity=parity))["er"].backward()
    assert all(cam.grad is not None and cam.grad.abs().sum() > 0 for cam in maps)
    assert next(model.backbone.parameters()).grad.abs().sum() > 0
    assert model.head.weight.grad.abs().sum() > 0
    assert model.pcm.embed.weight.grad is None


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize(
    ("n_classes", "tags"),
    [(1, [(0,), ()]), (4, [(1, 3), (2,)]), (20, [(0, 5, 19)]), (2, [(), ()]), (5, [(0,), (0,)])],
)
def test_any_number_of_classes_and_tags(n_classes: int, tags: list[tuple[int, ...]], parity: bool) -> None:
    train = config(parity=parity)
    model = methods.get("seam").build(backbone(), n_classes, train).train()
    parts = losses(model, batch(n_classes, 32, tags), train)
    assert set(parts) == {"classification", "min_pooling", "er", "ecr"}
    total = torch.stack(list(parts.values())).sum()
    total.backward()
    assert torch.isfinite(total)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_weight_of_zero_leaves_a_loss_out() -> None:
    model = methods.get("seam").build(backbone(), 3, config()).train()
    assert set(losses(model, batch(), config(er=0.0, min_pooling=0.0))) == {"classification", "ecr"}
    twice, once = (losses(model, batch(), config(er=weight))["er"] for weight in (2.0, 1.0))
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize(("parity", "rate"), [(True, 10.0), (False, 0.1)])
def test_rates_of_head_and_pcm(parity: bool, rate: float) -> None:
    """By default the PCM starts from what the backbone knows, and learns slowly."""
    model = methods.get("seam").build(backbone(), 3, config(parity=parity))
    rates = {}
    for group in parameter_groups(model, OptimConfig(new_lr_scale=10)):
        rates |= {id(p): group["lr_scale"] for p in group["params"]}  # type: ignore[attr-defined]
    assert {rates[id(p)] for p in model.pcm.parameters()} == {rate}
    assert rates[id(model.head.weight)] == 10


def test_a_sharpness_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="train.seam.sharpness must be at least 1, got 0.5"):
        methods.get("seam").build(backbone(), 3, config(sharpness=0.5))


def test_the_batch_is_left_alone() -> None:
    data = batch()
    before = data.images.clone(), data.tags.clone()
    losses(methods.get("seam").build(backbone(), 3, config()).train(), data, config())
    assert torch.equal(data.images, before[0])
    assert torch.equal(data.tags, before[1])


# The network ----------------------------------------------------------------------------------------------------------


def test_the_authors_head_has_a_channel_that_nothing_teaches() -> None:
    ours, theirs = (methods.get("seam").build(backbone(), 3, config(parity=parity)) for parity in (False, True))
    assert (ours.head.out_channels, theirs.head.out_channels) == (3, 4)
    parts = losses(theirs.train(), batch(), config(parity=True))
    torch.stack(list(parts.values())).sum().backward()
    assert (theirs.head.weight.grad[0] == 0).all()
    assert (theirs.head.weight.grad[1:] != 0).any()


@pytest.mark.parametrize("parity", [False, True])
def test_it_is_stored_and_read_again(tmp_path, parity: bool) -> None:
    model = methods.get("seam").build(backbone(), 3, config(parity=parity)).eval()
    save_model(tmp_path / "m.pt", model, kind="classifier", classes=("a", "b", "c"), method="seam")
    again, classes = load_model(tmp_path / "m.pt", kind="classifier")
    assert isinstance(again, SeamClassifier)
    assert classes == ("a", "b", "c")
    images = batch().images.float()
    with torch.no_grad():
        for one, two in zip(model(images), again(images), strict=True):
            assert torch.equal(one, two)


def test_in_parity_strided_layers_are_padded_as_the_authors_do() -> None:
    phases = {
        parity: {
            module.phase
            for module in methods.get("seam").build(backbone(), 3, config(parity=parity)).modules()
            if hasattr(module, "phase")
        }
        for parity in (False, True)
    }
    assert phases[True] == {0}
    assert 1 in phases[False]


def test_refined_maps_as_a_cam_method() -> None:
    model = methods.get("seam").build(backbone(), 3, config()).eval()
    with torch.no_grad():
        logits, maps = cams.get("pcm").maps(model, batch().images.float())
        plain = cams.get("cam").maps(model, batch().images.float())
    assert maps.shape == plain[1].shape == (2, 3, 8, 8)
    assert 0 <= float(maps.min()) <= float(maps.max()) <= 1
    torch.testing.assert_close(logits, plain[0])


def test_refined_maps_need_a_pcm() -> None:
    plain = methods.get("cam").build(backbone(), 3, TrainConfig())
    with pytest.raises(ConfigError, match="train method seam"):
        cams.get("pcm").maps(plain, batch().images.float())


def test_sections_of_the_config_are_what_the_model_is_built_from() -> None:
    train = replace(config(pcm_mib=1), dropout=0.25)
    model = methods.get("seam").build(backbone(), 2, train)
    assert model.options == {"dropout": 0.25, "parity": False, "sharpness": 2.0, "pcm_mib": 1}


def test_over_resnet38d_it_has_the_papers_size() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet38d", output_stride=8, freeze_stages=1))
    model = methods.get("seam").build(backbone, 20, config(parity=True))
    assert sum(p.numel() for p in model.parameters()) == 105_358_208
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 104_489_536
