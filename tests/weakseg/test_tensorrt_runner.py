# ruff: noqa: N801, N802, N815
"""The TensorRT runner around a pretended GPU: host memory for the GPU's, the mean of each image for the engine.

It proves what the runner does with addresses, sizes, pieces of batches, threads and errors, and that it makes
TensorRT's calls in an order that works. It does not prove that TensorRT means by them what is meant here:
tests/export/test_tensorrt.py builds real engines where tensorrt-rtx is installed, and runs them where there is a GPU.
"""

import ctypes
import enum
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from weakseg.engines import EngineRecord, Platform, Profile, write_engine
from weakseg.errors import BundleError, ConfigError, DataError, ModelFailedError
from weakseg.runners import Runner, open_runner
from weakseg.runners.tensorrt import TensorRtRunner

LARGEST = (4, 32, 48, 3)
PLAN = b"plan"


class PretendedCuda:
    """`cuda.bindings.runtime` over host memory. `limit` bytes can be taken at once."""

    class cudaError_t(enum.IntEnum):
        cudaSuccess = 0
        cudaErrorMemoryAllocation = 2

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaHostAllocDefault, cudaStreamNonBlocking = 0, 1
    OK = (cudaError_t.cudaSuccess,)

    def __init__(self):
        self.blocks, self.streams, self.limit, self.n_gpus = {}, set(), 2**30, 1

    def cudaGetErrorString(self, status):
        return (*self.OK, b"out of memory")

    def cudaGetDeviceCount(self):
        return (*self.OK, self.n_gpus)

    def cudaGetDeviceProperties(self, device):
        return (*self.OK, SimpleNamespace(name=b"NVIDIA L4\0\0", major=8, minor=9))

    def cudaMalloc(self, size):
        if size + sum(map(len, self.blocks.values())) > self.limit:
            return self.cudaError_t.cudaErrorMemoryAllocation, None
        block = ctypes.create_string_buffer(size)
        self.blocks[ctypes.addressof(block)] = block
        return (*self.OK, ctypes.addressof(block))

    def cudaFree(self, address):
        del self.blocks[address]
        return self.OK

    def cudaHostAlloc(self, size, flags):
        return self.cudaMalloc(size)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        for address in (target, source):
            assert size <= len(self.blocks[address])
        ctypes.memmove(target, source, size)
        return self.OK

    def cudaStreamCreateWithFlags(self, flags):
        self.streams.add(len(self.streams) + 1)
        return (*self.OK, len(self.streams))

    def cudaStreamSynchronize(self, stream):
        return self.OK

    def cudaStreamDestroy(self, stream):
        self.streams.remove(stream)
        return self.OK


class PretendedContext:
    """Writes each image's mean into `mean` (B,) float32, and the image's red into `labels` (B, H, W) uint8."""

    def __init__(self, trt, log):
        self.trt, self.log, self.at, self.busy = trt, log, {}, threading.Lock()

    def set_input_shape(self, name, shape):
        self.shape = shape
        return True

    def set_tensor_address(self, name, address):
        self.at[name] = address
        return True

    def get_tensor_shape(self, name):
        return {"mean": self.shape[:1], "labels": self.shape[:3]}[name]

    def update_device_memory_size_for_shapes(self):
        return 0

    def set_device_memory(self, address, size):
        assert self.trt.cuda.blocks[address] and size > 0

    def execute_async_v3(self, stream):
        assert self.busy.acquire(blocking=False), "two executions in one context"
        try:
            if self.trt.broken:
                self.log.log(self.trt.ILogger.Severity.ERROR, "illegal memory access")
                return False
            size = int(np.prod(self.shape))
            image = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.at["images"])).reshape(self.shape)
            mean = (ctypes.c_float * len(image)).from_address(self.at["mean"])
            mean[:] = image.mean(axis=(1, 2, 3)).tolist()
            red = np.ascontiguousarray(image[..., 0])
            ctypes.memmove(self.at["labels"], red.ctypes.data, red.nbytes)
            return True
        finally:
            self.busy.release()


@pytest.fixture
def trt(monkeypatch):
    """`tensorrt` and `cuda.bindings.runtime`, pretended."""
    cuda = PretendedCuda()

    class ILogger:
        Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])

    class Runtime:
        def __init__(self, log):
            self.log = log

        def deserialize_cuda_engine(self, plan):
            if plan != PLAN:
                self.log.log(ILogger.Severity.ERROR, "the version does not match")
                return None
            names = ["images", "mean", "labels"]
            kinds = {"mean": np.float32, "labels": np.uint8}
            return SimpleNamespace(
                num_io_tensors=3,
                get_tensor_name=names.__getitem__,
                get_tensor_dtype=kinds.__getitem__,
                get_tensor_profile_shape=lambda name, profile: [(1, 1, 1, 3), LARGEST, LARGEST],
                create_execution_context=lambda strategy: PretendedContext(module, self.log),
            )

    module = SimpleNamespace(
        __name__="tensorrt",
        __version__="11.4.0.106",
        ILogger=ILogger,
        Runtime=Runtime,
        nptype=lambda kind: kind,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2),
        cuda=cuda,
        broken=False,
    )
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(bindings=SimpleNamespace(runtime=cuda)))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=cuda))
    return module


@pytest.fixture
def runner(trt):
    made = TensorRtRunner({"toy": PLAN})
    yield made
    made.close()


def images(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("n", [1, 4, 5, 9])
@pytest.mark.parametrize("size", [(1, 1), (32, 48), (7, 48)])
def test_outputs_of_batches_larger_than_the_engines(runner, n, size):
    batch = images(n, *size)
    out = runner.run("toy", batch)
    assert list(out) == ["mean", "labels"]
    np.testing.assert_allclose(out["mean"], batch.mean(axis=(1, 2, 3)), rtol=1e-6)
    np.testing.assert_array_equal(out["labels"], batch[..., 0])


def test_it_is_a_runner_that_says_what_it_is(runner):
    assert isinstance(runner, Runner)
    assert runner.provider == "tensorrt 11.4.0.106"


def test_results_are_the_callers_own(runner):
    first, second = images(1, 8, 8), 255 - images(1, 8, 8)
    kept = runner.run("toy", first)["labels"]
    runner.run("toy", second)
    np.testing.assert_array_equal(kept, first[..., 0])


def test_only_the_outputs_that_are_asked_for(runner):
    assert list(runner.run("toy", images(1, 4, 4), ["labels"])) == ["labels"]
    with pytest.raises(ConfigError, match="graph toy has the outputs mean, labels, got cam"):
        runner.run("toy", images(1, 4, 4), ["cam"])


def test_strided_images_are_taken(runner):
    batch = images(2, 8, 16)[:, :, ::2]
    np.testing.assert_array_equal(runner.run("toy", batch)["labels"], batch[..., 0])


def test_threads_share_a_runner(runner):
    batch = images(64, 16, 16)
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda image: runner.run("toy", image[None])["labels"][0], batch))
    np.testing.assert_array_equal(np.stack(parallel), batch[..., 0])


@pytest.mark.parametrize("size", [(33, 48), (32, 49)])
def test_images_beyond_the_profile(runner, size):
    with pytest.raises(DataError, match=f"at most 32 x 48, got {size[0]} x {size[1]}: scale them down"):
        runner.run("toy", images(1, *size))


@pytest.mark.parametrize("bad", [images(4, 4), images(1, 4, 4).astype(np.float32), images(0, 4, 4)])
def test_other_images_are_refused(runner, bad):
    with pytest.raises(DataError, match=r"\(B, H, W, 3\) uint8"):
        runner.run("toy", bad)


def test_closing_gives_everything_back(trt):
    runner = TensorRtRunner({"toy": PLAN})
    runner.run("toy", images(1, 4, 4))
    assert trt.cuda.blocks and trt.cuda.streams
    runner.close()
    runner.close()
    assert not trt.cuda.blocks and not trt.cuda.streams
    with pytest.raises(ConfigError, match="it is closed"):
        runner.run("toy", images(1, 4, 4))


def test_an_execution_that_fails_leaves_the_runner_whole(runner, trt):
    trt.broken = True
    with pytest.raises(ModelFailedError, match=r"graph toy failed on images \(1, 4, 4, 3\): illegal memory access"):
        runner.run("toy", images(1, 4, 4))
    trt.broken = False
    assert runner.run("toy", images(1, 4, 4))["mean"].shape == (1,)


def test_too_little_memory_for_large_images_only(runner, trt):
    runner.run("toy", images(1, 4, 4))
    trt.cuda.limit = 4000
    with pytest.raises(ModelFailedError, match="cudaMalloc: out of memory|cudaHostAlloc: out of memory"):
        runner.run("toy", images(4, 32, 48))
    assert runner.run("toy", images(1, 4, 4))["mean"].shape == (1,)


def test_an_engine_that_tensorrt_refuses(trt):
    with pytest.raises(BundleError, match="engine of graph toy cannot be loaded: the version does not match: build it"):
        TensorRtRunner({"toy": b"of another version"})


def test_engines_come_from_the_cache(trt, tmp_path, monkeypatch):
    graph = tmp_path / "classifier.onnx"
    graph.write_bytes(b"a graph")
    monkeypatch.setenv("WEAKSEG_ENGINE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="no engine of graph classifier .* for NVIDIA L4 .compute capability 8.9"):
        open_runner({"classifier": graph}, runtime="tensorrt")
    digest = "0c1a6fd3b6b6b2fd5e0d2cb7bd5e1d5ef6ac6d7e0a4fcb4f7a8e1ce0f1a8e8a4"
    profile = Profile((1, 1, 1, 3), LARGEST, LARGEST)
    here = Platform("tensorrt", "11.4.0.106", "NVIDIA L4", "8.9")
    write_engine(tmp_path / "cache", graph, EngineRecord("m/1", "classifier", "fp32", here, profile, digest, {}), PLAN)
    with pytest.raises(BundleError, match="is not the engine that was built"):
        open_runner({"classifier": graph}, runtime="tensorrt")


def test_no_gpu(trt):
    trt.cuda.n_gpus = 0
    with pytest.raises(ConfigError, match="expected an NVIDIA GPU, got none: check `nvidia-smi`"):
        TensorRtRunner({"toy": PLAN})


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_without_the_library(monkeypatch, tmp_path, runtime):
    monkeypatch.setitem(sys.modules, runtime.replace("-", "_"), None)
    with pytest.raises(ConfigError) as caught:
        open_runner({"classifier": tmp_path / "classifier.onnx"}, runtime=runtime)
    assert str(caught.value).startswith(f"{runtime} is not installed (")
    assert str(caught.value).endswith(f'): pip install "weakseg[{runtime}]"')


def test_without_cudas_bindings(trt, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ConfigError, match='cuda-bindings is not installed .*: pip install "cuda-bindings>=12.8"'):
        TensorRtRunner({"toy": PLAN})
