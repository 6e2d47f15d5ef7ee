"""Would the random walk be faster inside an ONNX graph? `python -m benchmarks.random_walk_onnx`. It is not.

The walk as a Loop whose body adds up the map shifted to each neighbour, times that neighbour's transition weight,
against the sparse product of weakseg/random_walk.py: steps alone, three rows of scores, one thread, CPU seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.line import line
from benchmarks.measure import took_turns
from weakseg.random_walk import pair_offsets, random_walk, transition

RADIUS, BETA, STEPS, N_ROWS = 5, 8.0, 64, 3
SIZES = ((47, 63), (94, 125))
OPSET, IR_VERSION = 18, 9


def main() -> None:
    half = [(int(dy), int(dx)) for dy, dx in pair_offsets(RADIUS)]
    offsets = [(0, 0), *half, *((-dy, -dx) for dy, dx in half)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for height, width in SIZES:
        rng = np.random.default_rng(0)
        affinities = rng.uniform(0.5, 1, (len(half), height, width)).astype(np.float32)
        scores = rng.uniform(0, 1, (N_ROWS, height, width)).astype(np.float32)
        step = transition(affinities, RADIUS, BETA)
        graph = walk_graph(height, width, offsets)
        session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
        feeds = {"scores": scores, "weights": shifted_weights(step, offsets, height, width)}
        expected = random_walk(scores, affinities, radius=RADIUS, beta=BETA, steps=STEPS)
        np.testing.assert_allclose(session.run(None, feeds)[0], expected, atol=1e-5)
        rows = np.ascontiguousarray(scores.reshape(N_ROWS, -1).T)
        in_graph, sparse = took_turns(partial(session.run, None, feeds), partial(walked, step, rows))
        line(f"random_walk.onnx.{height}x{width}", in_graph, sparse, unit="s", cost=True)


def walked(step: object, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    for _ in range(STEPS):
        rows = step @ rows  # type: ignore[operator]
    return rows


def shifted_weights(step: object, offsets: Sequence[tuple[int, int]], height: int, width: int) -> NDArray[np.float32]:
    """(69, h, w): what each cell receives of the neighbour at each offset."""
    entries = step.tocoo()  # type: ignore[attr-defined]
    number = np.full((2 * RADIUS, 2 * RADIUS), -1)
    for i, (dy, dx) in enumerate(offsets):
        number[dy, dx] = i  # negative ones from the end
    weights = np.zeros((len(offsets), height, width), np.float32)
    y, x = entries.row // width, entries.row % width
    weights[number[entries.col // width - y, entries.col % width - x], y, x] = entries.data
    return weights


def walk_graph(height: int, width: int, offsets: Sequence[tuple[int, int]]) -> onnx.ModelProto:
    """scores (3, h, w), weights (69, h, w) -> walked (3, h, w)."""
    reach = RADIUS - 1
    constants = {
        "axes": np.array([1, 2]),
        "pads": np.array([0, reach, reach, 0, reach, reach]),
        "steps": np.array(STEPS),
        "go_on": np.array(True),
    }
    body = [helper.make_node("Pad", ["x", "pads"], ["padded"])]
    for i, (dy, dx) in enumerate(offsets):
        constants[f"start{i}"] = np.array([reach + dy, reach + dx])
        constants[f"end{i}"] = np.array([reach + dy + height, reach + dx + width])
        body.append(helper.make_node("Slice", ["padded", f"start{i}", f"end{i}", "axes"], [f"shifted{i}"]))
        body.append(helper.make_node("Mul", [f"shifted{i}", f"weight{i}"], [f"term{i}"]))
    body.append(helper.make_node("Sum", [f"term{i}" for i in range(len(offsets))], ["y"]))
    body.append(helper.make_node("Identity", ["condition"], ["still"]))

    def tensor(name: str, kind: int, shape: Sequence[int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    maps = [N_ROWS, height, width]
    inside = helper.make_graph(
        body,
        "step",
        [tensor("i", TensorProto.INT64, []), tensor("condition", TensorProto.BOOL, []), tensor("x", 1, maps)],
        [tensor("still", TensorProto.BOOL, []), tensor("y", 1, maps)],
    )
    names = [f"weight{i}" for i in range(len(offsets))]
    nodes = [
        helper.make_node("Split", ["weights"], names, axis=0, num_outputs=len(offsets)),
        helper.make_node("Loop", ["steps", "go_on", "scores"], ["walked"], body=inside),
    ]
    graph = helper.make_graph(
        nodes,
        "walk",
        [tensor("scores", 1, maps), tensor("weights", 1, [len(offsets), height, width])],
        [tensor("walked", 1, maps)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION  # what onnxruntime reads may be older than what onnx writes
    return model


if __name__ == "__main__":
    main()
