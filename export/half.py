"""A float32 ONNX graph to one that computes in float16 or bfloat16 between its first and its last layer; for GPUs.

What stands before the layers (0..255 pixels, normalisation, the sizes of views) and after them (sums over views, maps
to image size, argmax, sigmoid, PCM's similarities) stays float32, as do means over large maps: 16 bits cannot hold
their sums. On CPUs onnxruntime widens most of float16 again (half the file, not half the time), and has no kernels for
bfloat16. So what a GPU will compute is judged in an emulation: float32 arithmetic, every tensor of 16 bits rounded to
them, which is what tensor cores do.

Written here because onnxruntime.transformers.float16 (1.31) writes the same cast twice where a tensor has two float32
readers, which is no valid graph, and rounds to float16 and back between two nodes that both stay float32.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.float_layers import Arrays, output_error, run_of, with_fewest_float_layers
from export.onnx_from_torch import serialised
from export.parity import without_unlikely
from weakseg.errors import ConfigError, ParityError
from weakseg.tolerance import CAM_FLOOR, HALF_ERROR

Half = Literal["fp16", "bf16"]
HARM_IMAGES = 4  # that layers are ordered on

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_OPSET = 22  # the first one with convolutions of bfloat16; since 20 operators got types, and nothing else that we use
_WIDE = ("ReduceMean", "ReduceSum", "ReduceL2", "GlobalAveragePool", "Softmax", "LayerNormalization", "Exp", "Pow")
_FLOAT32_INPUTS = {"Resize": (1, 2)}  # region and scales, whatever the maps are


@dataclass(frozen=True)
class HalfResult:
    """A graph of 16 bits and how it was made.

    model: serialised. layers, float_layers: names of the weights of all layers, and of those that stayed float32.
    error: largest difference of an output, relative to the image's largest value, in emulation.
    """

    model: bytes
    layers: tuple[str, ...]
    float_layers: tuple[str, ...]
    error: float

    @property
    def quality(self) -> str:
        """For people."""
        n = len(self.float_layers)
        return f"within {self.error:.2g} of the largest, {n} of {len(self.layers)} layers stay float32"


def half_within(
    model: bytes,
    images: Sequence[NDArray[np.uint8]],
    half: Half,
    *,
    error: float | None = None,
    float_layers: Collection[str] = (),
    min_score: float = 0.0,
) -> HalfResult:
    """The graph in 16 bits, with as few layers in float32 as keep its outputs within an error.

    One layer can be all of it: a depthwise kernel whose folded batch norm makes small differences of large sums.

    Args:
        model: serialised ONNX. images: (H, W, 3) uint8 of the training split. float_layers: stay float32 in any case.
        error: relative to an image's largest value; None = HALF_ERROR.
        min_score: maps of classes with a lower one are not judged; see CAM_MIN_SCORE.
    Raises:
        ParityError: the error is larger while any layer has 16 bits. ConfigError: a graph without layers.
    """
    error = HALF_ERROR[half] if error is None else error
    graph = onnx.load_model_from_string(model).graph
    weights = {weight.name for weight in graph.initializer}
    read = [name for node in graph.node if node.op_type in _LAYERS for name in node.input[1:2] if name in weights]
    layers = tuple(dict.fromkeys(read))
    run = run_of(model)
    expected = [run(image) for image in images]
    scores = [own.get("scores") for own in expected]
    expected = [without_unlikely(own, score, min_score) for own, score in zip(expected, scores, strict=True)]

    def outputs_of(data: bytes, n_images: int) -> list[Arrays]:
        narrow = run_of(emulated(data))
        pairs = zip(images[:n_images], scores, strict=False)
        return [without_unlikely(narrow(image), score, min_score) for image, score in pairs]

    def judge(data: bytes) -> float:
        return -max(_error(got, own) for got, own in zip(outputs_of(data, len(images)), expected, strict=True))

    made = with_fewest_float_layers(
        layers,
        lambda floats: half_from_fp32(model, half, floats),
        judge,
        lambda data: output_error(outputs_of(data, HARM_IMAGES), expected),
        -error,
        float_layers,
    )
    if not made.reached:
        raise ParityError(
            f"{half}: expected outputs within {error:g} of an image's largest, got {-made.score:.2g} with all layers "
            f"in {half}, and more than expected with one: leave {half} out of this export"
        )
    return HalfResult(made.data, layers, made.float_layers, -made.score)


def _error(got: Arrays, expected: Arrays) -> float:
    floats = {name: value for name, value in expected.items() if value.dtype == np.float32}
    return max(
        float(np.abs(got[name] - own).max() / np.maximum(np.abs(own).max(), CAM_FLOOR)) for name, own in floats.items()
    )


def half_from_fp32(model: bytes, half: Half, float_layers: Collection[str] = ()) -> bytes:
    """Weights and arithmetic of a graph's layers in 16 bits; inputs and outputs keep names, types and dynamic sizes.

    Args:
        model: serialised ONNX. A layer is a convolution or a product with stored weights.
        float_layers: names of the weights of layers that stay float32.
    Returns:
        Serialised and checked; the same model gives the same bytes.
    Raises:
        ConfigError: a graph without layers.
    """
    made = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model))
    graph = made.graph
    narrow = narrow_nodes(graph, float_layers)
    floats = _float_tensors(graph)
    weights = {weight.name: weight for weight in graph.initializer}
    narrow_outputs = {name for i in narrow for name in graph.node[i].output} & floats
    nodes: list[onnx.NodeProto] = []
    cast: set[str] = set()

    def read_as(name: str, dtype: int) -> str:
        """The tensor of another type: a converted weight, or the output of a cast that is added once."""
        other = f"{name}.float32" if dtype == TensorProto.FLOAT else f"{name}.{half}"
        if other not in cast:
            cast.add(other)
            if name in weights:
                graph.initializer.append(_narrowed(weights[name], other, half))
            else:
                nodes.append(helper.make_node("Cast", [name], [other], name=f"cast.{other}", to=dtype))
        return other

    for i, node in enumerate(list(graph.node)):
        fixed = _FLOAT32_INPUTS.get(node.op_type, ())
        for position, name in enumerate(node.input):
            wants_narrow = i in narrow and position not in fixed
            if name in floats and wants_narrow != (name in narrow_outputs):
                node.input[position] = read_as(name, _TYPES[half] if wants_narrow else TensorProto.FLOAT)
        nodes.append(node)
    for output in graph.output:
        if output.name in narrow_outputs:
            _rename(nodes, output.name, f"{output.name}.{half}")
            nodes.append(helper.make_node("Cast", [f"{output.name}.{half}"], [output.name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused_weights(graph)
    del graph.value_info[:]  # types have changed
    if half == "bf16":
        made.opset_import[0].version = max(made.opset_import[0].version, _OPSET)
    return serialised(made)


def emulated(model: bytes) -> bytes:
    """A graph that computes in float32 what another one does in 16 bits: every tensor of theirs is rounded to them.

    Args:
        model: serialised, as `half_from_fp32` makes it. A model without such tensors gives the same values.
    Returns:
        Serialised; not checked, and for onnxruntime on CPUs only, which keeps casts that a graph has of itself.
    """
    made = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model))
    graph = made.graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    types |= {weight.name: weight.data_type for weight in graph.initializer}
    narrow = {name for name, kind in types.items() if kind in _TYPES.values()}
    nodes: list[onnx.NodeProto] = []
    widened: set[str] = set()
    for node in list(graph.node):
        if node.op_type == "Cast" or narrow.isdisjoint(node.output):
            nodes.append(node)
            continue
        for name in narrow.intersection(node.input) - widened:
            widened.add(name)
            nodes.append(helper.make_node("Cast", [name], [f"{name}.wide"], to=TensorProto.FLOAT))
        node.input[:] = [f"{name}.wide" if name in narrow else name for name in node.input]
        outputs = list(node.output)
        node.output[:] = [f"{name}.exact" for name in outputs]
        nodes.append(node)
        nodes += [helper.make_node("Cast", [f"{name}.exact"], [name], to=types[name]) for name in outputs]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return made.SerializeToString()


def narrow_nodes(graph: onnx.GraphProto, float_layers: Collection[str] = ()) -> set[int]:
    """Positions of the nodes that compute in 16 bits: layers, and what lies on a path from one layer to another."""
    weights = {weight.name for weight in graph.initializer}
    nodes = list(graph.node)
    layers = {i for i, n in enumerate(nodes) if n.op_type in _LAYERS and any(name in weights for name in n.input)}
    wide = {i for i in layers if any(name in float_layers for name in nodes[i].input)}
    layers -= wide
    if not layers:
        raise ConfigError("16 bits are for layers with weights, and this graph has none: keep it float32")
    after, before = set(), set()
    behind: set[str] = set()  # tensors that a layer comes before
    for i, node in enumerate(nodes):
        if i in layers or any(name in behind for name in node.input):
            behind.update(node.output)
            after.add(i)
    ahead: set[str] = set()  # tensors that a layer comes after
    for i, node in reversed(list(enumerate(nodes))):
        if i in layers or any(name in ahead for name in node.output):
            ahead.update(node.input)
            before.add(i)
    floats = _float_tensors(graph)
    return {i for i in after & before - wide if nodes[i].op_type not in _WIDE and floats.issuperset(nodes[i].output)}


def _float_tensors(graph: onnx.GraphProto) -> set[str]:
    known = (*graph.input, *graph.value_info, *graph.output)
    floats = {value.name for value in known if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return floats | {weight.name for weight in graph.initializer if weight.data_type == TensorProto.FLOAT}


def _narrowed(weight: onnx.TensorProto, name: str, half: Half) -> onnx.TensorProto:
    """Rounded; what lies beyond float16 becomes its largest value, which no trained weight reaches."""
    values = numpy_helper.to_array(weight)
    if half == "bf16":
        return numpy_helper.from_array(values.astype(ml_dtypes.bfloat16), name)
    largest = np.finfo(np.float16).max
    return numpy_helper.from_array(values.clip(-largest, largest).astype(np.float16), name)


def _rename(nodes: Collection[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


def _drop_unused_weights(graph: onnx.GraphProto) -> None:
    read = {name for node in graph.node for name in node.input}
    kept = [weight for weight in graph.initializer if weight.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
