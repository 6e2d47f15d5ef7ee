"""OpenVINO, on CPUs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.errors import BundleError, ConfigError, ModelFailedError
from weakseg.manifest import INPUT
from weakseg.runners.checks import checked_call, n_threads

TELEMETRY = "openvino_telemetry"


class OpenVinoRunner:
    """One compiled model per graph, all loaded at once, for any batch, height and width. Thread-safe.

    Each has one stream, which executes one call after the other with all threads: callers of the same graph wait for
    each other. More streams would copy a network's memory and share the same cores. OpenVINO computes all outputs of a
    graph; those that are not asked for are not copied.

    Args:
        graphs: {name: path of an ONNX file}.
        threads: for each execution; None = the cores that this process may use.
    Raises:
        ConfigError: OpenVINO is not installed. BundleError: a graph that cannot be loaded.
    """

    def __init__(self, graphs: Mapping[str, Path], *, threads: int | None = None) -> None:
        openvino = _openvino()
        self.threads = n_threads(threads)
        core = openvino.Core()
        compiled = {name: _compile(core, path, self.threads) for name, path in graphs.items()}
        devices = {device for model in compiled.values() for device in model.get_property("EXECUTION_DEVICES")}
        self._provider = f"OpenVINO {', '.join(sorted(devices))}"
        self._graphs = {name: _Graph.of(model) for name, model in compiled.items()}

    @property
    def provider(self) -> str:
        return self._provider

    def run(
        self, graph: str, images: NDArray[np.uint8], outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Outputs of one graph by name; arguments and errors as `Runner.run`."""
        called, names = checked_call(self._graphs, graph, images, outputs)
        with called.lock:
            try:
                called.request.infer({INPUT: np.ascontiguousarray(images)}, share_inputs=True, share_outputs=True)
                # Copies: the next call writes to the same memory.
                return {name: called.request.get_tensor(name).data.copy() for name in names}
            except Exception as error:  # OpenVINO's exceptions have no common base but Exception
                raise ModelFailedError(f"graph {graph} failed on images {images.shape}: {error}") from error

    def close(self) -> None:
        self._graphs = {}


@dataclass(frozen=True)
class _Graph:
    """The one request of a compiled model: who holds the lock may use it."""

    request: Any
    lock: Lock
    outputs: list[str]

    @classmethod
    def of(cls, model: Any) -> _Graph:
        return cls(model.create_infer_request(), Lock(), [port.any_name for port in model.outputs])


def _openvino() -> Any:
    """The package, imported without its telemetry: it would report each import to its makers over the network."""
    hidden = TELEMETRY not in sys.modules
    if hidden:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # its import fails, and openvino does without it
    try:
        import openvino
    except ImportError as error:
        raise ConfigError('OpenVINO is not installed: pip install "weakseg[openvino]"') from error
    finally:
        if hidden:
            del sys.modules[TELEMETRY]
    return openvino


def _compile(core: Any, path: Path, threads: int) -> Any:
    properties = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",  # its own choice is bfloat16 where the CPU has it, two digits
        "ENABLE_CPU_PINNING": False,  # threads tied to cores cannot make way for other processes
        # Compiled kernels, of some eight sizes of image. Its own 5,000 keep those of every size, 500 MiB after 200.
        "CPU_RUNTIME_CACHE_CAPACITY": 512,
    }
    try:
        return core.compile_model(str(path), "CPU", properties)
    except Exception as error:  # as in `run`
        raise BundleError(f"OpenVINO cannot load {path}: {error}") from error
