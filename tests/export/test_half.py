"""16 bits: halve the weights, and leave what surrounds the layers in float32."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import parity
from export.half import emulated, half_from_fp32
from export.onnx_from_torch import OPSET
from weakseg.errors import ConfigError


def serialise(nodes, weights) -> bytes:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "C", "H", "W"])],
        [numpy_helper.from_array(_stored(weight), name) for name, weight in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _stored(weight) -> np.ndarray:
    """Floats as float32, whole numbers (axes) as they are."""
    return np.asarray(weight) if np.asarray(weight).dtype == np.int64 else np.asarray(weight, dtype=np.float32)


INPUT = [
    helper.make_node("Transpose", ["images"], ["nchw"], perm=[0, 3, 1, 2]),
    helper.make_node("Cast", ["nchw"], ["x"], to=TensorProto.FLOAT),
]


def run(model: bytes, images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


def types(model: bytes) -> dict[str, int]:
    """{tensor: element type} of everything in the graph."""
    graph = onnx.load_model_from_string(model).graph
    known = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    return known | {weight.name: weight.data_type for weight in graph.initializer}


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 33, 31, 3), dtype=np.uint8)


def test_small_whole_numbers_stay_exact(images) -> None:
    weight = np.array([[1, 2, 0.5], [-1, 0.25, 4]])[:, :, None, None]
    nodes = [*INPUT, helper.make_node("Conv", ["x", "w"], ["logits"])]
    model = serialise(nodes, {"w": weight})
    made = half_from_fp32(model, "fp16")
    got = run(made, images)["logits"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, run(model, images)["logits"])
    assert types(made)["w.fp16"] == TensorProto.FLOAT16 and "w" not in types(made)


@pytest.mark.parametrize(("half", "kind"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_means_and_what_surrounds_the_layers_stay_float32(images, half, kind) -> None:
    nodes = [
        *INPUT,
        helper.make_node("Mul", ["x", "large"], ["scaled"]),  # beyond float16
        helper.make_node("Mul", ["scaled", "small"], ["normal"]),
        helper.make_node("Conv", ["normal", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("ReduceMean", ["b", "axes"], ["mean"], keepdims=1),
        helper.make_node("Add", ["b", "mean"], ["c"]),
        helper.make_node("Conv", ["c", "v"], ["d"]),
        helper.make_node("Mul", ["d", "large"], ["e"]),
        helper.make_node("Mul", ["d", "small"], ["f"]),  # a second float32 reader of one float16 tensor
        helper.make_node("Add", ["e", "f"], ["logits"]),
    ]
    rng = np.random.default_rng(1)
    weights = {"large": 1e5, "small": 1e-5, "w": rng.normal(size=(4, 3, 1, 1)), "v": rng.normal(size=(2, 4, 1, 1))}
    model = serialise(nodes, weights | {"axes": np.array([2, 3])})
    made = half_from_fp32(model, half)
    wide = {name: types(made)[name] == TensorProto.FLOAT for name in ("scaled", "normal", "mean", "e", "f", "logits")}
    assert all(wide.values()), wide
    assert {types(made)[name] for name in ("a", "b", "c", "d")} == {kind}
    expected, got = run(model, images)["logits"], run(emulated(made), images)["logits"]
    np.testing.assert_allclose(got, expected, atol={"fp16": 0.01, "bf16": 0.03}[half] * np.abs(expected).max())


@pytest.mark.parametrize(("half", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_emulation_rounds_every_tensor_of_16_bits(images, half, dtype) -> None:
    rng = np.random.default_rng(1)
    weights = {"w": rng.normal(size=(4, 3, 1, 1)), "v": rng.normal(size=(2, 4, 1, 1))}
    nodes = [*INPUT, helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("Conv", ["a", "v"], ["logits"])]
    got = run(emulated(half_from_fp32(serialise(nodes, weights), half)), images)["logits"]

    def rounded(values):
        return np.asarray(values, np.float32).astype(dtype).astype(np.float64)

    x = rounded(images.transpose(0, 3, 1, 2))
    a = rounded(np.einsum("oc,bchw->bohw", rounded(weights["w"])[:, :, 0, 0], x))
    expected = rounded(np.einsum("oc,bchw->bohw", rounded(weights["v"])[:, :, 0, 0], a))
    assert (got == rounded(got)).all()
    # Sums that lie between two numbers may be rounded either way, as float32 adds them in its own order.
    assert (got == expected).mean() > 0.99
    np.testing.assert_allclose(got, expected, rtol=2 * float(ml_dtypes.finfo(dtype).eps))


def test_emulation_of_a_float32_graph_changes_nothing(images, exported_toys) -> None:
    exact, same = (run(model, images) for model in (exported_toys["classifier"], emulated(exported_toys["classifier"])))
    np.testing.assert_array_equal(exact["cam"], same["cam"])


@pytest.mark.parametrize("name", ["classifier", "classifier_multiscale", "segmentation"])
def test_graphs_keep_their_form_and_labels(toy_graphs, exported_toys, tmp_path, name) -> None:
    made = half_from_fp32(exported_toys[name], "fp16")
    (tmp_path / "graph.onnx").write_bytes(made)
    photographs = list(np.random.default_rng(2).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8))
    report = parity.check(name, toy_graphs(0)[name], tmp_path / "graph.onnx", photographs, precision="fp16")
    assert report.n_cases == 10
    session = [(v.name, v.type, v.shape) for v in onnxruntime.InferenceSession(made).get_outputs()]
    assert session == [
        (v.name, v.type, v.shape) for v in onnxruntime.InferenceSession(exported_toys[name]).get_outputs()
    ]
    assert made == half_from_fp32(exported_toys[name], "fp16")


def test_a_graph_without_layers() -> None:
    nodes = [*INPUT, helper.make_node("Relu", ["x"], ["logits"])]
    with pytest.raises(ConfigError, match="none: keep it float32"):
        half_from_fp32(serialise(nodes, {}), "fp16")
