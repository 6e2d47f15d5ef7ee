"""When torch and the runtime differ by more than the tolerance, float64 decides which of them is off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.parity import _exact, compare
from training import cams
from training.graphs import ClassifierGraph
from training.models import build_backbone
from training.models.seam import SeamClassifier
from weakseg.errors import ParityError
from weakseg.recipe import BackboneConfig


class Cancelling(nn.Module):
    """A small difference of large sums: float32 loses it, float64 does not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1e8, 1.0, -1e8]))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        ones = torch.ones(3, dtype=self.weight.dtype)
        return {"cam": torch.stack([(self.weight * ones).cumsum(0)[-1]]).reshape(1, 1, 1, 1)}


def test_float64_is_the_arbiter_and_the_weights_come_back() -> None:
    module = Cancelling()
    before = module.weight.detach().clone()
    images = np.zeros((1, 1, 1, 3), np.uint8)
    rounded = {"cam": np.zeros((1, 1, 1, 1), np.float32)}
    assert _exact(module, images, rounded)["cam"].item() == 1.0
    assert module.weight.dtype == torch.float32 and torch.equal(module.weight, before)


def test_a_module_without_a_float64_form_keeps_what_it_said() -> None:
    class Stuck(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            raise RuntimeError("expected Float, got Double")

    rounded = {"cam": np.ones((1, 1, 1, 1), np.float32)}
    assert _exact(Stuck(), np.zeros((1, 1, 1, 3), np.uint8), rounded) is rounded


def test_networks_with_a_pcm_have_a_float64_form() -> None:
    network = SeamClassifier(build_backbone(BackboneConfig(name="small_resnet", weights=None)), 3).eval()
    module = ClassifierGraph(network, cams.get("pcm"))
    images = np.random.default_rng(0).integers(0, 256, (1, 40, 56, 3), dtype=np.uint8)
    rounded = {"cam": np.zeros(0, np.float32)}
    exact = _exact(module, images, rounded)
    assert exact is not rounded
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


class Constant:
    """A runner of two maps that have one value each."""

    provider = "test"

    def __init__(self, *values: float, scores: tuple[float, ...] = ()) -> None:
        self.values, self.scores = values, scores

    def run(self, graph, images, outputs=None):
        n, height, width = images.shape[:3]
        cam = np.empty((n, 2, -(-height // 4), -(-width // 4)), np.float32)
        cam[:] = np.float32(self.values)[:, None, None]
        return {"cam": cam} | ({"scores": np.tile(np.float32(self.scores), (n, 1))} if self.scores else {})

    def close(self) -> None: ...


def test_maps_of_unlikely_classes_are_left_out_where_that_is_asked_for() -> None:
    images = [np.zeros((20, 24, 3), np.uint8)]
    settings = {"normalisation": "max", "runtime": "test", "precision": "fp32", "views": 1}
    reference, off = (Constant(1.0, value, scores=(0.9, 0.05)) for value in (1.0, 1.01))
    report = compare("classifier", reference, off, images, min_score=0.1, **settings)
    assert report.summary()["cam"] == 0
    for min_score in (0.0, 0.01):
        with pytest.raises(ParityError, match="graph classifier, output cam"):
            compare("classifier", reference, off, images, min_score=min_score, **settings)


def test_tiny_maps_of_16_bits_are_left_out_with_those_methods_alone() -> None:
    class OffWhereTiny(Constant):
        def run(self, graph, images, outputs=None):
            outputs = super().run(graph, images)
            if min(images.shape[1:3]) < 64:
                outputs["cam"][:, 1] = 1.5
            return outputs

    images = [np.zeros((70, 64, 3), np.uint8)]
    reference, off = (kind(1.0, 1.0, scores=(0.9, 0.9)) for kind in (Constant, OffWhereTiny))
    settings = {"normalisation": "max", "runtime": "test", "views": 1}
    for half in ("fp16", "bf16"):
        assert compare("c", reference, off, images, precision=half, min_score=0.1, **settings).summary()["cam"] == 0
        with pytest.raises(ParityError, match="images 1x1x1 "):
            compare("c", reference, off, images, precision=half, min_score=0.0, **settings)
    with pytest.raises(ParityError, match="images 1x1x1 "):
        compare("c", reference, off, images, precision="fp32", min_score=0.1, **settings)
    with pytest.raises(ParityError, match="images 1x70x64 "):
        compare(
            "c", reference, Constant(1.0, 1.5, scores=(0.9, 0.9)), images, precision="fp16", min_score=0.1, **settings
        )


class Noisy(nn.Module):
    """Two maps, of which float32 loses the second one: a small difference of large numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1e8, 0.5]))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        large, small = self.weight
        size = [images.shape[0], 1, -(-images.shape[1] // 4), -(-images.shape[2] // 4)]
        noisy = (large + small) - large
        return {"cam": torch.cat([torch.ones(size), noisy.expand(size)], dim=1)}


def test_maps_that_torch_itself_cannot_compute_say_nothing() -> None:
    images = [np.zeros((20, 24, 3), np.uint8)]
    settings = {"normalisation": "max", "runtime": "test", "precision": "fp32", "views": 1}
    assert compare("classifier", Noisy(), Constant(1.0, 0.4), images, **settings).summary()["cam"] == 0
    with pytest.raises(ParityError, match=r"graph classifier, output cam, images 1x20x24 \(B x H x W\), fp32"):
        compare("classifier", Noisy(), Constant(1.01, 0.4), images, **settings)


class Sloped(Constant):
    """The same, each map rising by `rise` from left to right; `noise` on one cell."""

    def __init__(self, *values: float, rise: float, noise: float = 0.0) -> None:
        super().__init__(*values)
        self.rise, self.noise = rise, noise

    def run(self, graph, images, outputs=None):
        cam = super().run(graph, images)["cam"]
        cam += np.linspace(0, self.rise, cam.shape[3], dtype=np.float32)
        cam[:, :, 0, cam.shape[3] // 2] += np.float32(self.noise)
        return {"cam": cam}


@pytest.mark.parametrize(
    ("rise", "normalisation", "ok"), [(1e-3, "minmax", True), (1e-3, "max", True), (2e-2, "minmax", False)]
)
def test_what_minmax_stretches_is_the_range(rise, normalisation, ok) -> None:
    """Noise of a 200,000th of a map is nothing, and much of a map that is nearly flat: which then says nothing."""
    settings = {"normalisation": normalisation, "runtime": "test", "precision": "fp32", "views": 1}
    reference, off = (Sloped(1.0, 1.0, rise=rise, noise=noise) for noise in (0.0, 5e-6))
    images = [np.zeros((20, 240, 3), np.uint8)]
    if ok:
        compare("classifier", reference, off, images, **settings)
    else:
        with pytest.raises(ParityError, match="output cam01"):
            compare("classifier", reference, off, images, **settings)
