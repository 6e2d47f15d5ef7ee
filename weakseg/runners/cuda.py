"""The little of CUDA's runtime that a runner needs, by cuda-python's `cuda.bindings`; every failure is an exception.

A process uses its first visible GPU: choose it with CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.errors import ConfigError


class CudaError(Exception):
    """A call of CUDA failed; the text is CUDA's own."""


class Cuda:
    """The runtime's functions: `cuda.Malloc(n)` calls cudaMalloc(n), and returns what it gives besides its error code.

    Raises:
        ConfigError: cuda-python or a usable GPU is missing.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise ConfigError(
                f'cuda-bindings is not installed ({error}): pip install "cuda-bindings>=12.8", of the major version of '
                "CUDA that your driver supports"
            ) from error
        self.api: Any = runtime
        try:
            n_gpus = self.GetDeviceCount()
        except CudaError as error:
            raise ConfigError(f"expected an NVIDIA GPU, got none that works: {error}: check `nvidia-smi`") from error
        if not n_gpus:
            raise ConfigError("expected an NVIDIA GPU, got none: check `nvidia-smi` and CUDA_VISIBLE_DEVICES")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.api, f"cuda{name}")

        def call(*args: Any) -> Any:
            status, *values = function(*args)
            if status != self.api.cudaError_t.cudaSuccess:
                raise CudaError(f"cuda{name}: {self.api.cudaGetErrorString(status)[1].decode()}")
            return values[0] if len(values) == 1 else None

        return call

    def gpu(self) -> tuple[str, str]:
        """(name, compute capability) of the GPU, e.g. ("NVIDIA L4", "8.9")."""
        properties = self.GetDeviceProperties(0)
        return properties.name.split(b"\0")[0].decode(), f"{properties.major}.{properties.minor}"


class Memory:
    """Memory on the GPU (or page-locked on the host) that grows to the largest size that was asked for."""

    def __init__(self, allocate: Callable[[int], Any], release: Callable[[Any], Any]) -> None:
        self._allocate, self._release = allocate, release
        self.address = self.size = 0

    def grown(self, size: int) -> int:
        """Its address, with at least `size` bytes there; what it held is lost."""
        if size > self.size or not self.address:
            self.free()
            self.address = int(self._allocate(max(size, 1)))
            self.size = max(size, 1)
        return self.address

    def array(self, size: int) -> NDArray[np.uint8]:
        """A view of the first bytes of memory on the host, valid until it grows or is freed."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.grown(size)))

    def free(self) -> None:
        if self.address:
            self._release(self.address)
        self.address = self.size = 0


class Buffer:
    """Memory on the GPU and a page-locked copy on the host: copies to and from such memory need no detour."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.device = Memory(cuda.Malloc, cuda.Free)
        self.host = Memory(lambda size: cuda.HostAlloc(size, cuda.api.cudaHostAllocDefault), cuda.FreeHost)

    def upload(self, values: NDArray[Any], stream: Any) -> int:
        """Enqueue a copy to the GPU; its address there."""
        self.host.array(values.nbytes)[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        address = self.device.grown(values.nbytes)
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._cuda.MemcpyAsync(address, self.host.address, values.nbytes, kind, stream)
        return address

    def download(self, size: int, stream: Any) -> NDArray[np.uint8]:
        """Enqueue a copy from the GPU; the array holds it once the stream is synchronised, until the next use."""
        array = self.host.array(size)
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._cuda.MemcpyAsync(self.host.address, self.device.address, size, kind, stream)
        return array

    def free(self) -> None:
        self.device.free()
        self.host.free()
