"""The output `labels` of a segmentation graph: upsampling and argmax inside, so a mask leaves the runtime as bytes.

The same labels as `weakseg.segmentation.labels_from_logits`, by the same idea: a channel whose largest value within
3 x 3 cells never reaches the channels' largest minimum there wins no pixel, so it is not upsampled. Of 21 classes a
photograph has three or four.
"""

from __future__ import annotations

import numpy as np
import onnx

from export.labels_nodes import append_labels
from export.onnx_from_torch import serialised
from weakseg.classes import IGNORE, IGNORE_U16, MAX_CLASSES_U8, mask_dtype

# Cells are 4 x 4 pixels. What is not finite reaches no pixel: such an image is IGNORE throughout.
_NODES = """
<ir_version: 10, opset_import: ["" : 20]>
labels (uint8[B, H, W, 3] images, float[B, C, h, w] logits) => (TYPE[B, H, W] labels) {
  all_but_batch = Constant <value_ints = [1, 2, 3]> ()
  sum = ReduceSum (logits, all_but_batch)
  difference = Sub (sum, sum)
  zero = Constant <value_float = 0.0> ()
  finite = Equal (difference, zero)
  numbers = Where (finite, logits, zero)
  high = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (numbers)
  minus = Neg (numbers)
  minus_low = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (minus)
  low = Neg (minus_low)
  channel = Constant <value_ints = [1]> ()
  floor = ReduceMax (low, channel)
  cannot_win = Less (high, floor)
  may_win = Not (cannot_win)
  may_win_1 = Cast <to = 1> (may_win)
  but_channel = Constant <value_ints = [0, 2, 3]> ()
  wins = ReduceMax <keepdims = 0> (may_win_1, but_channel)
  found = NonZero (wins)
  first = Constant <value_ints = [0]> ()
  channels = Squeeze (found, first)
  few = Gather <axis = 1> (numbers, channels)
  batch = Shape <start = 0, end = 2> (few)
  cells = Shape <start = 2, end = 4> (few)
  four = Constant <value_ints = [4, 4]> ()
  pixels = Mul (cells, four)
  sizes = Concat <axis = 0> (batch, pixels)
  padded = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel"> (few, , , sizes)
  height_width = Shape <start = 1, end = 3> (images)
  none = Constant <value_ints = [0, 0]> ()
  image_axes = Constant <value_ints = [2, 3]> ()
  up = Slice (padded, none, height_width, image_axes)
  best = ArgMax <axis = 1, keepdims = 0> (up)
  values = Cast <to = 6> (channels)
  winners = Gather (values, best)
  one_axis = Constant <value_ints = [3]> ()
  sound = Squeeze (finite, one_axis)
  ignore = Constant <value = int32 {IGNORE}> ()
  marked = Where (sound, winners, ignore)
  labels = Cast <to = TYPE_NUMBER> (marked)
}
"""


def with_labels(data: bytes) -> bytes:
    """A serialised segmentation graph with the further output `labels`.

    Args:
        data: an ONNX model; input `images` uint8 (B, H, W, 3), output `logits` (B, C + 1, ceil(H/4), ceil(W/4)).
    Returns:
        with labels (B, H, W) in `mask_dtype(C)`: mask values; IGNORE throughout for an image whose logits are not
        finite. Of equal channels the lowest wins.
    """
    model = onnx.load_from_string(data)
    [logits] = [output for output in model.graph.output if output.name == "logits"]
    n_classes = logits.type.tensor_type.shape.dim[1].dim_value - 1
    ignore = IGNORE if n_classes <= MAX_CLASSES_U8 else IGNORE_U16
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(mask_dtype(n_classes)))
    append_labels(model.graph, _NODES.replace("IGNORE", str(ignore)), kind)
    return serialised(model)
