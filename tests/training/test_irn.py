"""IRN: paths, affinities and the frozen backbone against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.losses import affinity
from training.models import EdgeNet, build_backbone
from training.models.irn import path, path_affinities
from training.optim import parameter_groups
from weakseg.classes import IGNORE
from weakseg.random_walk import pair_offsets, random_walk
from weakseg.recipe import BackboneConfig, OptimConfig


def edge_net(name: str = "small_resnet", **options: int) -> EdgeNet:
    torch.manual_seed(0)
    return EdgeNet(build_backbone(BackboneConfig(name=name, freeze_stages=0, freeze_bn=False)), **options)


@pytest.mark.parametrize(
    ("offset", "drawn"),
    [
        ((0, 3), ["XXXX"]),
        ((1, 3), ["XXXX", "XXXX"]),
        ((2, 2), ["XX.", "XXX", ".XX"]),
        ((2, -2), [".XX", "XXX", "XX."]),
        ((4, 2), ["XX.", "XX.", "XXX", ".XX", ".XX"]),
        ((1, 0), ["X", "X"]),
    ],
)
def test_a_path_is_what_lies_along_the_line(offset: tuple[int, int], drawn: list[str]) -> None:
    left = min(0, offset[1])
    expected = [(y, x + left) for y, row in enumerate(drawn) for x, cell in enumerate(row) if cell == "X"]
    assert path(*offset) == expected


def test_affinities_are_what_their_equation_says() -> None:
    edges = torch.rand(2, 1, 6, 7, generator=torch.Generator().manual_seed(0))
    found = path_affinities(edges, 4)
    for s, (dy, dx) in enumerate(pair_offsets(4).tolist()):
        for y in range(6):
            for x in range(7):
                if y + dy < 6 and 0 <= x + dx < 7:
                    highest = torch.stack([edges[:, 0, y + py, x + px] for py, px in path(dy, dx)]).amax(dim=0)
                    assert torch.equal(found[:, s, y, x], 1 - highest)
                else:
                    assert (found[:, s, y, x] == 0).all()


def test_a_wall_parts_what_lies_beside_it() -> None:
    edges = torch.zeros(1, 1, 8, 9)
    edges[..., 4] = 1
    found = path_affinities(edges, 5)
    side = np.sign(np.arange(9) - 4)
    for s, (dy, dx) in enumerate(pair_offsets(5).tolist()):
        for x in range(max(0, -dx), 9 - max(0, dx)):
            together = side[x] == side[x + dx] != 0
            assert (found[0, s, : 8 - dy, x] == float(together)).all()


def test_scores_stay_on_their_side_of_a_wall() -> None:
    edges = torch.zeros(1, 1, 8, 9)
    edges[..., 4] = 1
    affinities = edge_net().affinities(edges, 5)[0].numpy()
    scores = np.zeros((1, 8, 9), dtype=np.float32)
    scores[0, 2, :5] = 1
    walked = random_walk(scores, affinities, radius=5, beta=10, steps=1000)[0]
    assert walked[:, 5:].max() == 0
    assert walked[:, 4].max() == 0  # what is boundary does not set out
    assert walked[:, :4].min() > 0.1
    assert np.ptp(walked[:, :4]) < 1e-3


def test_the_gradient_goes_to_the_highest_boundary_of_a_path() -> None:
    edges = torch.tensor([[[[0.1, 0.2, 0.7, 0.3]]]], requires_grad=True)
    of_four = pair_offsets(4).tolist().index([0, 3])
    path_affinities(edges, 4)[0, of_four, 0, 0].backward()
    assert edges.grad is not None
    assert edges.grad.tolist() == [[[[0, 0, -1, 0]]]]


@pytest.mark.parametrize("name", ["small_resnet", "mobilenet_v2", "resnet50"])
def test_over_every_backbone(name: str) -> None:
    model = edge_net(name).eval()
    with torch.no_grad():
        edges = model(torch.randint(0, 256, (1, 3, 96, 64)).float())
    assert edges.shape == (1, 1, 24, 16)
    assert 0 < float(edges.min()) < float(edges.max()) < 1
    found = model.affinities(edges, 5)
    assert found.shape == (1, 35, 24, 16)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    torch.testing.assert_close(found[:, -1:], 1 - edges)


def test_the_backbone_stays_as_it_is() -> None:
    model = edge_net().train()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    offsets = [(int(dy), int(dx)) for dy, dx in pair_offsets(3)]
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    labels[:, :, 4:] = 1
    edges = model(torch.rand(2, 3, 32, 32) * 255)
    affinity(model.affinities(edges, 3)[:, : len(offsets)], labels, offsets, IGNORE).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("backbone."), name
        assert parameter.grad is None or bool(parameter.grad.any()), name
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    listed = {id(p) for group in parameter_groups(model, OptimConfig()) for p in group["params"]}  # type: ignore[attr-defined]
    assert listed == {id(p) for name, p in model.named_parameters() if not name.startswith("backbone.")}


def test_boundaries_are_learnt_from_labels() -> None:
    """Two colours, sure labels away from their border: the boundary that explains the pairs lies at the border."""
    model = edge_net().train()
    images = torch.full((1, 3, 64, 64), 40.0)
    images[..., 32:] = 220
    labels = torch.zeros(1, 16, 16, dtype=torch.long)
    labels[:, :, 8:] = 1
    labels[:, :, 7:9] = IGNORE
    offsets = [(int(dy), int(dx)) for dy, dx in pair_offsets(5)]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        affinity(model.affinities(model(images), 5)[:, : len(offsets)], labels, offsets, IGNORE).backward()
        optimizer.step()
    with torch.no_grad():
        edges = model.eval()(images)[0, 0]
    assert edges[4:12, 7:9].amax(dim=1).min() > 0.9
    assert edges[4:12, [3, 4, 11, 12]].max() < 0.2
