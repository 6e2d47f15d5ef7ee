"""AffinityNet: pairs, affinities and loss against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from training.losses import affinity
from training.models import build_backbone
from training.models.affinity import AffinityNet, affinities
from weakseg.classes import IGNORE
from weakseg.random_walk import pair_offsets
from weakseg.recipe import BackboneConfig

OFFSETS = [tuple(row) for row in pair_offsets(5).tolist()]
DOWN = [(1, 0)]  # one neighbour: the cell below


def test_affinities_are_what_their_equation_says() -> None:
    features = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    found = affinities(features, 3)
    for s, (dy, dx) in enumerate(pair_offsets(3).tolist()):
        for y in range(6):
            for x in range(7):
                if y + dy < 6 and 0 <= x + dx < 7:
                    apart = (features[:, :, y, x] - features[:, :, y + dy, x + dx]).abs().mean(dim=1)
                    torch.testing.assert_close(found[:, s, y, x], torch.exp(-apart))
                else:
                    assert (found[:, s, y, x] == 0).all()


def test_the_loss_looks_at_the_papers_number_of_pairs() -> None:
    """Of labels that are one class everywhere, the gradient of the mean is the same at every pair that counts."""
    w = torch.full((1, 34, 56, 56), 0.5, requires_grad=True)
    affinity(w, torch.ones(1, 56, 56, dtype=torch.long), OFFSETS, IGNORE).backward()
    assert int((w.grad != 0).sum()) == 84_864


@pytest.mark.parametrize(
    ("above", "below", "expected"),
    [
        (0, 0, 0.25 * -math.log(0.3)),
        (2, 2, 0.25 * -math.log(0.3)),
        (2, 1, 0.5 * -math.log(0.7)),
        (0, 1, 0.5 * -math.log(0.7)),
        (IGNORE, 1, 0.0),
        (0, IGNORE, 0.0),
        (IGNORE, IGNORE, 0.0),
    ],
)
def test_truth_table_of_labels(above: int, below: int, expected: float) -> None:
    loss = affinity(torch.full((1, 1, 2, 1), 0.3), torch.tensor([[[above], [below]]]), DOWN, IGNORE)
    assert float(loss) == pytest.approx(expected, abs=1e-4)


def test_each_kind_of_pair_has_its_own_mean() -> None:
    labels = torch.tensor([[[0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]])  # three of background, one object, one unequal
    w = torch.tensor([[[[0.1, 0.2, 0.4, 0.5, 0.9], [0.0] * 5]]])
    logs = [-math.log(v) for v in (0.1, 0.2, 0.4)]
    expected = sum(logs) / 3 / 4 - math.log(0.5) / 4 - math.log(0.1) / 2
    assert float(affinity(w, labels, DOWN, IGNORE)) == pytest.approx(expected, abs=1e-3)


def test_all_ignored_is_no_loss_and_no_gradient() -> None:
    w = torch.rand(1, 34, 12, 12, requires_grad=True)
    loss = affinity(w, torch.full((1, 12, 12), IGNORE), OFFSETS, IGNORE)
    loss.backward()
    assert float(loss.detach()) == 0
    assert (w.grad == 0).all()


@pytest.mark.parametrize("name", ["small_resnet", "mobilenet_v2", "resnet50", "resnet38d"])
def test_over_every_backbone(name: str) -> None:
    model = AffinityNet(build_backbone(BackboneConfig(name=name, weights=None, output_stride=8))).eval()
    with torch.no_grad():
        features = model(torch.randint(0, 256, (1, 3, 96, 64)).float())
    assert features.shape == (1, 448, 12, 8)
    found = affinities(features, 5)
    assert found.shape == (1, 34, 12, 8)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_pair_distances_have_the_gradient_of_what_they_say() -> None:
    features = torch.randn(2, 5, 6, 7, dtype=torch.double, requires_grad=True)
    got = affinities(features, 3)
    around = F.pad(features, (2, 2, 0, 2))
    for s, (dy, dx) in enumerate(pair_offsets(3).tolist()):
        there = around[:, :, dy : dy + 6, 2 + dx : 9 + dx]
        inside = F.pad(torch.ones(6, 7), (2, 2, 0, 2))[dy : dy + 6, 2 + dx : 9 + dx]
        torch.testing.assert_close(got[:, s], torch.exp(-(features - there).abs().mean(dim=1)) * inside)
    assert torch.autograd.gradcheck(lambda x: affinities(x, 3), (features,))
    with torch.no_grad():
        torch.testing.assert_close(affinities(features, 3), got.detach())
