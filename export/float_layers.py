"""Which layers stay float32 when the others compute in fewer bits: the fewest that keep the outputs right."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from weakseg.cpu import usable_cpus
from weakseg.manifest import INPUT

Arrays = dict[str, NDArray[Any]]
Run = Callable[[NDArray[np.uint8]], Arrays]  # one image to outputs by name


@dataclass(frozen=True)
class Mixed:
    """A graph, the layers of it that stayed float, and how well it does; reached: at least the target."""

    data: bytes
    float_layers: tuple[str, ...]
    score: float
    reached: bool


def with_fewest_float_layers(
    layers: Sequence[str],
    make: Callable[[Collection[str]], bytes],
    judge: Callable[[bytes], float],
    harm: Callable[[bytes], float],
    target: float,
    start: Collection[str] = (),
) -> Mixed:
    """The graph with the fewest float layers, in the order of the harm that each does alone, that reaches a target.

    Args:
        layers: names of all. start: those that stay float in any case.
        make: the graph with these layers in float. judge: how good it is. harm: what is wrong with it.
    Returns:
        Not `reached` where that takes all layers; then the graph of the fewest.
    """
    floats = [layer for layer in layers if layer in start]
    first = _tried(make(floats), floats, judge, target)
    if first.reached:
        return first
    harms = {layer: harm(make([other for other in layers if other != layer])) for layer in layers}
    order = floats + sorted((layer for layer in layers if layer not in floats), key=lambda layer: -harms[layer])
    best = first
    low, high = len(floats), len(layers)  # the target is missed with `low` float layers; with `high` nothing is left
    while high - low > 1:
        middle = (low + high) // 2
        tried = _tried(make(order[:middle]), order[:middle], judge, target)
        low, high, best = (low, middle, tried) if tried.reached else (middle, high, best)
    return best


def output_error(got: Sequence[Arrays], expected: Sequence[Arrays]) -> float:
    """Squared error of float outputs, relative to their squares, summed over outputs and images; infinite for NaN.

    Args:
        got: of the first images, or of all.
    """
    error = sum(
        float(np.square(value - own[name]).sum() / (np.square(own[name]).sum() + 1e-12))
        for outputs, own in zip(got, expected, strict=False)
        for name, value in outputs.items()
        if value.dtype == np.float32
    )
    return np.inf if np.isnan(error) else error


def _tried(data: bytes, floats: Sequence[str], judge: Callable[[bytes], float], target: float) -> Mixed:
    score = judge(data)
    return Mixed(data, tuple(floats), score, score >= target)


def run_of(model: bytes, outputs: Sequence[str] | None = None) -> Run:
    """A serialised graph in onnxruntime. outputs: None = all that it has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    options.log_severity_level = 3  # errors; its warnings are about its own optimiser
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = list(outputs or (output.name for output in session.get_outputs()))
    return lambda image: dict(zip(names, session.run(names, {INPUT: image[None]}), strict=True))
