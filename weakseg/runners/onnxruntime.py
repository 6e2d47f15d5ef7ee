"""ONNX Runtime: on the CPU, on NVIDIA GPUs by CUDA or by TensorRT.

The session options below are what `benchmarks/runtime.py` and `benchmarks/runtime_memory.py` found to be best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.errors import BundleError, ConfigError, ModelFailedError
from weakseg.manifest import INPUT
from weakseg.runners.checks import checked_call, n_threads

# Under our names, ONNX Runtime's and options. TF32 would leave three digits of fp32; the exhaustive search for
# convolution kernels, and an arena that doubles, are paid again with every new size of image.
Provider = tuple[str, dict[str, str]]
CPU: Provider = ("CPUExecutionProvider", {})
CUDA: Provider = (
    "CUDAExecutionProvider",
    {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"},
)
# Its engine cache stays off: its keys do not cover the weights, so that it would answer with a model of yesterday.
TENSORRT: Provider = ("TensorrtExecutionProvider", {})
PROVIDERS = {"cpu": (CPU,), "cuda": (CUDA, CPU), "tensorrt": (TENSORRT, CUDA, CPU)}  # each takes what one before cannot

FOLDED_LIMIT_BYTES = 128 * 2**20  # per node; the largest weight of ResNet38d is 75 MB in float32


class OnnxRuntimeRunner:
    """One session per graph, all loaded at once. Thread-safe, as `InferenceSession.run` is.

    ONNX Runtime computes all outputs of a graph; those that are not asked for are not copied.

    Args:
        graphs: {name: path of an ONNX file}.
        threads: for each execution; None = the cores that this process may use (onnxruntime itself would take all of
            the host's, also in a container that has two).
        provider: what must execute, of PROVIDERS; another one is an error, never a silent fallback to the CPU.
        spin: threads wait busily for the next execution: a little faster alone, much slower beside others.
    Raises:
        ConfigError: onnxruntime or the provider is not there.
        BundleError: a graph that cannot be loaded.
    """

    def __init__(
        self, graphs: Mapping[str, Path], *, threads: int | None = None, provider: str = "cpu", spin: bool = False
    ) -> None:
        ort = _onnxruntime()
        if provider not in PROVIDERS:
            raise ConfigError(f"unknown provider {provider!r} of onnxruntime: expected one of {', '.join(PROVIDERS)}")
        self._provider = PROVIDERS[provider][0][0]
        if self._provider not in ort.get_available_providers():
            raise ConfigError(
                f"{self._provider} is not in this onnxruntime, which has {', '.join(ort.get_available_providers())}: "
                'install onnxruntime-gpu instead, pip install "weakseg[gpu]"'
            )
        if provider != "cpu":
            ort.preload_dlls()  # CUDA and cuDNN of pip's nvidia packages, which are on no library path
        self._bind = provider != "cpu"
        self.threads = n_threads(threads)
        options = _session_options(ort, self.threads, spin)
        self._graphs = {name: _open(ort, path, options, provider) for name, path in graphs.items()}

    @property
    def provider(self) -> str:
        return self._provider

    def run(
        self, graph: str, images: NDArray[np.uint8], outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Outputs of one graph by name; arguments and errors as `Runner.run`."""
        called, names = checked_call(self._graphs, graph, images, outputs)
        execute = _run_bound if self._bind else _run
        try:
            values = execute(called.session, names, np.ascontiguousarray(images))
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise ModelFailedError(f"graph {graph} failed on images {images.shape}: {error}") from error
        return dict(zip(names, values, strict=True))

    def close(self) -> None:
        self._graphs = {}


@dataclass(frozen=True)
class _Graph:
    session: Any
    outputs: list[str]


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
    # A plan of one block of memory for each size of image: 4.5 % faster for a size that comes again, but every size
    # that was ever met keeps its plan, 12 KB of MobileNetV2: 6 MiB a minute in benchmarks/soak.py, without an end.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    return options


def _open(ort: Any, path: Path, options: Any, provider: str) -> _Graph:
    asked = PROVIDERS[provider]
    try:
        session = ort.InferenceSession(str(path), options, providers=list(asked))
    except Exception as error:  # as in `run`
        raise BundleError(f"onnxruntime cannot load {path}: {error}") from error
    if session.get_providers()[0] != asked[0][0]:
        raise ConfigError(
            f"expected {path.name} to run on {asked[0][0]}, got {session.get_providers()[0]}: "
            "check drivers and libraries"
        )
    return _Graph(session, [output.name for output in session.get_outputs()])


def _run(session: Any, names: Sequence[str], images: NDArray[np.uint8]) -> list[NDArray[Any]]:
    values: list[NDArray[Any]] = session.run(names, {INPUT: images})
    return values


def _run_bound(session: Any, names: Sequence[str], images: NDArray[np.uint8]) -> list[NDArray[Any]]:
    """The same by IO binding: images go to the device once, and only what is asked for comes back.

    On a CPU it gains nothing (benchmarks/runtime.py), so that it is for devices only.
    """
    binding = session.io_binding()
    binding.bind_cpu_input(INPUT, images)
    for name in names:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    values: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
    return values
