"""torch.compile in the loop, with the real compiler."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.data import Batch, TrainingImages
from training.loop import Moment, fit
from training.losses import multilabel_soft_margin
from training.step import compiled
from weakseg.datasets import read
from weakseg.errors import ConfigError
from weakseg.progress import Progress
from weakseg.recipe import Recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # of torch's compiler, about torch
]


class Small(nn.Module):
    """Two layers; every kernel takes the compiler seconds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images.float() / 255).relu()).mean((2, 3))


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_training_is_the_same_training_with_the_same_keys(recipe: Recipe, tmp_path: Path) -> None:
    """To rounding, without dropout; and what it saved goes on without a compiler."""
    models, seen = {}, {}

    def losses(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        seen[name] = type(model).__name__
        return {"classification": multilabel_soft_margin(model(batch.images), batch.tags)}

    def images(*, compile: bool) -> TrainingImages:  # noqa: A002
        config = replace(recipe.train.optim, epochs=3, lr=0.3, compile=compile)
        return TrainingImages(read(recipe.data, "train"), config, (124, 116, 104), 0)

    for name in ("eager", "compiled"):
        models[name] = Small()
        fit(models[name], losses, images(compile=name == "compiled"), tmp_path / name, progress=Progress("silent"))
    assert seen == {"eager": "Small", "compiled": "OptimizedModule"}
    eager, other = (models[name].state_dict() for name in ("eager", "compiled"))
    assert list(eager) == list(other)
    for key, value in eager.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-6)
    saved = torch.load(tmp_path / "compiled/checkpoint.pt", weights_only=True)
    assert list(saved["model"]) == list(eager) and saved["step"] == 6
    again = fit(Small(), losses, images(compile=False), tmp_path / "compiled", progress=Progress("silent"))
    assert again["n_images"] == 0


def test_without_a_compiler_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/nowhere/g++"))
    with pytest.raises(ConfigError, match=r"needs a compiler that works for cpu \(.*leave optim\.compile off"):
        compiled(torch.nn.Linear(1, 1))
    torch.compiler.reset()
