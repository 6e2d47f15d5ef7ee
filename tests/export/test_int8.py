"""INT8: exact where bytes can be, dynamic as before, and float where bytes hurt."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.int8 import calibrate, int8_from_fp32, label_maps, quantised
from export.onnx_from_torch import OPSET
from weakseg.errors import ConfigError, DataError, ParityError
from weakseg.tolerance import INT8_AGREEMENT


def network(*layers: tuple[str, np.ndarray], output: str = "logits") -> bytes:
    """images -> float -> convolutions with a ReLU between each two; layers are (name, weight (O, I, 1, 1))."""
    nodes = [
        helper.make_node("Transpose", ["images"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["nchw"], ["x0"], to=TensorProto.FLOAT),
    ]
    for i, (name, _) in enumerate(layers):
        last = i == len(layers) - 1
        nodes.append(helper.make_node("Conv", [f"x{i}", name], [output if last else f"y{i}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"y{i}"], [f"x{i + 1}"]))
    return serialise(
        nodes, {name: weight.astype(np.float32) for name, weight in layers}, output, layers[-1][1].shape[0]
    )


def serialise(nodes, weights, output: str, n_channels: int) -> bytes:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 3])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["B", n_channels, "H", "W"])],
        [numpy_helper.from_array(weight, name) for name, weight in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def kernel(*rows) -> np.ndarray:
    return np.array(rows, dtype=np.float32)[:, :, None, None]


def run(model: bytes, images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


def photographs(n: int = 8, size: int = 24) -> list[np.ndarray]:
    """Noise with black and white in every channel, so that each one's range is 0..255."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    images[:, 0, 0], images[:, 0, 1] = 0, 255
    return list(images)


SHUFFLE = kernel([0, 1, 0], [0, 0, 1], [1, 0, 0])


def test_whole_numbers_stay_exact() -> None:
    model = network(("a", SHUFFLE), ("b", SHUFFLE))  # 0..255 in steps of 1, weights 0 and 64 / 64
    made = int8_from_fp32(model, photographs())
    batch = np.stack(photographs()[:2])
    np.testing.assert_array_equal(run(made.model, batch)["logits"], run(model, batch)["logits"])
    assert (made.agreement, made.layers, made.float_layers, made.n_held_out) == (1.0, ("a", "b"), (), 2)


def test_layers_compute_in_bytes() -> None:
    made = onnx.load_model_from_string(int8_from_fp32(network(("a", SHUFFLE), ("b", SHUFFLE)), photographs()).model)
    stored = {weight.name: weight.data_type for weight in made.graph.initializer}
    assert {stored["a_quantized"], stored["b_quantized"]} == {TensorProto.INT8}
    assert not {"a", "b"} & stored.keys()
    assert {opset.domain for opset in made.opset_import} == {""}  # a bundle refuses operators of others


def test_bytes_of_two_products_fit_16_bits() -> None:
    rng = np.random.default_rng(1)
    made = onnx.load_model_from_string(
        int8_from_fp32(network(("a", rng.normal(size=(4, 3, 1, 1)))), photographs(), target=0).model
    )
    weight = next(numpy_helper.to_array(w) for w in made.graph.initializer if w.name == "a_quantized")
    assert np.abs(weight.astype(int)).max(axis=(1, 2, 3)).tolist() == [64] * 4  # per channel
    assert 2 * 255 * 64 < 2**15


def test_rounding_the_weights_does_not_shift_the_mean() -> None:
    weight = kernel([1, 0.49 / 64, 0.49 / 64])  # rounding takes 0.49 / 64 of two channels away
    model = network(("a", weight))
    image = np.full((4, 4, 3), (10, 200, 255), dtype=np.uint8)
    graph = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model))
    for i, node in enumerate(graph.graph.node):
        node.name = f"node_{i}"
    data = quantised(graph, calibrate(graph, [image]))
    expected = 10 + 455 * 0.49 / 64
    step = expected / 255  # of the output, which is rounded, too
    assert run(data, image[None])["logits"].mean() == pytest.approx(expected, abs=step)


def test_a_layer_that_bytes_ruin_stays_float() -> None:
    loud = kernel([1000, 0, 0], [0, 1, 0], [0, 0, 1])  # its outputs share one scale: steps of 1000 for all channels
    quiet = kernel([0, 1, -1], [0, -1, 1])  # reads the small channels only
    model = network(("first", SHUFFLE), ("loud", loud), ("quiet", quiet))
    made = int8_from_fp32(model, photographs())
    assert set(made.float_layers) == {"loud", "quiet"}
    assert made.agreement >= INT8_AGREEMENT
    stored = {weight.name for weight in onnx.load_model_from_string(made.model).graph.initializer}
    assert {"first_quantized", "loud", "quiet"} <= stored


def test_a_float_layer_between_bytes_computes_in_float() -> None:
    """onnxruntime would quantise its weights with one scale for all channels, in which 1 beside 1000 is lost."""
    copies = kernel([0, 0, 1], [0, 0, 1], [1, 0, 0])
    uneven = kernel([1000, -1000, 0], [0, 0, 1], [0, 0, 1])
    model = network(("first", copies), ("uneven", uneven), ("last", SHUFFLE))
    graph = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model))
    for i, node in enumerate(graph.graph.node):
        node.name = f"node_{i}"
    images = photographs()
    data = quantised(graph, calibrate(graph, images), ("uneven",))
    expected, got = (run(one, images[0][None])["logits"] for one in (model, data))
    np.testing.assert_allclose(got, expected, atol=0.01)


@pytest.mark.parametrize("name", ["classifier", "classifier_multiscale", "segmentation"])
def test_names_types_and_dynamic_sizes_stay(exported_toys, name) -> None:
    model = exported_toys[name]
    made = int8_from_fp32(model, photographs(), target=0)
    assert len(made.layers) == (5 if "classifier" in name else 6)  # calls that share weights are one layer
    rng = np.random.default_rng(2)
    for shape in ((1, 1, 1, 3), (1, 33, 31, 3), (3, 40, 20, 3)):
        images = rng.integers(0, 256, shape, dtype=np.uint8)
        before = images.copy()
        ours, theirs = run(model, images), run(made.model, images)
        assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
        assert all(np.isfinite(value).all() for value in theirs.values())
        np.testing.assert_array_equal(images, before)


def test_the_same_bytes_again(exported_toys) -> None:
    images = photographs()
    before = [image.copy() for image in images]
    first, second = (int8_from_fp32(exported_toys["segmentation"], images, target=0) for _ in range(2))
    assert first == second
    np.testing.assert_array_equal(images, before)


def test_one_odd_image_does_not_set_the_range() -> None:
    model = network(("a", SHUFFLE))
    graph = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model))
    dark, bright = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 200, np.uint8)
    ranges = calibrate(graph, [dark, dark, dark, bright])
    assert ranges.extremes["x0"] == (50, 50)
    np.testing.assert_array_equal(ranges.means["x0"], [50, 50, 50])


def test_label_maps_show_present_classes() -> None:
    cam = np.zeros((1, 2, 1, 3), dtype=np.float32)
    cam[0, 0, 0], cam[0, 1, 0] = (1, 0.2, 0), (0, 5, 4)
    both = label_maps({"scores": np.array([[0.9, 0.9]], np.float32), "cam": cam})
    one = label_maps({"scores": np.array([[0.9, 0.1]], np.float32), "cam": cam})
    assert both[0].tolist() == [[1, 2, 2]]
    assert one[0].tolist() == [[1, 0, 0]]


def test_images_are_needed() -> None:
    with pytest.raises(DataError, match="at least 2, got 1"):
        int8_from_fp32(network(("a", SHUFFLE)), photographs(1))


def test_a_target_out_of_reach() -> None:
    rng = np.random.default_rng(3)
    model = network(("a", rng.normal(size=(4, 3, 1, 1))), ("b", rng.normal(size=(5, 4, 1, 1))))
    with pytest.raises(ParityError, match="leave int8 out"):
        int8_from_fp32(model, photographs(), target=1.01)


def test_a_graph_without_convolutions() -> None:
    nodes = [
        helper.make_node("Transpose", ["images"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["nchw"], ["logits"], to=TensorProto.FLOAT),
    ]
    with pytest.raises(ConfigError, match="none: keep it float"):
        int8_from_fp32(serialise(nodes, {}, "logits", 3), photographs())


def test_a_graph_without_labels() -> None:
    with pytest.raises(ConfigError, match="got affinities: keep this graph float"):
        int8_from_fp32(network(("a", SHUFFLE), output="affinities"), photographs())
