"""Nodes that compute the output `labels`, put into a graph; without torch, which is not where engines are built."""

from __future__ import annotations

import onnx
import onnx.parser

from weakseg.manifest import INPUT

_PREFIX = "labels."


def append_labels(graph: onnx.GraphProto, text: str, kind: int) -> None:
    """Add nodes, in ONNX's textual form, that compute `labels` of `images` and `logits`.

    Args:
        kind: ONNX's number of the labels' type, for TYPE and TYPE_NUMBER in the text.
    """
    text = text.replace("TYPE_NUMBER", str(kind)).replace("TYPE", onnx.TensorProto.DataType.Name(kind).lower())
    tail = onnx.parser.parse_model(text).graph
    kept = {INPUT, "logits", "labels", ""}
    for node in tail.node:
        for names in (node.input, node.output):
            names[:] = [name if name in kept else _PREFIX + name for name in names]
        node.name = _PREFIX + node.output[0]
        graph.node.append(node)
    graph.output.append(tail.output[0])
