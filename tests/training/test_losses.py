"""Losses in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from training.losses import multilabel_soft_margin, segmentation_cross_entropy
from weakseg.classes import IGNORE


def test_soft_margin_equals_torchs() -> None:
    logits, tags = torch.randn(5, 7), (torch.rand(5, 7) < 0.3).float()
    torch.testing.assert_close(
        multilabel_soft_margin(logits, tags), torch.nn.functional.multilabel_soft_margin_loss(logits, tags)
    )


def test_soft_margin_of_zero_logits_is_ln_2() -> None:
    assert multilabel_soft_margin(torch.zeros(2, 3), torch.ones(2, 3)).item() == pytest.approx(math.log(2))


def test_ignored_pixels_do_not_count() -> None:
    logits = torch.randn(1, 4, 2, 2, requires_grad=True)
    labels = torch.tensor([[[0, IGNORE], [2, IGNORE]]])
    loss = segmentation_cross_entropy(logits, labels, IGNORE)
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad[..., 1].any()
    assert loss.item() == pytest.approx(
        (-logits.log_softmax(1)[0, 0, 0, 0] - logits.log_softmax(1)[0, 2, 1, 0]).item() / 2
    )


def test_balanced_loss_weighs_objects_as_much_as_background() -> None:
    """One object pixel against 99 background pixels: half of the loss each."""
    logits = torch.zeros(1, 3, 10, 10)
    logits[:, 1] = 2.0
    labels = torch.zeros(1, 10, 10, dtype=torch.long)
    labels[0, 0, 0] = 1
    p = logits.softmax(1)[0, :, 0, 0]
    loss = segmentation_cross_entropy(logits, labels, IGNORE, "foreground")
    assert loss.item() == pytest.approx(-(math.log(p[0]) + math.log(p[1])) / 2, rel=1e-5)


@pytest.mark.parametrize("balance", ["none", "foreground"])
def test_nothing_labelled_gives_zero_with_a_gradient(balance: str) -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = segmentation_cross_entropy(logits, torch.full((1, 4, 4), IGNORE), IGNORE, balance)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()
