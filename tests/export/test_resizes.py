"""Sizes that are always the same multiple become a constant factor; others stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from export.resizes import with_constant_resizes

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's exporter, about itself


class ThreeResizes(nn.Module):
    """By 2, by 1, and to a size that depends on the image; all written as sizes of other maps."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = images.permute(0, 3, 1, 2).float()
        x = F.pad(x, (0, -images.shape[2] % 8, 0, -images.shape[1] % 8))
        small = F.avg_pool2d(x, 8)
        twice = F.interpolate(small, size=(x.shape[2] // 4, x.shape[3] // 4), mode="bilinear", align_corners=False)
        same = F.interpolate(twice, size=(x.shape[2] // 4, x.shape[3] // 4), mode="bilinear", align_corners=False)
        other = F.interpolate(small, size=(images.shape[1], images.shape[2]), mode="bilinear", align_corners=False)
        return {"twice": same, "other": other}


def exported() -> onnx.ModelProto:
    axes = ({0: "B", 1: "H", 2: "W"},)
    example = torch.zeros(2, 24, 40, 3, dtype=torch.uint8)
    names = {"input_names": ["images"], "output_names": ["twice", "other"]}
    program = torch.onnx.export(
        ThreeResizes().eval(), (example,), dynamo=True, opset_version=20, dynamic_shapes=axes, verbose=False, **names
    )
    return program.model_proto


def test_constant_factors_are_found_and_nothing_else_changes():
    model = exported()
    before = model.SerializeToString()
    made = with_constant_resizes(model)
    assert model.SerializeToString() == before
    resizes = [node for node in made.graph.node if node.op_type == "Resize"]
    assert sorted(len(node.input) for node in resizes) == [3, 4]  # by scales; by sizes. The one by 1 is gone
    assert len(made.graph.node) < len(model.graph.node)
    rng = np.random.default_rng(0)
    sessions = [ort.InferenceSession(m.SerializeToString()) for m in (model, made)]
    for height, width in ((1, 1), (7, 9), (33, 31), (8, 160)):
        images = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        for ours, theirs in zip(*(session.run(None, {"images": images}) for session in sessions), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_nothing_to_do_is_nothing_done():
    model = exported()
    kept = [node for node in model.graph.node if node.op_type != "Resize"]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    assert with_constant_resizes(model) is model
