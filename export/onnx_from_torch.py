"""Torch modules to ONNX files with dynamic batch, height and width.

A graph (training.graphs) calls its network once per scale. Traced as it is, the exporter would reason about symbolic
sizes in the whole network once per call, and write batch norms that cannot be folded because the calls share weights.
So the network is exported by itself, once for all graphs; the graph is exported around an opaque node; and in the ONNX
file each opaque node is replaced by the network. MobileNetV2 at four scales: 15 s instead of 70.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx
import onnx.inliner
import onnx.shape_inference
import onnx_ir
import torch
from google.protobuf.message import Message
from torch import Tensor, nn

from export.resizes import with_constant_resizes
from weakseg.errors import WeaksegError
from weakseg.manifest import INPUT
from weakseg.version import __version__

OPSET = 20
_DOMAIN, _CALL = "weakseg.export", "Network"  # of the opaque node; gone from the finished file
_EXAMPLE = (2, 96, 128, 3)  # three different sizes, none of them 0 or 1, which would be taken for constants
_LOGGER = "torch.onnx._internal.exporter._registration"


@dataclass(frozen=True)
class ExportedNetwork:
    """A network by itself: its graph, and (channels, stride) of each output; stride None = (B, channels), no map."""

    model: onnx.ModelProto
    outputs: tuple[tuple[int, int | None], ...]


def onnx_from_graphs(graphs: Mapping[str, nn.Module], metadata: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """Serialised ONNX models of several graphs; graphs that share a network share its export.

    Args:
        graphs: {name: module}; forward(images uint8 (B, H, W, 3)) returns {output name: tensor}. A module's attribute
            `model`, when it calls it as model(view (B, 3, h, w) float), is exported separately.
        metadata: written into each file.
    Returns:
        {name: bytes}. The same weights give the same bytes; nothing of this machine is in them.
    Raises:
        WeaksegError: a graph uses what ONNX or the exporter does not know.
    """
    networks: dict[int, ExportedNetwork] = {}
    files = {}
    for name, graph in graphs.items():
        try:
            with torch.no_grad(), _evaluating(graph), _quiet():
                model = with_constant_resizes(_export_graph(graph, networks))
        except (torch.onnx.OnnxExporterError, onnx_ir.passes.PassError) as error:
            raise WeaksegError(
                f"graph {name} cannot be exported to ONNX ({_first_cause(error)}): compute sizes "
                "with integers, slice instead of split, and keep data-dependent branches out of it"
            ) from error
        files[name] = finished(model, {"weakseg.graph": name, **(metadata or {})})
    return files


def export_network(network: nn.Module) -> ExportedNetwork:
    """Export a network over float views (B, 3, h, w), and find out what each output's size depends on."""
    view = torch.zeros(2, 3, 128, 160)
    outputs = _flat(network(view))
    flat = _FlatOutputs(_with_clamps(network))
    names = [f"out{i}" for i in range(len(outputs))]
    with _evaluating(flat):
        model = _export(flat, view, "view", {0: "B", 2: "H", 3: "W"}, names)
    kinds = tuple((out.shape[1], None if out.ndim == 2 else view.shape[2] // out.shape[2]) for out in outputs)
    return ExportedNetwork(model, kinds)


def finished(model: onnx.ModelProto, metadata: Mapping[str, str]) -> bytes:
    """Check a model, strip what names this machine's files, and serialise it deterministically."""
    _strip(model)
    del model.graph.value_info[:]  # sizes as formulas of torch's own; runtimes infer them anyway
    for output in model.graph.output:
        for axis, dim in zip("BChw", output.type.tensor_type.shape.dim, strict=False):
            if dim.dim_param:
                dim.dim_param = axis
    model.producer_name, model.producer_version = "weakseg", __version__
    for key, value in sorted(metadata.items()):
        model.metadata_props.add(key=key, value=value)
    return serialised(model)


def serialised(model: onnx.ModelProto) -> bytes:
    """The bytes of a model, checked, with the inferred type and shape of every tensor in it."""
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)


class _Opaque(nn.Module):
    """Stands in for the network while the graph around it is traced: one ONNX node with the right output sizes."""

    def __init__(self, network: nn.Module, exported: ExportedNetwork) -> None:
        super().__init__()
        self.network = network
        self.exported = exported
        self.result_type = type(network(torch.zeros(1, 3, 64, 64)))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what else a graph asks its network for: `backbone.mean`
            return getattr(super().__getattr__("network"), name)

    def forward(self, view: Tensor) -> Any:
        batch, _, height, width = view.shape
        shapes = [
            (batch, channels) if stride is None else (batch, channels, height // stride, width // stride)
            for channels, stride in self.exported.outputs
        ]
        outputs = torch.onnx.ops.symbolic_multi_out(
            f"{_DOMAIN}::{_CALL}", (view,), {}, dtypes=[torch.float32] * len(shapes), shapes=shapes, version=1
        )
        if issubclass(self.result_type, Tensor):
            return outputs[0]
        return self.result_type(*outputs) if hasattr(self.result_type, "_fields") else tuple(outputs)


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 6)


class _FlatOutputs(nn.Module):
    """A network whose outputs are a plain tuple."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, view: Tensor) -> tuple[Tensor, ...]:
        return _flat(self.network(view))


def _with_clamps(network: nn.Module) -> nn.Module:
    """A copy with clamps for ReLU6: the same ONNX; torch takes ReLU6 apart on symbols, half of the export's time."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, _Clamp())
    return network


def _export_graph(graph: nn.Module, networks: dict[int, ExportedNetwork]) -> onnx.ModelProto:
    """Export a graph with its network opaque, then put the network in; `networks` by id are exported once and kept."""
    example = torch.zeros(_EXAMPLE, dtype=torch.uint8)
    names, axes = list(graph(example[:1])), {0: "B", 1: "H", 2: "W"}
    network = getattr(graph, "model", None)
    if not isinstance(network, nn.Module):
        return _export(graph, example, INPUT, axes, names)
    if id(network) not in networks:
        networks[id(network)] = export_network(network)
    exported = networks[id(network)]
    shell = copy.copy(graph)
    shell._modules = {**graph._modules, "model": _Opaque(network, exported)}
    return _inlined(_export(shell, example, INPUT, axes, names), exported.model)


def _inlined(model: onnx.ModelProto, network: onnx.ModelProto) -> onnx.ModelProto:
    """Replace every opaque node by the network's nodes; its weights are stored once."""
    weights = [weight.name for weight in network.graph.initializer]
    function = onnx.helper.make_function(
        _DOMAIN,
        _CALL,
        ["view", *weights],
        [output.name for output in network.graph.output],
        list(network.graph.node),
        list(network.opset_import),
    )
    model.functions.append(function)
    for node in model.graph.node:
        if node.domain == _DOMAIN:
            node.input.extend(f"network.{weight}" for weight in weights)
    for weight in network.graph.initializer:
        stored = model.graph.initializer.add()
        stored.CopyFrom(weight)
        stored.name = f"network.{weight.name}"
    inlined = onnx.inliner.inline_local_functions(model)
    standard = [opset for opset in inlined.opset_import if opset.domain != _DOMAIN]
    del inlined.opset_import[:]
    inlined.opset_import.extend(standard)
    return inlined


def _export(
    module: nn.Module, example: Tensor, input_name: str, axes: dict[int, str], names: list[str]
) -> onnx.ModelProto:
    """torch.onnx.export with named dynamic axes and named outputs."""
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=[input_name],
        output_names=names,
        dynamic_shapes=(axes,),
        verbose=False,
    )
    assert program is not None
    model = onnx.ModelProto()
    model.CopyFrom(program.model_proto)
    return model


def _strip(message: Message) -> None:
    """Drop documentation and metadata everywhere: the exporter writes stack traces with paths into them."""
    for field, value in list(message.ListFields()):
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type is not None and field.name not in ("raw_data", "type"):
            for item in value if field.is_repeated else [value]:
                _strip(item)


def _first_cause(error: BaseException) -> str:
    """The first line of the error at the end of the chain, which is where it began."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]


def _flat(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for every part of a module; afterwards each part has its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks about itself: torchvision's operators are absent, one of its classes is deprecated."""
    logger = logging.getLogger(_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
