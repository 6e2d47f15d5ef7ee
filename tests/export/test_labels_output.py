"""The output `labels` of a graph is what `labels_from_logits` makes of its logits."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export.labels_output import with_labels
from export.parity import check
from weakseg.bundle import check_graph
from weakseg.errors import ParityError
from weakseg.segmentation import labels_from_logits


def constant_graph(logits: np.ndarray) -> bytes:
    """A graph whose logits are these, whatever the images."""
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 3])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", logits.shape[1], "h", "w"])
    node = helper.make_node("Identity", ["weights"], ["logits"])
    graph = helper.make_graph([node], "constant", [images], [output], [numpy_helper.from_array(logits, "weights")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def labels(logits: np.ndarray, height: int, width: int) -> np.ndarray:
    session = ort.InferenceSession(with_labels(constant_graph(logits)))
    [made] = session.run(["labels"], {"images": np.zeros((len(logits), height, width, 3), np.uint8)})
    return made


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(2, 30), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 2**32)
)
def test_equal_to_labels_from_logits(batch, channels, height, width, coarse, seed):
    """Coarse values tie often; the lowest class wins there too."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(batch, channels, -(-height // 4), -(-width // 4))).astype(np.float32)
    logits += 4 * rng.normal(size=(1, channels, 1, 1)).astype(np.float32)  # some channels win nowhere
    logits = np.round(logits) if coarse else logits
    made = labels(logits, height, width)
    assert made.dtype == np.uint8
    for one, expected in zip(made, logits, strict=True):
        agreeing = (one == labels_from_logits(expected, height, width)).mean()
        assert agreeing == 1 if coarse else agreeing >= 0.999  # interpolation may round otherwise


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_image_that_is_not_finite_is_ignored_and_no_other(value):
    logits = np.zeros((2, 3, 2, 2), np.float32)
    logits[:, 1] = 1
    logits[0, 2, 1, 1] = value
    made = labels(logits, 8, 7)
    assert (made[0] == 255).all() and (made[1] == 1).all()


def test_more_classes_than_a_byte_holds():
    logits = np.zeros((1, 301, 1, 1), np.float32)
    logits[0, 300] = 1
    made = labels(logits, 2, 3)
    assert made.dtype == np.uint16 and (made == 300).all()
    logits[0, 0] = np.nan
    assert (labels(logits, 2, 3) == 65535).all()


def test_the_file_is_a_graph_that_bundles_take(exported_toys):
    data = with_labels(exported_toys["segmentation"])
    check_graph(data, ("logits", "labels"), "segmentation")
    model = onnx.load_from_string(data)
    dims = [d.dim_param or d.dim_value for d in model.graph.output[1].type.tensor_type.shape.dim]
    assert dims == ["B", "H", "W"]
    assert data == with_labels(exported_toys["segmentation"])


def test_the_gate_judges_the_labels(toy_graphs, exported_toys, tmp_path):
    """Logits as they should be, labels of the second best class."""
    model = onnx.load_from_string(with_labels(exported_toys["segmentation"]))
    [argmax] = [node for node in model.graph.node if node.op_type == "ArgMax"]
    argmax.op_type = "ArgMin"
    path = tmp_path / "segmentation.onnx"
    path.write_bytes(model.SerializeToString())
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    with pytest.raises(ParityError, match="output labels"):
        check("segmentation", toy_graphs()["segmentation"], path, [image])
    path.write_bytes(with_labels(exported_toys["segmentation"]))
    assert check("segmentation", toy_graphs()["segmentation"], path, [image]).record()["precision"] == "fp32"
