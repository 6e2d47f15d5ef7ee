"""Resizes by a constant factor say so, as runtimes make better code of them.

Networks bring maps to the size of other maps, so the exporter writes sizes that are computed; but canvases are whole
numbers of cells, and the factor is 4 whatever the image. onnxruntime keeps its blocked layout through a resize by
constant scales and leaves it for one by sizes: 8 % of a DeepLabV3+ over MobileNetV2 at 513 x 513.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import onnxruntime
from onnx import helper, numpy_helper
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass

from weakseg.manifest import INPUT

# Images whose sides are whole numbers of nothing: a factor that is the same for all is the graph's, not theirs.
PROBE_SIZES = ((1, 1), (37, 101), (129, 70), (96, 224))


def with_constant_resizes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace computed sizes by whole factors where every probe image has the same; resizes by 1 are left out.

    Args:
        model: input `images` uint8 (B, H, W, 3).
    Returns:
        A copy; the model itself where nothing changes. The same values come out.
    """
    resizes = [node for node in model.graph.node if node.op_type == "Resize" and len(node.input) == 4 and node.input[3]]
    factors = _factors(model, resizes) if resizes else {}
    if not factors:
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for node in made.graph.node:
        factor = factors.get(node.output[0])
        if factor == (1, 1):
            source, target = node.input[0], node.output[0]
            node.CopyFrom(helper.make_node("Identity", [source], [target], name=node.name))
        elif factor is not None:
            scales = f"{node.output[0]}.scales"
            made.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, *factor], np.float32), scales))
            node.input[2:] = [scales]
    pruned = onnx_ir.from_proto(made)
    for tidy in (IdentityEliminationPass(), RemoveUnusedNodesPass()):
        tidy(pruned)
    return onnx_ir.to_proto(pruned)


def _factors(model: onnx.ModelProto, resizes: list[onnx.NodeProto]) -> dict[str, tuple[int, int]]:
    """{output of a resize: (down, across)} where both are whole numbers and the same at every probe size."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    names = sorted({name for node in resizes for name in (node.input[0], node.output[0])})
    del probed.graph.output[:]
    probed.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(probed.SerializeToString(), options)
    found: dict[str, set[tuple[float, float]]] = {node.output[0]: set() for node in resizes}
    for height, width in PROBE_SIZES:
        values = session.run(names, {INPUT: np.zeros((1, height, width, 3), np.uint8)})
        sizes = {name: np.array(value.shape[2:]) for name, value in zip(names, values, strict=True)}
        for node in resizes:
            down, across = sizes[node.output[0]] / sizes[node.input[0]]
            found[node.output[0]].add((float(down), float(across)))
    return {
        name: (int(down), int(across))
        for name, seen in found.items()
        for down, across in seen
        if len(seen) == 1 and down.is_integer() and across.is_integer()
    }
