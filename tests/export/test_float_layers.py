"""The fewest float layers are found, and float16 finds the one layer that it cannot compute."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export.float_layers import run_of, with_fewest_float_layers
from export.half import half_from_fp32, half_within
from weakseg.errors import ParityError


def search(harms: list[float], target: float, start=()):
    """Layers whose harms add up; the graph is the list of its float layers."""
    layers = [f"layer {i}" for i in range(len(harms))]
    of = dict(zip(layers, harms, strict=True))

    def left(data: bytes) -> float:
        floats = json.loads(data)
        return sum(harm for layer, harm in of.items() if layer not in floats)

    def make(floats) -> bytes:
        return json.dumps(sorted(floats)).encode()

    return with_fewest_float_layers(layers, make, lambda data: -left(data), left, target, start)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20, unique=True), st.floats(0, 5))
def test_the_fewest_and_the_worst(harms, allowed):
    made = search(harms, -allowed)
    worst = sorted(harms, reverse=True)
    fewest = next((n for n in range(len(harms)) if sum(worst[n:]) <= allowed - 1e-9), None)
    if fewest is None:
        assert not made.reached or sum(worst[len(made.float_layers) :]) == pytest.approx(allowed, abs=1e-6)
        return
    assert made.reached and len(made.float_layers) <= fewest
    assert (
        sorted((harms[int(name.split()[1])] for name in made.float_layers), reverse=True)
        == worst[: len(made.float_layers)]
    )


def test_those_that_are_known_come_first():
    made = search([3, 2, 1], -2.5, start=["layer 2"])
    assert made.reached and made.float_layers == ("layer 2", "layer 0")


def network(*weights: np.ndarray) -> bytes:
    """images / 255 -> 1 x 1 convolutions."""
    nodes = [
        helper.make_node("Transpose", ["images"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["nchw"], ["bytes"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["bytes", "full"], ["x0"]),
    ]
    stored = [numpy_helper.from_array(np.float32(255), "full")]
    for i, weight in enumerate(weights):
        last = i == len(weights) - 1
        nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}"], ["logits" if last else f"x{i + 1}"]))
        stored.append(numpy_helper.from_array(weight.astype(np.float32)[:, :, None, None], f"w{i}"))
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", len(weights[-1]), "H", "W"])],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


EYE = np.eye(3)
# Weights that differ by a half beyond 2048, where float16 has steps of 2.
LARGE_SUMS = EYE * 0.5 + 3000
DIFFERENCES = np.array([[1, -1, 0], [0, 1, -1], [-1, 0, 1]])


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (3, 8, 9, 3), dtype=np.uint8))


def test_a_network_that_float16_can_compute_has_no_float_layer():
    made = half_within(network(EYE, EYE * 2), pictures(), "fp16")
    assert made.float_layers == () and made.layers == ("w0", "w1") and made.error < 1e-2


def test_the_layer_whose_weights_float16_cannot_tell_apart_stays_float32():
    made = half_within(network(EYE, LARGE_SUMS, DIFFERENCES, EYE), pictures(), "fp16")
    assert "w1" in made.float_layers and "w0" not in made.float_layers
    assert made.error <= 1e-2


def test_a_network_whose_numbers_float16_does_not_have_is_judged_as_a_gpu_would_compute_it():
    """onnxruntime widens float16 on a CPU, where this network is without fault: 180,000 is beyond 65,504."""
    model, images = network(EYE * 600, np.full((3, 3), 100), EYE / 1000), [np.full((8, 8, 3), 255, np.uint8)]
    widened = run_of(half_from_fp32(model, "fp16"))(images[0])["logits"]
    np.testing.assert_allclose(widened, 180, rtol=1e-2)
    assert set(half_within(model, images, "fp16").float_layers) == {"w1", "w2"}
    assert half_within(model, images, "bf16").float_layers == ()


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_a_network_without_another_layer_is_refused(half):
    with pytest.raises(ParityError, match=f"leave {half} out"):
        half_within(network(LARGE_SUMS - 3000 + 0.1), pictures(), half, error=1e-6)
