"""Backbones of Hugging Face leave torch like any others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.onnx_from_torch import onnx_from_graphs
from export.parity import check
from training import cams
from training.graphs import ClassifierGraph
from training.models import CamClassifier, build_backbone
from weakseg.recipe import BackboneConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'weakseg[hf]'")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        ("ConvNextConfig", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}),
        ("Dinov2Config", {"num_hidden_layers": 4, "image_size": 56, "hidden_size": 16, "num_attention_heads": 2}),
    ],
)
def test_maps_are_the_same_in_onnx(tmp_path: Path, cls: str, settings: dict[str, Any]) -> None:
    getattr(transformers, cls)(**settings).save_pretrained(tmp_path / "network")
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=f"hf:{tmp_path / 'network'}", weights="random", freeze_stages=0))
    graph = ClassifierGraph(CamClassifier(backbone, 3), cams.get("cam"), (0.5, 1.0), flip=True).eval()
    path = tmp_path / "cam.onnx"
    path.write_bytes(onnx_from_graphs({"cam": graph})["cam"])
    rng = np.random.default_rng(0)
    photographs = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((80, 112), (67, 45))]
    report = check("classifier_multiscale", graph, path, photographs)
    assert all(difference.ok for difference in report.differences)
