import contextlib

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given
from onnx import TensorProto, helper, numpy_helper

from weakseg.onnx_wire import WireError, read_content


def tensor(name: str, external: bool = False) -> TensorProto:
    made = numpy_helper.from_array(np.arange(300, dtype=np.float32), name)
    if external:
        onnx.external_data_helper.set_external_data(made, "elsewhere.bin")
        made.ClearField("raw_data")
    return made


def model(nodes=None, initializers=(), **fields) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])
    nodes = [helper.make_node("Relu", ["x"], ["y"])] if nodes is None else nodes
    return helper.make_model(helper.make_graph(nodes, "g", [value], [out], list(initializers)), **fields)


def read(made: onnx.ModelProto):
    return read_content(made.SerializeToString())


def test_plain_model():
    content = read(model(initializers=[tensor("w")], opset_imports=[helper.make_opsetid("", 20)]))
    assert content.opsets == {"": 20}
    assert content.operators == {("", "Relu")}
    assert (content.inputs, content.outputs) == (["x"], ["y"])
    assert content.external == content.functions == []


def test_external_initializer():
    assert read(model(initializers=[tensor("w", external=True), tensor("v")])).external == ["w"]


def test_location_alone_is_external():
    made = tensor("w")
    made.data_location = TensorProto.EXTERNAL
    assert read(model(initializers=[made])).external == ["w"]


def test_external_constant_in_a_branch():
    constant = helper.make_node("Constant", [], ["c"], value=tensor("deep", external=True))
    branch = helper.make_graph([constant], "b", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [300])])
    made = model([helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)])
    content = read(made)
    assert content.external == ["deep", "deep"]
    assert content.operators == {("", "If"), ("", "Constant")}
    assert content.outputs == ["y"]


def test_external_sparse_tensor():
    sparse = onnx.SparseTensorProto(values=tensor("values", external=True), indices=tensor("indices"))
    made = model()
    made.graph.sparse_initializer.append(sparse)
    assert read(made).external == ["values"]


def test_custom_operator():
    made = model([helper.make_node("Steal", ["x"], ["y"], domain="evil")])
    assert read(made).operators == {("evil", "Steal")}


def test_custom_operator_inside_a_function():
    function = helper.make_function(
        "own",
        "F",
        ["a"],
        ["b"],
        [helper.make_node("Steal", ["a"], ["b"], domain="evil")],
        [helper.make_opsetid("", 20)],
    )
    made = model([helper.make_node("F", ["x"], ["y"], domain="own")], functions=[function])
    content = read(made)
    assert content.functions == ["F"]
    assert content.operators == {("own", "F"), ("evil", "Steal")}


def wrapped(number: int, data: bytes) -> bytes:
    """A length-delimited protobuf field."""
    length, size = b"", len(data)
    while size >= 0x80:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


def test_nested_too_deeply():
    graph = b""
    for _ in range(80):
        graph = wrapped(1, wrapped(5, wrapped(6, graph)))  # node.attribute.g
    with pytest.raises(WireError, match="deeply"):
        read_content(wrapped(7, graph))


def test_field_number_beyond_29_bits():
    with pytest.raises(WireError, match="does not exist"):
        read_content(bytes([0xBA, 0x80, 0x80, 0x80, 0x10, 0]))


@given(st.data())
def test_cut_short_never_passes(data):
    full = model(initializers=[tensor("w")]).SerializeToString()
    cut = data.draw(st.integers(0, len(full) - 1))
    try:
        content = read_content(full[:cut])
    except WireError:
        return
    assert content.inputs  # only what follows the whole graph may be missing


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    with contextlib.suppress(WireError):
        read_content(data)
