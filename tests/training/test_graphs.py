"""Graphs: geometry of views, flips and crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from training import cams
from training.cams import cam as cam_method
from training.graphs import ClassifierGraph, SegmentationGraph, canvas_images, view_side
from training.models import CamClassifier, DeepLabV3Plus, build_backbone
from training.models.classifier import ClassifierOutput
from weakseg.cam import upsample
from weakseg.errors import ConfigError
from weakseg.recipe import BackboneConfig


class Blocks(nn.Module):
    """A network of known geometry: cell (i, j) of its map is the mean of its own 16 x 16 block of the red channel."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.register_buffer("mean", torch.tensor([10.0, 20.0, 30.0]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> ClassifierOutput:
        cam = nn.functional.avg_pool2d(images[:, :1], 16)
        return ClassifierOutput(cam.mean((2, 3)), cam)


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.5, 2.0), (0.75, 1.25)])
@pytest.mark.parametrize("flip", [False, True])
def test_views_line_up_with_the_image(scales: tuple[float, ...], flip: bool) -> None:
    """Of a linear ramp every view, flipped or not, gives the same ramp back: no shift, no squeeze."""
    height, width = 240, 400  # no view but the first is whole cells by itself
    ramp = np.broadcast_to(np.linspace(0, 255, width), (height, width)).astype(np.float32)
    images = torch.from_numpy(np.repeat(ramp[None, ..., None], 3, axis=3))
    graph = ClassifierGraph(Blocks(), cam_method, scales, flip)
    out = graph(images)["cam"][0].numpy() / graph.n_views
    back = upsample(out, height, width)[0]
    inner = (slice(None), slice(48, -48))  # beyond the outermost block centres a map can only be constant
    assert np.abs(back - ramp)[inner].max() < 0.5


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (31, 33), (48, 64), (65, 17)])
def test_outputs_cover_the_image_at_stride_4(size: tuple[int, int]) -> None:
    backbone = build_backbone(BackboneConfig())
    images = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    expected = tuple(-(-s // 4) for s in size)
    with torch.no_grad():
        out = ClassifierGraph(CamClassifier(backbone, 3), cams.get("cam"), (0.5, 1.0), True).eval()(images)
        logits = SegmentationGraph(DeepLabV3Plus(backbone, 3, width=8), (1.0, 1.5), True).eval()(images)["logits"]
    assert out["cam"].shape == (2, 3, *expected) and out["scores"].shape == (2, 3)
    assert logits.shape == (2, 4, *expected)
    assert out["cam"].min() >= 0 and out["scores"].min() >= 0 and out["scores"].max() <= 1


@given(size=st.integers(1, 200).map(lambda cells: 16 * cells), eighths=st.integers(1, 32))
def test_views_are_whole_cells_of_about_their_scale(size: int, eighths: int) -> None:
    side = view_side(size, eighths)
    assert side % 16 == 0 and side >= 16
    assert abs(side - size * eighths / 8) <= (8 if eighths >= 4 else 15)
    assert view_side(size, 8) == size


def test_a_mirrored_image_gives_mirrored_maps() -> None:
    graph = ClassifierGraph(
        CamClassifier(build_backbone(BackboneConfig()), 3), cams.get("cam"), (1.0, 1.5), True
    ).eval()
    images = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)
    with torch.no_grad():
        a, b = graph(images), graph(images.flip(2))
    torch.testing.assert_close(a["cam"].flip(3), b["cam"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a["scores"], b["scores"])


def test_alone_or_in_a_batch() -> None:
    graph = ClassifierGraph(
        CamClassifier(build_backbone(BackboneConfig()), 3), cams.get("cam"), (0.5, 1.0), True
    ).eval()
    images = torch.randint(0, 256, (3, 40, 56, 3), dtype=torch.uint8)
    with torch.no_grad():
        together = graph(images)["cam"]
        alone = torch.cat([graph(images[i : i + 1])["cam"] for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_padding_is_the_mean_colour() -> None:
    mean = torch.tensor([10.0, 20.0, 30.0]).view(1, 3, 1, 1)
    x = canvas_images(torch.zeros(1, 5, 7, 3, dtype=torch.uint8), mean, 16)
    assert x.shape == (1, 3, 16, 16)
    assert torch.equal(x[:, :, 5:], mean.expand(1, 3, 11, 16))
    assert torch.allclose(x[:, :, :5, :7], torch.zeros(()), atol=1e-5)


@pytest.mark.parametrize("scales", [(), (0.0,), (0.3,)])
def test_scales_that_are_no_eighths_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="multiples of 1/8"):
        ClassifierGraph(Blocks(), cam_method, scales)


def test_methods_are_found_by_file_name() -> None:
    assert "cam" in cams.names()
    with pytest.raises(ConfigError, match="unknown CAM method 'cm': expected one of .*cam"):
        cams.get("cm")
