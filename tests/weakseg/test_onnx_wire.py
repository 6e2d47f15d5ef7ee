from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given
from onnx import TensorProto, helper, numpy_helper

from weakseg import onnx_wire
from weakseg.onnx_wire import WireError, read_content

GRAPHS = sorted((Path(__file__).parents[1] / "data").rglob("*.onnx"))


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
    assert read(made).n_sparse == 1


def test_sparse_constant():
    sparse = onnx.SparseTensorProto(values=tensor("values"), indices=tensor("indices"))
    made = model([helper.make_node("Constant", [], ["y"], sparse_value=sparse)])
    assert read(made).n_sparse == 1


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


def test_small_fields_without_end(monkeypatch):
    """Skipping a field costs the same however small it is: a gigabyte of the smallest would be read for hours."""
    monkeypatch.setattr(onnx_wire, "_MAX_FIELDS", 1000)
    full = model().SerializeToString()
    assert read_content(full + bytes([8, 1]) * 900).inputs == ["x"]
    with pytest.raises(WireError, match="more than 1000 fields"):
        read_content(full + bytes([8, 1]) * 1000)


def test_a_name_of_a_megabyte():
    with pytest.raises(WireError, match="a name of 1048576 bytes"):
        read(model([helper.make_node("R" * 2**20, ["x"], ["y"])]))


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
    try:
        content = read_content(data)
    except WireError:
        return
    assert content.n_fields <= len(data)


@given(st.data())
def test_a_damaged_graph_is_read_or_refused(data):
    """Real graphs with bytes replaced, put in and taken out, which meets every branch more often than any bytes do."""
    damaged = bytearray(data.draw(st.sampled_from(GRAPHS)).read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        content = read_content(bytes(damaged))
    except WireError:
        return
    assert content.n_fields <= len(damaged)
