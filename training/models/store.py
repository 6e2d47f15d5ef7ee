"""Trained models on disk: one file that says what it is, with plain tensors inside (loads with weights_only)."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from training.models.affinity import AffinityNet
from training.models.backbone import Backbone
from training.models.build import build_backbone
from training.models.classifier import CamClassifier
from training.models.deeplab import NETWORKS, DeepLabV3Plus
from training.models.irn import EdgeNet
from training.models.weights import load_strictly
from weakseg.errors import WeightsError
from weakseg.files import write_bytes_atomic
from weakseg.recipe import BackboneConfig

AFFINITY_NETWORKS = {"affinitynet": AffinityNet, "irn": EdgeNet}  # by method


def save_model(path: Path, model: nn.Module, *, kind: str, classes: tuple[str, ...], method: str) -> None:
    """Write {kind, method, classes, backbone, architecture, head, state_dict} atomically."""
    backbone: Backbone = model.backbone  # type: ignore[assignment]
    content = {
        "format": "weakseg-model-1",
        "kind": kind,
        "method": method,
        "classes": list(classes),
        "backbone": asdict(backbone.config),
        "architecture": backbone.architecture,
        "head": model.options,
        "state_dict": model.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes_atomic(path, buffer.getvalue())


def load_model(path: Path, *, kind: str) -> tuple[nn.Module, tuple[str, ...]]:
    """The model in evaluation mode and its class names.

    Raises:
        WeightsError: no such file, not a weakseg model, of another kind, or its tensors do not fit its own config.
    """
    if not path.is_file():
        raise WeightsError(f"no model at {path}: has its training stage finished?")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises many unrelated types
        raise WeightsError(f"cannot read {path} ({type(error).__name__}): is it a weakseg model file?") from error
    if not isinstance(content, dict) or content.get("format") != "weakseg-model-1":
        raise WeightsError(f"{path} is not a weakseg model: expected format weakseg-model-1")
    if content["kind"] != kind:
        raise WeightsError(f"expected a model of kind {kind}, got {content['kind']} in {path}: name another file")
    classes = tuple(content["classes"])
    config = BackboneConfig(**content["backbone"])
    backbone = build_backbone(config, pretrained=False, architecture=content.get("architecture"))
    name = content["method"].partition(",")[0]
    if kind == "affinity":
        model: nn.Module = AFFINITY_NETWORKS.get(name, AffinityNet)(backbone, **content["head"])
    else:
        network = NETWORKS.get(name, DeepLabV3Plus) if kind == "segmentation" else _classifier(name)
        model = network(backbone, len(classes), **content["head"])
    load_strictly(model, content["state_dict"], what=str(path))
    return model.eval(), classes


def _classifier(method: str) -> type[nn.Module]:
    """The network that a training method builds."""
    from training import methods  # these build the networks of this package

    network: type[nn.Module] = getattr(methods.get(method), "NETWORK", CamClassifier)
    return network
