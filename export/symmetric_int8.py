"""INT8 graphs in the form that TensorRT takes: zero is zero, and biases are float.

onnxruntime's kernels for CPUs want uint8 with a zero point, which spends no code on values that do not occur. TensorRT
knows int8 with zero point 0 only; it refuses other zero points, and uint8 with zero point 0 it takes for int8, which
cuts off the upper half of the range. It refuses int32 biases, too.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper


def symmetric_int8(data: bytes) -> bytes:
    """Quantise to [-127, 127] what is quantised to [-z, 255 - z]; the scale grows so that the same values fit.

    scale' = scale max(z, 255 - z) / 127: up to twice as coarse.

    Args:
        data: an ONNX model whose scales and zero points are stored in it.
    Returns:
        the model as it is where it quantises nothing, or symmetrically already.
    """
    model = onnx.load_from_string(data)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    made: dict[str, np.ndarray] = {}
    kept = []
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 2:
            kept.append(node)
            continue
        source, scale_name, *zero_name = node.input
        scale = numpy_helper.to_array(stored[scale_name])
        zero = numpy_helper.to_array(stored[zero_name[0]]) if zero_name else np.uint8(0)
        if source in stored and stored[source].data_type == onnx.TensorProto.INT32:
            made[node.output[0]] = numpy_helper.to_array(stored[source]).astype(np.float32) * scale
            continue
        if zero.dtype == np.uint8 or (zero.dtype == np.int8 and zero.any()):
            limits = np.iinfo(zero.dtype)
            farthest = np.maximum(limits.max - zero.astype(np.float32), zero.astype(np.float32) - limits.min)
            node.input[:] = [source, f"{scale_name}.symmetric", f"{scale_name}.zero"]
            made[node.input[1]] = (scale * farthest / 127).astype(np.float32)
            made[node.input[2]] = np.zeros(zero.shape, np.int8)
        kept.append(node)
    if not made:
        return data
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in made.items())
    del model.graph.value_info[:]  # types of what was uint8
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)
