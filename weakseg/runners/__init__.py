"""Runtimes that execute a bundle's graphs, behind one protocol. Heavy imports stay inside each runner's module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from weakseg.errors import ConfigError

RUNTIMES = ("onnxruntime", "tensorrt", "tensorrt-rtx")


@runtime_checkable
class Runner(Protocol):
    """Executes the graphs of one bundle. Thread-safe: `run` may be called from several threads at once."""

    @property
    def provider(self) -> str:
        """What really executes, e.g. `CPUExecutionProvider`; never what was merely asked for."""
        ...

    def run(
        self, graph: str, images: NDArray[np.uint8], outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Outputs of one graph by name; float32, `labels` unsigned integers.

        Args:
            graph: a name in the manifest's `graphs`, e.g. `segmentation`.
            images: (B, H, W, 3) uint8 RGB, all of one size.
            outputs: names of those wanted; others are not copied out, and not computed where the runtime can leave them
                out. None = all.
        Raises:
            DataError: images of another shape or type. ConfigError: no such graph or output.
            ModelFailedError: the runtime gave up, for want of memory say.
        """
        ...

    def close(self) -> None: ...


def open_runner(graphs: Mapping[str, Path], *, runtime: str = "onnxruntime", threads: int | None = None) -> Runner:
    """The runner of a runtime over graph files (already verified). `threads` None = what this process may use."""
    if runtime == "onnxruntime":
        from weakseg.runners.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(graphs, threads=threads)
    if runtime in ("tensorrt", "tensorrt-rtx"):
        from weakseg.runners.tensorrt import open_engines

        return open_engines(graphs, "tensorrt" if runtime == "tensorrt" else "tensorrt_rtx")
    raise ConfigError(f"unknown runtime {runtime!r}: expected one of {', '.join(RUNTIMES)}")
