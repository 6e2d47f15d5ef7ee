"""Runtimes that execute a bundle's graphs, behind one protocol. Heavy imports stay inside each runner's module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from weakseg.errors import ConfigError

RUNTIMES = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")


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


def open_runner(
    graphs: Mapping[str, Path], *, runtime: str = "onnxruntime", provider: str | None = None, threads: int | None = None
) -> Runner:
    """The runner of a runtime over graph files (already verified).

    Args:
        provider: what executes, where a runtime can choose: onnxruntime's cpu, cuda or tensorrt; None = its own choice,
            the CPU.
        threads: None = what this process may use.
    Raises:
        ConfigError: an unknown runtime or provider, or one that is not installed. BundleError: a graph is refused.
    """
    if runtime == "onnxruntime":
        from weakseg.runners.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(graphs, threads=threads, provider=provider or "cpu")
    if provider is not None:
        raise ConfigError(f"provider is onnxruntime's, got {provider!r} for the runtime {runtime}: leave it out")
    if runtime == "openvino":
        from weakseg.runners.openvino import OpenVinoRunner

        return OpenVinoRunner(graphs, threads=threads)
    if runtime in ("tensorrt", "tensorrt-rtx"):
        from weakseg.runners.tensorrt import open_engines

        return open_engines(graphs, "tensorrt" if runtime == "tensorrt" else "tensorrt_rtx")
    raise ConfigError(f"unknown runtime {runtime!r}: expected one of {', '.join(RUNTIMES)}")
