"""Classifiers that CAM methods are asked about."""

from __future__ import annotations

import atexit
import math
import shutil
from functools import cache
from tempfile import mkdtemp

import pytest
import torch
from torch import Tensor, nn

from training import methods
from training.models import build_backbone
from weakseg.recipe import BackboneConfig, TrainConfig

# CAM methods that want the classifier of a certain training method
TRAINED_BY = {"attention": "class_tokens", "pcm": "seam"}


def classifier_for(cam_method: str, n_classes: int, seed: int = 0) -> nn.Module:
    """A small one with random weights, in training mode but for its batch norm."""
    name = TRAINED_BY.get(cam_method, "cam")
    backbone = transformer() if name == "class_tokens" else BackboneConfig(name="small_resnet", freeze_stages=0)
    torch.manual_seed(seed)
    return methods.get(name).build(build_backbone(backbone), n_classes, TrainConfig(method=name))


@cache
def transformer(kind: str = "ViT", patch: int = 16) -> BackboneConfig:
    """Of random weights; its folder holds its settings alone."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'weakseg[hf]'"
    )
    folder = mkdtemp(prefix=f"weakseg-test-{kind}-")
    config = getattr(transformers, f"{kind}Config")
    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    config(**small, image_size=4 * patch, patch_size=patch).save_pretrained(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return BackboneConfig(name=f"hf:{folder}", weights="random", freeze_stages=0)


def photographs(n: int = 2, height: int = 48, width: int = 64, seed: int = 1) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 255


def state_of(model: nn.Module) -> list[object]:
    """Modes of all modules, their hooks, autograd's modes."""
    modules = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    return [modules, torch.is_grad_enabled(), torch.is_inference_mode_enabled()]


class Linear(nn.Module):
    """A layer of a 1x1 convolution without a bias, and a head over its maps."""

    def __init__(self, weight: list[list[float]], head: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Conv2d(len(weight[0]), len(weight), 1, bias=False)
        self.layer.weight.data = torch.tensor(weight)[:, :, None, None]
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(images))
        return logits


class Pooled(nn.Module):
    """Global average pooling, and a linear layer without a bias."""

    def __init__(self, weight: list[list[float]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) @ self.weight.t()


def waves(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers in [-1, 1] that are the same wherever they are made."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7 * k + 0.013 * k * k + phase).reshape(shape).float()


def of_waves() -> nn.Sequential:
    """Two convolutions and a fully connected layer for images (B, 2, 5, 6), three classes; layers 1 and 3 are ReLUs."""
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 5 * 6, 3),
    )
    for i, parameter in enumerate(network.parameters()):
        parameter.data = waves(*parameter.shape, phase=0.3 * i)
    return network.eval()


def flattened(weight: list[list[float]]) -> nn.Module:
    """Flattened maps (K h w) and a fully connected layer."""
    linear = nn.Linear(len(weight[0]), len(weight))
    linear.weight.data = torch.tensor(weight)
    return nn.Sequential(nn.Flatten(), linear)
