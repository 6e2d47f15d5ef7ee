"""TensorRT, and TensorRT-RTX, whose Python API is the same. Written against versions 10 and 11, and RTX 1."""

from __future__ import annotations

import importlib
import logging
import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from weakseg.engines import Platform, cache_folder, read_engine
from weakseg.errors import BundleError, ConfigError, DataError, ModelFailedError
from weakseg.manifest import INPUT
from weakseg.runners.checks import checked_call
from weakseg.runners.cuda import Buffer, Cuda, CudaError, Memory

Library = Literal["tensorrt", "tensorrt_rtx"]
LOGGER = logging.getLogger("weakseg.tensorrt")
LANES = 2  # executions at a time: one copies while the other computes


def load_library(name: Library) -> Any:
    """The module. Raises ConfigError when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = name.replace("_", "-")
        raise ConfigError(f'{extra} is not installed ({error}): pip install "weakseg[{extra}]"') from error


def this_platform(trt: Any, cuda: Cuda) -> Platform:
    """What engines must be built for to run in this process."""
    gpu, compute_capability = cuda.gpu()
    return Platform(trt.__name__, trt.__version__, gpu, compute_capability)


def open_engines(graphs: Mapping[str, Path], library: Library = "tensorrt") -> TensorRtRunner:
    """A runner over the engines that were built of graph files, from the cache.

    Raises:
        ConfigError: a library, a GPU or an engine is missing. BundleError: an engine is damaged.
    """
    platform = this_platform(load_library(library), Cuda())
    cache = cache_folder()
    return TensorRtRunner({name: read_engine(cache, name, path, platform)[1] for name, path in graphs.items()}, library)


class TensorRtRunner:
    """Engines on the first visible GPU, all loaded at once. Thread-safe: an execution has a lane for itself.

    Weights are on the GPU once. A lane has a stream, and memory that grows to the largest images that went through it.

    Args:
        plans: {graph: bytes of its engine}, trusted: they are code.
    Raises:
        ConfigError: the library or a GPU is missing. BundleError: an engine cannot be loaded.
    """

    def __init__(self, plans: Mapping[str, bytes], library: Library = "tensorrt", *, lanes: int = LANES) -> None:
        trt = load_library(library)
        cuda = Cuda()
        self._provider = f"{library} {trt.__version__}"
        self._log = engine_log(trt)
        self._runtime = trt.Runtime(self._log)
        self._engines = {name: self._load(trt, name, plan) for name, plan in plans.items()}
        self._lanes: queue.LifoQueue[_Lane | None] = queue.LifoQueue()  # None: closed
        self._n_lanes = lanes
        for _ in range(lanes):
            self._lanes.put(_Lane(trt, cuda, self._engines, self._log))

    @property
    def provider(self) -> str:
        return self._provider

    def run(
        self, graph: str, images: NDArray[np.uint8], outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Outputs of one graph by name; arguments and errors as `Runner.run`, and

        DataError: images larger than the engine was built for. Larger batches are taken in pieces.
        """
        engine, names = checked_call(self._engines, graph, images, outputs)
        max_batch, max_height, max_width = engine.largest[:3]
        if images.shape[1] > max_height or images.shape[2] > max_width:
            raise DataError(
                f"the engine of graph {graph} takes images of at most {max_height} x {max_width}, got "
                f"{images.shape[1]} x {images.shape[2]}: scale them down, or export with a larger --max-side"
            )
        parts = [images[i : i + max_batch] for i in range(0, len(images), max_batch)]
        with self._lane() as lane:
            try:
                done = [lane.run(graph, part, names) for part in parts]
            except (CudaError, RuntimeError) as error:
                raise ModelFailedError(f"graph {graph} failed on images {images.shape}: {error}") from error
        return {
            name: np.concatenate([part[name] for part in done]) if len(done) > 1 else done[0][name] for name in names
        }

    def close(self) -> None:
        """Waits for what is running; frees the GPU's memory."""
        if not self._engines:
            return
        self._engines = {}
        for _ in range(self._n_lanes):
            lane = self._lanes.get()
            assert lane is not None
            lane.free()
        self._lanes.put(None)

    @contextmanager
    def _lane(self) -> Iterator[_Lane]:
        lane = self._lanes.get()
        try:
            if lane is None:
                raise ConfigError("this runner is closed")
            yield lane
        finally:
            self._lanes.put(lane)

    def _load(self, trt: Any, name: str, plan: bytes) -> _Engine:
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BundleError(f"the engine of graph {name} cannot be loaded: {self._log.last}: build it again")
        tensors = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        outputs = {t: trt.nptype(engine.get_tensor_dtype(t)) for t in tensors if t != INPUT}
        return _Engine(engine, outputs, tuple(engine.get_tensor_profile_shape(INPUT, 0)[2]))


@dataclass(frozen=True)
class _Engine:
    """engine: ICudaEngine. outputs: {name: NumPy type}. largest: shape of `images`."""

    engine: Any
    outputs: dict[str, Any]
    largest: tuple[int, ...]


class _Lane:
    """What one execution needs for itself: a stream, an execution context of each engine, memory."""

    def __init__(self, trt: Any, cuda: Cuda, engines: Mapping[str, _Engine], log: Any) -> None:
        self._cuda, self._log = cuda, log
        self._engines = dict(engines)
        # Without its own memory a context takes none for images of the largest size, only what a call needs.
        own = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._contexts = {name: engine.engine.create_execution_context(own) for name, engine in engines.items()}
        for name, context in self._contexts.items():
            if context is None:
                raise ConfigError(f"the engine of graph {name} cannot be started on this GPU: {log.last}")
        self._stream = cuda.StreamCreateWithFlags(cuda.api.cudaStreamNonBlocking)
        self._scratch = Memory(cuda.Malloc, cuda.Free)
        self._buffers: dict[str, Buffer] = {}

    def run(self, graph: str, images: NDArray[np.uint8], names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Raises CudaError or RuntimeError."""
        context, kinds = self._contexts[graph], self._engines[graph].outputs
        self._expect(context.set_input_shape(INPUT, images.shape))
        self._expect(context.set_tensor_address(INPUT, self._buffer(INPUT).upload(images, self._stream)))
        shapes = {name: tuple(context.get_tensor_shape(name)) for name in kinds}
        self._expect(all(side >= 0 for shape in shapes.values() for side in shape))
        sizes = {name: int(np.prod(shapes[name])) * np.dtype(kind).itemsize for name, kind in kinds.items()}
        for name, size in sizes.items():
            self._expect(context.set_tensor_address(name, self._buffer(name).device.grown(size)))
        need = context.update_device_memory_size_for_shapes()
        context.set_device_memory(self._scratch.grown(need), self._scratch.size)
        self._expect(context.execute_async_v3(int(self._stream)))
        raw = {name: self._buffer(name).download(sizes[name], self._stream) for name in names}
        self._cuda.StreamSynchronize(self._stream)
        return {name: _own(raw[name].view(kinds[name]).reshape(shapes[name])) for name in names}

    def free(self) -> None:
        self._contexts, self._engines = {}, {}
        self._scratch.free()
        for buffer in self._buffers.values():
            buffer.free()
        self._cuda.StreamDestroy(self._stream)

    def _expect(self, done: bool) -> None:
        if not done:
            raise RuntimeError(self._log.last)

    def _buffer(self, name: str) -> Buffer:
        if name not in self._buffers:
            self._buffers[name] = Buffer(self._cuda)
        return self._buffers[name]


def _own(values: NDArray[Any]) -> NDArray[Any]:
    """A copy; labels of more than 254 classes leave an engine as int32, as TensorRT has no uint16."""
    return values.astype(np.uint16 if values.dtype == np.int32 else values.dtype)


def engine_log(trt: Any) -> Any:
    """An ILogger into Python's logging that keeps the last error: TensorRT's calls return None or False and log why."""
    kinds = trt.ILogger.Severity
    levels = {kinds.INTERNAL_ERROR: logging.ERROR, kinds.ERROR: logging.ERROR, kinds.WARNING: logging.WARNING}

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "TensorRT does not say why"

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                self.last = msg
            LOGGER.log(level, "%s", msg)

    return Log()
