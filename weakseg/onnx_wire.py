"""What an ONNX file refers to, read from its protobuf bytes: enough to refuse it before any runtime opens it.

Serving needs no onnx package for it, and 100 MB of weights need not be parsed to look at names: fields are skipped by
their length. Field numbers are those of onnx.proto3, which never change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from mmap import mmap

_MAX_DEPTH = 64  # of sub-graphs in attributes; onnxruntime's own models stay below 10
_MAX_FIELDS = 1_000_000  # a second; ten thousand are many. Gigabytes of two-byte fields would be read for hours
_MAX_TEXT = 65536  # bytes of a name

# field numbers, by message
_MODEL_GRAPH, _MODEL_OPSET, _MODEL_TRAINING, _MODEL_FUNCTION = 7, 8, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE = 1, 5, 11, 12, 15
_NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES = 22, 23
_TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 8, 13, 14
_SPARSE_VALUES, _SPARSE_INDICES = 1, 2
_FUNCTION_NAME, _FUNCTION_NODE, _FUNCTION_ATTRIBUTE = 1, 7, 11
_TRAINING_GRAPHS = (1, 2)


class WireError(ValueError):
    """The bytes are not an ONNX model."""


@dataclass
class OnnxContent:
    """What a model refers to.

    opsets: {domain: version}; "" is the standard one.
    operators: (domain, operator) of every node, sub-graphs and functions included.
    external: names of tensors whose data is in another file.
    n_sparse: sparse tensors, which runtimes make dense: 200 bytes become as many as their dimensions say.
    functions: names of functions that the model brings itself.
    inputs, outputs: names of the main graph's.
    n_fields: protobuf fields that were read.
    """

    opsets: dict[str, int] = field(default_factory=dict)
    operators: set[tuple[str, str]] = field(default_factory=set)
    external: list[str] = field(default_factory=list)
    n_sparse: int = 0
    functions: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    n_fields: int = 0


def read_content(data: bytes | mmap) -> OnnxContent:
    """Walk a serialised ModelProto. Of a mapped file only the pages that hold names are touched.

    Raises:
        WireError: not protobuf, cut short, without a graph, or of more fields or longer names than any network has.
    """
    content = OnnxContent()
    n_graphs = 0
    for number, value in _fields(memoryview(data), content):
        if number == _MODEL_GRAPH:
            n_graphs += 1
            _graph(_message(value), content, depth=0)
        elif number == _MODEL_OPSET:
            _opset(_message(value), content)
        elif number == _MODEL_FUNCTION:
            _function(_message(value), content)
        elif number == _MODEL_TRAINING:
            for inner, graph in _fields(_message(value), content):
                if inner in _TRAINING_GRAPHS:
                    _graph(_message(graph), content, depth=1)
    if n_graphs != 1:
        raise WireError(f"expected one graph, got {n_graphs}")
    return content


def _graph(view: memoryview, content: OnnxContent, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise WireError("sub-graphs are nested too deeply")
    for number, value in _fields(view, content):
        if number == _GRAPH_NODE:
            _node(_message(value), content, depth)
        elif number == _GRAPH_INITIALIZER:
            _tensor(_message(value), content)
        elif number == _GRAPH_SPARSE:
            _sparse(_message(value), content)
        elif depth == 0 and number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
            names = content.inputs if number == _GRAPH_INPUT else content.outputs
            names += [_text(name) for inner, name in _fields(_message(value), content) if inner == 1]


def _node(view: memoryview, content: OnnxContent, depth: int) -> None:
    operator = domain = ""
    for number, value in _fields(view, content):
        if number == _NODE_OP:
            operator = _text(value)
        elif number == _NODE_DOMAIN:
            domain = _text(value)
        elif number == _NODE_ATTRIBUTE:
            _attribute(_message(value), content, depth)
    content.operators.add((domain, operator))


def _attribute(view: memoryview, content: OnnxContent, depth: int) -> None:
    for number, value in _fields(view, content):
        if number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            _tensor(_message(value), content)
        elif number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
            _graph(_message(value), content, depth + 1)
        elif number in (_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES):
            _sparse(_message(value), content)


def _tensor(view: memoryview, content: OnnxContent) -> None:
    name, external = "", False
    for number, value in _fields(view, content):
        if number == _TENSOR_NAME:
            name = _text(value)
        # Either mark is enough: readers differ in which one they believe.
        elif number == _TENSOR_EXTERNAL or (number == _TENSOR_LOCATION and value != 0):
            external = True
    if external:
        content.external.append(name)


def _sparse(view: memoryview, content: OnnxContent) -> None:
    content.n_sparse += 1
    for number, value in _fields(view, content):
        if number in (_SPARSE_VALUES, _SPARSE_INDICES):
            _tensor(_message(value), content)


def _function(view: memoryview, content: OnnxContent) -> None:
    for number, value in _fields(view, content):
        if number == _FUNCTION_NAME:
            content.functions.append(_text(value))
        elif number == _FUNCTION_NODE:
            _node(_message(value), content, depth=1)
        elif number == _FUNCTION_ATTRIBUTE:
            _attribute(_message(value), content, depth=1)


def _opset(view: memoryview, content: OnnxContent) -> None:
    domain, version = "", 0
    for number, value in _fields(view, content):
        if number == 1:
            domain = _text(value)
        elif number == 2 and isinstance(value, int):
            version = value
    content.opsets[domain] = version


def _fields(view: memoryview, content: OnnxContent) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of one message: an int for varints, the bytes of anything else. Counted in `content`."""
    at = 0
    while at < len(view):
        content.n_fields += 1
        if content.n_fields > _MAX_FIELDS:
            raise WireError(f"more than {_MAX_FIELDS} fields")
        key, at = _varint(view, at)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1 << 29:  # some parsers would cut the number to 29 bits and see another field than we do
            raise WireError(f"field number {number} does not exist")
        if wire == 0:
            value, at = _varint(view, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(view, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise WireError(f"field {number} has wire type {wire}")
        if at + length > len(view):
            raise WireError(f"field {number} ends {at + length - len(view)} bytes after its message")
        yield number, view[at : at + length]
        at += length


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(view) and shift < 70:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise WireError("a number is cut short")


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise WireError("a number where a message is expected")
    return value


def _text(value: int | memoryview) -> str:
    view = _message(value)
    if len(view) > _MAX_TEXT:
        raise WireError(f"a name of {len(view)} bytes")
    return bytes(view).decode(errors="replace")
