"""Start weights: published ImageNet files, a .pth, .safetensors or MXNet .params file."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor

from training.models.backbone import Backbone
from training.models.mxnet_params import read_params, resnet38d_from_mxnet
from training.models.vgg16 import vgg16_state
from weakseg.errors import WeightsError
from weakseg.recipe import BackboneConfig

# Published by torchvision (BSD-3-Clause); the eight digits in the name are the start of the file's sha256.
IMAGENET = {
    "mobilenet_v2": "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    "vgg16": "https://download.pytorch.org/models/vgg16-397923af.pth",
}
AUTHORS_HEADS = {"fc8": "head", "f8_3": "pcm.low", "f8_4": "pcm.high", "f9": "pcm.embed"}  # SEAM's names -> ours
CLASSIFIER_PREFIXES = ("classifier.", "fc.")  # the 1000-way head of the published files is not used


def load_backbone_weights(backbone: Backbone, config: BackboneConfig) -> None:
    """Fill a backbone from `config.weights`.

    Raises:
        WeightsError: the file cannot be had or read, or its keys or shapes are not the backbone's (all are listed).
    """
    assert config.weights is not None
    state = _download(config.name) if config.weights == "imagenet" else read_state_dict(Path(config.weights))
    state, _ = authors_state(state)
    state = vgg16_state(state) if config.name == "vgg16" else state
    state = {_own_name(key): value for key, value in state.items() if not key.startswith(CLASSIFIER_PREFIXES)}
    load_strictly(backbone, state, what=f"{config.weights} into {config.name}")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .pth/.pt (`weights_only`, so no code runs), .safetensors or ResNet-38 .params file."""
    if not path.is_file():
        raise WeightsError(
            f"no weights file {path}: give a .pth, .safetensors or .params file, or 'imagenet' to download"
        )
    if path.suffix == ".params":
        return resnet38d_from_mxnet(read_params(path))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many unrelated types for a damaged file
        raise WeightsError(
            f"cannot read {path} as weights ({type(error).__name__}): expected a state dict of tensors; "
            "a checkpoint with pickled objects must first be saved as a plain state dict"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds {type(state).__name__}, expected a state dict: names to tensors")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def authors_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict of SEAM's or psa's code (`resnet38_SEAM.pth`) as backbone and head.

    Returns: the backbone's tensors, whose names are ours; the head's, renamed fc8 -> head, f8_3 -> pcm.low,
        f8_4 -> pcm.high, f9 -> pcm.embed, each a 1x1 convolution. Any other state dict: itself, and {}.
    """
    if "b2.conv_branch2a.weight" not in state:
        return state, {}
    backbone, head = {}, {}
    for key, value in state.items():
        layer, _, rest = key.partition(".")
        if layer in AUTHORS_HEADS:
            head[f"{AUTHORS_HEADS[layer]}.{rest}"] = value
        else:
            backbone[key] = value
    return backbone, head


def load_strictly(module: torch.nn.Module, state: dict[str, Tensor], what: str) -> None:
    """`load_state_dict` whose error lists missing, unexpected and misshapen keys; nothing is loaded on error."""
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:8])}{', …' if len(keys) > 8 else ''}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if keys
    ]
    if problems:
        raise WeightsError(f"cannot load {what}: {'; '.join(problems)}. Is it a file of this architecture?")
    module.load_state_dict(state, strict=False)


def _own_name(key: str) -> str:
    """torchvision's MobileNetV2 and VGG16 call their layers `features`; that is the name of a method here."""
    return "body." + key.removeprefix("features.") if key.startswith("features.") else key


def _download(name: str) -> dict[str, Tensor]:
    if name not in IMAGENET:
        where = ": give ilsvrc-cls_rna-a1_cls1000_ep-0001.params of github.com/itijyou/ademxapp"
        raise WeightsError(
            f"no ImageNet weights to download are known for {name}"
            + (where if name == "resnet38d" else ": train it from scratch (weights None) or give a file")
        )
    url = IMAGENET[name]
    try:
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except (URLError, OSError, RuntimeError) as error:
        raise WeightsError(
            f"cannot download {url} ({error}): on a machine without network put the file under "
            f"{torch.hub.get_dir()}/checkpoints/ or pass its path as --backbone.weights"
        ) from error
    return state
