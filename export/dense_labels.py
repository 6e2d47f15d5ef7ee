"""The output `labels` in the form that TensorRT takes: every channel is upsampled.

export.labels_output upsamples only the channels that can win, which saves a CPU most of the work. How many those are is
known while the graph runs; TensorRT plans memory and kernels before, and a GPU has the channels upsampled in no time.
"""

from __future__ import annotations

import onnx

from export.labels_nodes import append_labels
from weakseg.classes import IGNORE, IGNORE_U16, MAX_CLASSES_U8

_LARGEST = 3.4028234e38  # of float32; NaN is not below it either

# 8-bit labels leave as uint8, by way of float as TensorRT casts nothing else to it; it has no uint16: int32 for others.
_NODES = """
<ir_version: 10, opset_import: ["" : 20]>
labels (uint8[B, H, W, 3] images, float[B, C, h, w] logits) => (TYPE[B, H, W] labels) {
  batch = Shape <start = 0, end = 2> (logits)
  cells = Shape <start = 2, end = 4> (logits)
  four = Constant <value_ints = [4, 4]> ()
  pixels = Mul (cells, four)
  sizes = Concat <axis = 0> (batch, pixels)
  padded = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel"> (logits, , , sizes)
  height_width = Shape <start = 1, end = 3> (images)
  none = Constant <value_ints = [0, 0]> ()
  image_axes = Constant <value_ints = [2, 3]> ()
  up = Slice (padded, none, height_width, image_axes)
  best = ArgMax <axis = 1, keepdims = 0> (up)
  winners = Cast <to = 1> (best)
  size = Abs (logits)
  largest = Constant <value_float = LARGEST> ()
  finite = LessOrEqual (size, largest)
  finite_1 = Cast <to = 1> (finite)
  all_but_batch = Constant <value_ints = [1, 2]> ()
  sound_columns = ReduceMin <keepdims = 0> (finite_1, all_but_batch)
  one_axis = Constant <value_ints = [1]> ()
  sound_1 = ReduceMin (sound_columns, one_axis)
  last_axis = Constant <value_ints = [2]> ()
  sound_2 = Unsqueeze (sound_1, last_axis)
  half = Constant <value_float = 0.5> ()
  sound = Greater (sound_2, half)
  ignore = Constant <value_float = IGNORE> ()
  marked = Where (sound, winners, ignore)
  labels = Cast <to = TYPE_NUMBER> (marked)
}
"""


def dense_labels(data: bytes) -> bytes:
    """A serialised graph whose output `labels`, if it has one, is computed from all of its logits.

    Args:
        data: an ONNX model; input `images` uint8 (B, H, W, 3), output `logits` (B, C + 1, ceil(H/4), ceil(W/4)).
    Returns:
        with labels (B, H, W): as those of export.labels_output, uint8 with at most 254 classes and int32 with more.
        A model without labels as it is.
    """
    model = onnx.load_from_string(data)
    outputs = {output.name: output for output in model.graph.output}
    if "labels" not in outputs:
        return data
    few = outputs["logits"].type.tensor_type.shape.dim[1].dim_value - 1 <= MAX_CLASSES_U8
    model.graph.output.remove(outputs["labels"])
    _drop_unused(model.graph)
    text = _NODES.replace("LARGEST", f"{_LARGEST:.7e}").replace("IGNORE", f"{IGNORE if few else IGNORE_U16}.0")
    append_labels(model.graph, text, onnx.TensorProto.UINT8 if few else onnx.TensorProto.INT32)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove the nodes that no output needs; their order, which ONNX wants topological, stays."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    known = [value for value in graph.value_info if value.name in needed]  # new nodes may take the names of the others
    del graph.value_info[:]
    graph.value_info.extend(known)
