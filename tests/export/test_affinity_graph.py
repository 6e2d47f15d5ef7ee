"""Affinities leave torch as they are, at any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from export.onnx_from_torch import onnx_from_graphs
from export.parity import check
from training.graphs import AffinityGraph
from training.models import AffinityNet, EdgeNet, build_backbone
from weakseg.recipe import BackboneConfig


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("network", [AffinityNet, EdgeNet])
def test_affinities_are_the_same_in_onnx(
    tmp_path: Path, network: type[AffinityNet | EdgeNet], output_stride: int
) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="small_resnet", output_stride=output_stride))  # type: ignore[arg-type]
    graph = AffinityGraph(network(backbone, radius=4)).eval()
    path = tmp_path / "affinity.onnx"
    path.write_bytes(onnx_from_graphs({"affinity": graph})["affinity"])
    rng = np.random.default_rng(0)
    photographs = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((48, 64), (75, 50))]
    report = check("affinity", graph, path, photographs)
    assert {difference.output for difference in report.differences} == {"affinities", "affinities, alone or batched"}
