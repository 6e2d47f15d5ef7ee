"""The method that CONTRIBUTING.md shows is one."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.methods.parts import START, batch, losses_of, model_of, total
from training import methods
from weakseg.errors import ConfigError
from weakseg.recipe import TrainConfig

CONTRIBUTING = Path(__file__).parents[3] / "CONTRIBUTING.md"


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its name, once it is found as any file of training/methods."""
    code = re.search(r"```python\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "smoothed.py").write_text(code[1])
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield "smoothed"
    sys.modules.pop("training.methods.smoothed", None)


def test_it_is_found_and_learns(shown: str) -> None:
    model, data = model_of(shown, config=TrainConfig(dropout=0.0)), batch()
    loss = total(losses_of(shown)(model, data, START))
    loss.backward()
    assert model.head.weight.grad.abs().sum() > 0
    with torch.no_grad():
        data = data._replace(tags=data.tags * 0.9 + 0.05)
        torch.testing.assert_close(total(losses_of("cam")(model, data, START)), loss.detach())


def test_it_is_named_where_methods_are(shown: str) -> None:
    with pytest.raises(ConfigError, match=f"expected one of .*{shown}"):
        methods.get("smoothing")


def test_it_is_thirty_lines() -> None:
    code = re.search(r"```python\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    assert code is not None and len(code[1].splitlines()) <= 30
