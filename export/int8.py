"""A float32 ONNX graph to an INT8 one: static quantisation, calibrated and judged on training images, never on masks.

Written as QuantizeLinear / DequantizeLinear pairs of the standard domain, which every runtime knows how to fuse.
Activations are unsigned bytes with one scale a tensor, weights signed with one scale an output channel.

- Ranges of activations are means over images of each image's minimum and maximum: one odd image does not coarsen all.
- Weights have 7 bits. The byte products of CPUs without VNNI add pairs in 16 bits, and 2 * 255 * 128 does not fit,
  2 * 255 * 64 does: a graph that passed on one CPU computes the same on every other.
- Rounding a layer's weights shifts its mean output, which the bias takes back; without that, the few weights of a
  depthwise channel, all rounded one way, ruin MobileNetV2. Source: bias correction, Nagel et al., ICCV 2019.
- Layers that hurt stay float: the fewest, in the order of the error that each adds at the outputs by itself, with
  which the label maps agree with the float graph's on images that were not calibrated on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import TensorsData

from export.float_layers import Arrays, output_error, run_of, with_fewest_float_layers
from export.onnx_from_torch import serialised
from weakseg.cam import labels_from_cam, normalise
from weakseg.errors import ConfigError, DataError, ParityError
from weakseg.tolerance import INT8_AGREEMENT
from weakseg.version import __version__

HELD_OUT = 4  # every fourth image is not calibrated on but judged on
HARM_IMAGES = 4  # held-out images that layers are ordered on: one session per layer, so few
_ACTIVATIONS = ("Clip", "Relu")  # fused into the layer before: bytes saturate where they cut off
_PASSING = ("Add", "Concat", "MaxPool", "Resize")  # stay in bytes between two quantised layers
_CARRIERS = (*_ACTIVATIONS, *_PASSING)

Images = Sequence[NDArray[np.uint8]]
LabelMaps = Callable[[Arrays], list[NDArray[Any]]]


@dataclass(frozen=True)
class Int8Result:
    """An INT8 graph and how it was made.

    model: serialised.
    layers, float_layers: names of the convolutions' weights, of all and of those that stayed float.
    agreement: share of equal pixels between its label maps and the float graph's, on `n_held_out` images.
    """

    model: bytes
    layers: tuple[str, ...]
    float_layers: tuple[str, ...]
    agreement: float
    n_held_out: int

    @property
    def quality(self) -> str:
        """For people."""
        n = len(self.float_layers)
        return f"{self.agreement:.2%} of the labels as before, {n} of {len(self.layers)} layers stay float32"


@dataclass(frozen=True)
class Ranges:
    """Of activations: {tensor: (least, largest value)}, and {input of a convolution: (K,) mean of each channel}."""

    extremes: dict[str, tuple[np.float32, np.float32]]
    means: dict[str, NDArray[np.float32]]


def label_maps(
    outputs: Arrays,
    *,
    presence: float = 0.5,
    threshold: float = 0.3,
    normalisation: Literal["max", "minmax"] = "max",
) -> list[NDArray[Any]]:
    """A label map per image, as serving makes them of an image whose tags nobody knows.

    Args:
        outputs: `labels` (B, H, W), or `logits` (B, C + 1, h, w), or `scores` (B, C) and `cam` (B, C, h, w).
        presence, threshold, normalisation: the manifest's; a class is shown when its score reaches `presence`, so that
            an image whose classes are found differently counts as different.
    Raises:
        ConfigError: a graph with other outputs.
    """
    if "labels" in outputs:
        return list(outputs["labels"])
    if "logits" in outputs:
        return list(outputs["logits"].argmax(axis=1))
    if "cam" not in outputs or "scores" not in outputs:
        raise ConfigError(f"label maps need logits, or scores and cam, got {', '.join(outputs)}: keep this graph float")
    maps = []
    for scores, cam in zip(outputs["scores"], outputs["cam"], strict=True):
        present = np.flatnonzero(scores >= np.float32(presence))
        maps.append(labels_from_cam(normalise(cam[present], normalisation), present, threshold, len(cam)))
    return maps


def int8_from_fp32(
    model: bytes,
    images: Images,
    *,
    labels: LabelMaps = label_maps,
    target: float = INT8_AGREEMENT,
    float_layers: Collection[str] = (),
) -> Int8Result:
    """Quantise the convolutions of a graph, as many as leave the label maps as they were.

    Args:
        model: serialised ONNX with the input `images`; dynamic sizes stay dynamic, names and types as they are.
        images: (H, W, 3) uint8 of the training split; some dozens, every HELD_OUT-th for judging, others to calibrate.
        labels: of the outputs of one batch.
        target: least agreement of label maps, in [0, 1].
        float_layers: stay float in any case: what another graph over the same network has found out.
    Returns:
        The same model and images give the same bytes.
    Raises:
        DataError: fewer than two images. ConfigError: no convolution in the graph, or outputs without label maps.
        ParityError: the target is not met while any layer is INT8.
    """
    if len(images) < 2:
        raise DataError(f"INT8 needs training images to calibrate and to judge on, at least 2, got {len(images)}")
    held_out = images[::HELD_OUT]
    calibration = [image for i, image in enumerate(images) if i % HELD_OUT]
    graph = _prepared(model)
    layers = _layers(graph)
    if not layers:
        raise ConfigError("INT8 quantises convolutions, and this graph has none: keep it float")
    ranges = calibrate(graph, calibration)
    run = run_of(model)
    expected = [run(image) for image in held_out]
    wanted = [labels(outputs) for outputs in expected]

    def judge(data: bytes) -> float:
        run = run_of(data)
        return _agreement(wanted, [labels(run(image)) for image in held_out])

    made = with_fewest_float_layers(
        layers,
        partial(quantised, graph, ranges),
        judge,
        lambda data: output_error(list(map(run_of(data), held_out[:HARM_IMAGES])), expected),
        target,
        float_layers,
    )
    if not made.reached:
        raise ParityError(
            f"INT8: expected {target:.2%} of the labels as in float32, got {made.score:.2%} with all of "
            f"{len(layers)} layers in INT8, and less than expected with one: leave int8 out of this export"
        )
    return Int8Result(made.data, layers, made.float_layers, made.score, len(held_out))


def calibrate(graph: onnx.ModelProto, images: Images) -> Ranges:
    """Ranges of everything that may be quantised, one image at a time: memory is that of one image.

    Args:
        graph: with types of its tensors; see `_prepared`.
    """
    probed = onnx.ModelProto()
    probed.CopyFrom(graph)
    weights = _weights(graph)
    inputs = [node.input[0] for node in graph.graph.node if _is_layer(node, weights)]
    inputs = list(dict.fromkeys(inputs))
    extremes = dict.fromkeys(inputs)
    for node in graph.graph.node:
        if node.op_type in _CARRIERS or _is_layer(node, weights):
            extremes |= dict.fromkeys(name for name in (*node.input, *node.output) if name in _float_tensors(graph))
    probed.graph.initializer.append(numpy_helper.from_array(np.array([0, 2, 3]), "probe.axes"))
    wanted = [_probe(probed, "ReduceMean", name, "probe.axes") for name in inputs]
    for name in extremes:
        wanted += [_probe(probed, "ReduceMin", name), _probe(probed, "ReduceMax", name)]
    run = run_of(probed.SerializeToString(), wanted)
    totals: dict[str, Any] = dict.fromkeys(wanted, 0.0)
    for image in images:
        for name, value in run(image).items():
            totals[name] = totals[name] + value.astype(np.float64)
    mean = {name: (total / len(images)).astype(np.float32) for name, total in totals.items()}
    return Ranges(
        {name: (mean[f"ReduceMin.{name}"][()], mean[f"ReduceMax.{name}"][()]) for name in extremes},
        {name: mean[f"ReduceMean.{name}"] for name in inputs},
    )


def quantised(graph: onnx.ModelProto, ranges: Ranges, float_layers: Collection[str] = ()) -> bytes:
    """The graph with every layer but `float_layers` in INT8, checked and serialised."""
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    nodes = _quantisable(model, float_layers)
    _correct_biases(model, ranges, nodes)
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=True,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, dict(ranges.extremes)),
        nodes_to_quantize=nodes,
        nodes_to_exclude=[],
        op_types_to_quantize=["Conv", *_CARRIERS],
        extra_options={},
    )
    quantizer.quantize_model()
    made = quantizer.model.model
    _shield(made, set(float_layers))
    quantizer.model.topological_sort()
    del made.graph.value_info[:]  # of tensors that are gone
    made.producer_name, made.producer_version = "weakseg", __version__
    return serialised(made)


def _prepared(model: bytes) -> onnx.ModelProto:
    """The model with a type for every tensor, and a name for every node, which the quantiser goes by."""
    graph = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model))
    for i, node in enumerate(graph.graph.node):
        node.name = node.name or f"node_{i}"
    return graph


def _quantisable(model: onnx.ModelProto, float_layers: Collection[str]) -> list[str]:
    """Names of the layers to quantise, and of the nodes that pass their outputs on to another one of them."""
    weights = _weights(model)
    nodes, chosen = list(model.graph.node), set()
    quantised_outputs: set[str] = set()
    for node in nodes:
        if (_is_layer(node, weights) and node.input[1] not in float_layers) or (
            node.op_type in _CARRIERS and any(name in quantised_outputs for name in node.input)
        ):
            chosen.add(node.name)
            quantised_outputs.update(node.output)
    read: set[str] = set()  # by a chosen node
    for node in reversed(nodes):
        if node.op_type in _PASSING and node.output[0] not in read:
            chosen.discard(node.name)  # bytes that only float nodes read would lose for nothing
        if node.name in chosen:
            read.update(node.input)
    return [node.name for node in nodes if node.name in chosen]


def _correct_biases(model: onnx.ModelProto, ranges: Ranges, nodes: Collection[str]) -> None:
    """Take what rounding the weights adds to the mean output off the bias: b - (round(W) - W) E[x], by channel.

    Each convolution gets a bias of its own: calls that share weights see different images.
    """
    weights = _weights(model)
    for node in model.graph.node:
        if node.name not in nodes or node.op_type != "Conv":
            continue
        weight = numpy_helper.to_array(weights[node.input[1]])
        scale = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 64
        error = (np.round(weight / np.where(scale > 0, scale, 1)) * scale - weight).sum(axis=(2, 3))  # (O, I / groups)
        groups = len(ranges.means[node.input[0]]) // weight.shape[1]
        means = np.repeat(ranges.means[node.input[0]].reshape(groups, -1), len(weight) // groups, axis=0)
        bias = numpy_helper.to_array(weights[node.input[2]]) if len(node.input) > 2 else np.zeros(len(weight))
        name = f"{node.name}.bias"
        model.graph.initializer.append(
            numpy_helper.from_array((bias - (error * means).sum(axis=1)).astype(np.float32), name)
        )
        node.input[2:] = [name]


def _shield(model: onnx.ModelProto, float_layers: Collection[str]) -> None:
    """Put a clip without bounds between bytes and each layer that stays float, so that it does.

    onnxruntime takes a convolution between a DequantizeLinear and a QuantizeLinear for one whose weights were forgotten
    and quantises them, with one scale for all channels: github.com/microsoft/onnxruntime/pull/22969.
    """
    dequantised = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    for node in list(model.graph.node):
        if node.op_type == "Conv" and node.input[1] in float_layers and node.input[0] in dequantised:
            shielded = f"{node.name}.input"
            model.graph.node.append(onnx.helper.make_node("Clip", [node.input[0]], [shielded], f"{node.name}.shield"))
            node.input[0] = shielded


def _agreement(wanted: Sequence[list[NDArray[Any]]], got: Sequence[list[NDArray[Any]]]) -> float:
    equal = n = 0
    for ours, theirs in zip(wanted, got, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            equal, n = equal + int((one == other).sum()), n + one.size
    return equal / n


def _layers(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the weights of its convolutions; calls that share weights are one layer."""
    weights = _weights(model)
    return tuple(dict.fromkeys(node.input[1] for node in model.graph.node if _is_layer(node, weights)))


def _is_layer(node: onnx.NodeProto, weights: Collection[str]) -> bool:
    return node.op_type == "Conv" and all(name in weights for name in node.input[1:])


def _weights(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {weight.name: weight for weight in model.graph.initializer}


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    known = (*model.graph.value_info, *model.graph.output)
    return {value.name for value in known if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}


def _probe(model: onnx.ModelProto, operator: str, name: str, axes: str | None = None) -> str:
    """Add an output that reduces a tensor: to a number, or along `axes`."""
    output = f"{operator}.{name}"
    inputs = [name] if axes is None else [name, axes]
    model.graph.node.append(onnx.helper.make_node(operator, inputs, [output], keepdims=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    return output
