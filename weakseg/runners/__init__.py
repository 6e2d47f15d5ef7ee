"""Runtimes that execute a bundle's graphs, behind one protocol. Heavy imports stay inside each runner's module."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Runner(Protocol):
    """Executes the graphs of one bundle. Thread-safe: `run` may be called from several threads at once."""

    @property
    def provider(self) -> str:
        """What really executes, e.g. `CPUExecutionProvider`; never what was merely asked for."""
        ...

    def run(self, graph: str, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Outputs of one graph by name.

        Args:
            graph: a name in the manifest's `graphs`, e.g. `segmentation`.
            images: (B, H, W, 3) uint8 RGB, all of one size.
        """
        ...

    def close(self) -> None: ...


def open_runner(graphs: dict[str, Path], *, runtime: str = "onnxruntime", threads: int | None = None) -> Runner:
    """The runner of a runtime over graph files (already verified). `threads` None = what this process may use."""
    from weakseg.errors import ConfigError

    if runtime == "onnxruntime":
        from weakseg.runners.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(graphs, threads=threads)
    raise ConfigError(f"unknown runtime {runtime!r}: expected onnxruntime")
