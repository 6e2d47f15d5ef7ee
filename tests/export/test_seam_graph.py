"""SEAM's refined maps leave torch like any others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from export.onnx_from_torch import onnx_from_graphs
from export.parity import check
from training import cams, methods
from training.graphs import ClassifierGraph
from training.models import build_backbone
from weakseg.recipe import BackboneConfig, TrainConfig


def test_refined_maps_are_the_same_in_onnx(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="small_resnet", output_stride=8))
    model = methods.get("seam").build(backbone, 3, TrainConfig(method="seam")).eval()
    graph = ClassifierGraph(model, cams.get("pcm"), (0.5, 1.0), flip=True).eval()
    path = tmp_path / "refined.onnx"
    path.write_bytes(onnx_from_graphs({"refined": graph})["refined"])
    rng = np.random.default_rng(0)
    photographs = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((48, 64), (75, 50))]
    report = check("classifier_multiscale", graph, path, photographs)
    assert all(difference.ok for difference in report.differences)
