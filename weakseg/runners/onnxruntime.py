"""ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.cpu import usable_cpus
from weakseg.errors import BundleError, ConfigError, DataError, ModelFailedError
from weakseg.manifest import INPUT

FOLDED_LIMIT_BYTES = 128 * 2**20  # per node; the largest weight of ResNet38d is 75 MB in float32


class OnnxRuntimeRunner:
    """One session per graph, all loaded at once. Thread-safe, as `InferenceSession.run` is.

    Args:
        graphs: {name: path of an ONNX file}.
        threads: for each execution; None = the cores that this process may use (onnxruntime itself would take all of
            the host's, also in a container that has two).
        provider: what must execute; another one is an error, never a silent fallback to the CPU.
        spin: threads wait busily for the next execution: a little faster alone, much slower beside others.
    Raises:
        ConfigError: onnxruntime or the provider is not there.
        BundleError: a graph that cannot be loaded.
    """

    def __init__(
        self,
        graphs: Mapping[str, Path],
        *,
        threads: int | None = None,
        provider: str = "CPUExecutionProvider",
        spin: bool = False,
    ) -> None:
        ort = _onnxruntime()
        if provider not in ort.get_available_providers():
            raise ConfigError(
                f"{provider} is not in this onnxruntime, which has {', '.join(ort.get_available_providers())}: "
                "install another build of it, such as onnxruntime-gpu"
            )
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1, got {threads}: leave it out to use all cores")
        self._provider = provider
        self.threads = usable_cpus() if threads is None else threads
        options = _session_options(ort, self.threads, spin)
        self._sessions = {name: _open(ort, path, options, provider) for name, path in graphs.items()}

    @property
    def provider(self) -> str:
        return self._provider

    def run(
        self, graph: str, images: NDArray[np.uint8], outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Outputs of one graph by name; arguments and errors as `Runner.run`."""
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or 0 in images.shape:
            raise DataError(f"images must be (B, H, W, 3) uint8, got {images.shape} {images.dtype}")
        if graph not in self._sessions:
            raise ConfigError(
                f"no graph {graph!r}: expected one of {', '.join(self._sessions) or 'none, it is closed'}"
            )
        session = self._sessions[graph]
        has = [output.name for output in session.get_outputs()]
        names = has if outputs is None else list(outputs)
        if not set(names) <= set(has):
            raise ConfigError(f"graph {graph} has the outputs {', '.join(has)}, got {', '.join(names)}")
        try:
            values = session.run(names, {INPUT: np.ascontiguousarray(images)})
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise ModelFailedError(f"graph {graph} failed on images {images.shape}: {error}") from error
        return dict(zip(names, values, strict=True))

    def close(self) -> None:
        self._sessions = {}


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError('onnxruntime is not installed: pip install "weakseg[serve]"') from error
    return onnxruntime


def _session_options(ort: Any, threads: int, spin: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors; its warnings are about its own optimiser
    # What is computed from constants alone is computed on loading: of a few hundred bytes, gigabytes. Known since 1.27.
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(FOLDED_LIMIT_BYTES))
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    return options


def _open(ort: Any, path: Path, options: Any, provider: str) -> Any:
    try:
        session = ort.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # as in `run`
        raise BundleError(f"onnxruntime cannot load {path}: {error}") from error
    if session.get_providers()[0] != provider:
        raise ConfigError(
            f"expected {path.name} to run on {provider}, got {session.get_providers()[0]}: check drivers and libraries"
        )
    return session
