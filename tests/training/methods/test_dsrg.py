"""DSRG: how seeds grow, on drawn probabilities, and what is learnt from them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.training.methods.parts import START
from tests.training.methods.test_sec import Scores, square
from training.data import UNLABELLED
from training.methods import dsrg, sec
from training.methods.dsrg import check, grow, grown, losses
from training.models.pixel_classifier import PixelClassifier
from weakseg.errors import ConfigError
from weakseg.recipe import DsrgConfig, OptimConfig, TrainConfig

LIMITS = np.array([0.99, 0.85, 0.85, 0.85])  # background and three classes
OF = {".": 7, "0": 0, "1": 1, "2": 2, "3": 3, "#": UNLABELLED}  # seeds as drawn; 7: undecided


def seeds(drawn: str) -> NDArray[np.int64]:
    return np.array([[OF[letter] for letter in row] for row in drawn.split()], dtype=np.int64)


def sure_of(drawn: str, probability: float = 0.995) -> NDArray[np.float32]:
    """(4, h, w): the drawn class has this probability at a cell, "." an even one, "#" none at all."""
    values = seeds(drawn)
    q = np.full((4, *values.shape), (1 - probability) / 3, np.float32)
    for value in range(4):
        q[value][values == value] = probability
    q[:, values == OF["."]], q[:, values == OF["#"]] = 0.25, 0
    return q


def after(seed: str, sure: NDArray[np.float32], present: tuple[int, ...] = (1, 1, 1)) -> str:
    letters = {value: letter for letter, value in OF.items()}
    out = grown(seeds(seed), sure, np.array(present, dtype=bool), LIMITS)
    return " ".join("".join(letters[value] for value in row) for row in out.tolist())


def test_a_seed_grows_over_what_is_connected_and_sure() -> None:
    assert after("1.... ..... .....", sure_of("111.. ..1.1 ....1")) == "111.. ..1.. ....."


def test_connected_through_corners() -> None:
    assert after("1... .... ....", sure_of("11.. ..1. ...1")) == "11.. ..1. ...1"
    assert after("1... .... ....", sure_of("11.. ...1 ...1")) == "11.. .... ...."


def test_it_grows_where_the_class_is_above_its_limit() -> None:
    assert after("1... 0...", sure_of("1111 0000", 0.9)) == "1111 0..."
    assert after("1... 0...", sure_of("1111 0000", 0.84)) == "1... 0..."
    assert after("1... 0...", sure_of("1111 0000", 0.995)) == "1111 0000"


def test_without_a_seed_nothing_grows() -> None:
    assert after("0... ....", sure_of("0222 0222")) == "0... 0..."


def test_seeds_of_others_are_walls() -> None:
    sure = sure_of("11111 11111 11111")
    assert after("1.2.. ..2.. ..2..", sure) == "112.. 112.. 112.."
    assert after("1.2.. ..2.. .....", sure) == "11211 11211 11111"


def test_an_absent_class_does_not_grow_and_does_not_stand_in_the_way() -> None:
    """Candidates are the likeliest of background and the image's classes."""
    assert after("3.... .....", sure_of("33333 33333"), (1, 1, 0)) == "3.... ....."
    q = sure_of("11111 .....")
    q[3, 0] = 0.999  # of what the image does not have
    assert after("1.... .....", q, (1, 0, 0)) == "11111 ....."
    assert after("1.... .....", q, (1, 0, 1)) == "1.... ....."


def test_seeds_stay_whatever_the_network_says() -> None:
    assert after("1.0. ...2", sure_of("2222 1111")) == "1.02 1112"


def test_nothing_grows_beyond_the_image() -> None:
    assert after("1.## ..##", sure_of("11## 11##")) == "11## 11##"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16), sure=st.floats(0, 1), power=st.integers(1, 8))
def test_growing_adds_to_seeds_and_ends(seed: int, sure: float, power: int) -> None:
    rng = np.random.default_rng(seed)
    start = rng.choice([0, 1, 2, 3, 7, UNLABELLED], size=(7, 9), p=[0.05, 0.05, 0.05, 0.05, 0.7, 0.1])
    q = rng.random((4, 7, 9), np.float32) ** power
    q /= q.sum(axis=0)
    present, limits = np.array([True, True, False]), np.array([sure, sure / 2, sure, sure])
    before = start.copy(), q.copy()
    out = grown(start, q, present, limits)
    was = (start >= 0) & (start < 4)
    assert (out[was] == start[was]).all()
    new = (out != start) & ~was
    assert set(np.unique(out[new])) <= {0, 1, 2}
    assert all(q[out[y, x], y, x] > limits[out[y, x]] for y, x in np.argwhere(new))
    assert np.array_equal(grown(out, q, present, limits), out)
    assert np.array_equal(grown(start[:, ::-1], q[..., ::-1], present, limits), out[:, ::-1])
    assert np.array_equal(start, before[0]) and np.array_equal(q, before[1])


def test_of_a_batch_each_image_has_its_own_tags() -> None:
    start = torch.from_numpy(np.stack([seeds("1... ...2"), seeds("1... ...2")]))
    q = torch.from_numpy(np.stack([sure_of("11.. ..22", 0.9), sure_of("11.. ..22", 0.9)]))
    out = grow(start, q, torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), DsrgConfig())
    assert out.dtype == torch.int64
    assert out[0].tolist() == seeds("11.. ..22").tolist() and out[1].tolist() == seeds("11.. ...2").tolist()
    strict = grow(start, q, torch.ones(2, 3), DsrgConfig(sure=0.95, sure_background=0.1))
    assert torch.equal(strict, start)


# The step -------------------------------------------------------------------------------------------------------------


def test_a_network_that_is_sure_of_the_square_learns_from_all_of_it() -> None:
    """Of the seed's 2 x 2 cells the seed of SEC learns; here all cells of the square have the same gradient."""
    scores = torch.zeros(1, 4, 16, 16)
    scores[:, 2, 4:12, 4:10] = 4.0
    gradients = {}
    for method, config in ((dsrg, DsrgConfig(constrain=0.0)), (sec, DsrgConfig(constrain=0.0))):
        model = Scores(scores.clone())
        method.losses(model, square(), START, config)["seed"].backward()
        gradients[method] = model.scores.grad[0, 2] < 0  # type: ignore[index]
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:12, 4:10] = True
    assert torch.equal(gradients[dsrg], inside)
    assert gradients[sec].sum() == 4


def test_seeds_grow_while_it_learns() -> None:
    scores = torch.zeros(1, 4, 16, 16)
    scores[:, 2, 4:12, 4:10] = 0.5  # a guess
    model = Scores(scores)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        torch.stack(list(losses(model, square(), START, DsrgConfig()).values())).sum().backward()
        optimizer.step()
    out = model.scores.detach()[0].argmax(dim=0)
    expected = torch.zeros(16, 16, dtype=torch.long)
    expected[4:12, 4:10] = 2
    assert torch.equal(out, expected)


def test_terms_and_weights() -> None:
    model = Scores(torch.randn(1, 4, 16, 16))
    assert set(losses(model, square(), START, DsrgConfig())) == {"seed", "constrain"}
    assert set(losses(model, square(), START, DsrgConfig(constrain=0.0))) == {"seed"}
    both = losses(model, square(), START, DsrgConfig(expand=2.0))
    torch.testing.assert_close(both["expand"], 2 * sec.losses(model, square(), START, DsrgConfig(expand=1.0))["expand"])


def test_a_ratio_beyond_its_limits_has_no_gradient() -> None:
    q, real = torch.full((1, 2, 1, 1), 0.5), torch.ones(1, 1, 1, dtype=torch.bool)
    gradients = {}
    for clip, expected in (
        (None, math.log(0.5 / 1) + math.log(0.5 / 4.4e-4)),
        (dsrg.RATIOS, math.log(0.5) + math.log(20)),
    ):
        scores = torch.tensor([8.0, 0.0]).view(1, 2, 1, 1).requires_grad_()  # p of class 1: 3.4e-4 and FLOOR
        loss = sec.divergence(q, sec.floored(scores.softmax(dim=1)), real, clip)
        loss.backward()
        assert loss.item() == pytest.approx(expected / 2, abs=0.01)
        assert scores.grad is not None
        gradients[clip] = scores.grad.abs().max().item()
    assert gradients[None] > 0.3 and gradients[dsrg.RATIOS] < 1e-3


def test_scores_that_have_diverged_end_by_their_loss() -> None:
    parts = losses(Scores(torch.full((1, 4, 16, 16), math.nan)), square(), START, DsrgConfig())
    assert not any(torch.isfinite(part) for part in parts.values())


def test_settings_that_cannot_be_used_are_refused() -> None:
    check(DsrgConfig())
    with pytest.raises(ConfigError, match="train.dsrg: expected sure and sure_background in .*got 0.85 and 1.5"):
        check(DsrgConfig(sure_background=1.5))
    with pytest.raises(ConfigError, match="train.dsrg: expected seed in"):
        check(DsrgConfig(seed=0.0))


def test_network_and_budget_are_those_of_sec() -> None:
    config = TrainConfig(optim=OptimConfig(epochs=10), dsrg=DsrgConfig(seeds_share=0.2))
    assert dsrg.optim_of(config) == replace(config.optim, epochs=8, lr=0.1 * config.optim.lr)
    assert dsrg.NETWORK is PixelClassifier
