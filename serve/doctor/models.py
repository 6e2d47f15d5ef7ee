"""What executes the networks, and the bundles themselves: each is opened, verified and run as a server would."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from serve.doctor.finding import Finding, failed, ok, warning
from serve.lifecycle import load_checked
from serve.repository import BundleFolder, find_bundles, find_labels, missing_versions
from serve.server import loader
from serve.settings import ServeConfig
from weakseg.bundle import read_signature
from weakseg.environment import gpus, package_version
from weakseg.errors import WeaksegError
from weakseg.runners.tensorrt import load_library

TO_A_CONTAINER = "give the container one: `docker run --gpus all`, in Kubernetes the limit nvidia.com/gpu: 1"


def gpu(config: ServeConfig) -> Finding:
    """Whether there is one where one is asked for, and none is idle where none is."""
    wanted = config.provider in ("cuda", "tensorrt") or config.runtime.startswith("tensorrt")
    count, driver = _cuda_driver()
    if count:
        found = f"{', '.join(gpus()) or f'{count} of NVIDIA'}, driver for CUDA {driver // 1000}.{driver % 1000 // 10}"
        if wanted:
            return ok("GPU", found)
        return warning(
            "GPU", f"{found}; networks run on the CPU", "set provider to cuda (extra `gpu` in place of `serve`)"
        )
    if not wanted:
        return ok("GPU", "none, and none is asked for")
    asked = f"asked for by {'provider' if config.provider else 'runtime'} {config.provider or config.runtime}"
    found = "a driver (libcuda.so.1) but no GPU" if driver else "no NVIDIA driver (libcuda.so.1)"
    return failed("GPU", f"{found}; {asked}", f"{TO_A_CONTAINER}; or set provider to cpu and runtime to onnxruntime")


def runtime(config: ServeConfig) -> Finding:
    """Whether the package is there and has the provider: one that is not is an error of every bundle."""
    name = config.runtime
    try:
        if name.startswith("tensorrt"):
            module = load_library("tensorrt" if name == "tensorrt" else "tensorrt_rtx")
            return ok("runtime", f"{name} {module.__version__}")
    except WeaksegError as error:
        return failed("runtime", f"{name} cannot be imported", str(error))
    if name != "onnxruntime":
        return ok("runtime", f"{name} {package_version(name) or 'is not installed'}")
    installed = {package: package_version(package) for package in ("onnxruntime", "onnxruntime-gpu")}
    if not any(installed.values()):
        return failed("runtime", "onnxruntime is not installed", "pip install 'weakseg[serve]', or [gpu] for NVIDIA's")
    import onnxruntime

    has = onnxruntime.get_available_providers()
    found = f"onnxruntime {onnxruntime.__version__} with {', '.join(has)}"
    if all(installed.values()):
        todo = "pip uninstall both, then install the one that is wanted: each overwrites files of the other"
        return failed("runtime", f"onnxruntime and onnxruntime-gpu are both installed; {found}", todo)
    needed = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}.get(config.provider or "cpu")
    if needed is not None and needed not in has:
        todo = "pip uninstall onnxruntime, then pip install 'weakseg[gpu]'; or set provider to cpu"
        return failed("runtime", f"{found}; provider {config.provider} needs {needed}", todo)
    return ok("runtime", found)


@contextmanager
def opened(config: ServeConfig) -> Iterator[list[Finding]]:
    """What there is to say about each bundle; those that can be loaded are until the block is left."""
    try:
        folders = find_bundles(config.bundle, config.models)
        labels = missing_versions(folders, find_labels(folders))
    except (WeaksegError, OSError) as error:
        yield [failed("models", str(error), "docs/bundle.md says what a bundle and a folder of them look like")]
        return
    with ExitStack() as stack:
        yield [
            *[_bundle(config, folder, stack) for folder in folders],
            *[failed(f"label {name}", what, "put it there, or change labels.toml") for name, what in labels.items()],
        ]


def _bundle(config: ServeConfig, folder: BundleFolder, stack: ExitStack) -> Finding:
    check = f"model {folder.name}/{folder.version}"
    try:
        model = stack.enter_context(load_checked(loader(config), folder.path))
    except WeaksegError as error:
        return failed(
            check, str(error), f"`weakseg bundle verify {folder.path}`; copy or export it again if it is damaged"
        )
    signed_by = model.bundle.signed_by
    signature = f"signed by {signed_by[:16]}" if signed_by else _unchecked(folder.path)
    return ok(check, f"verified, {signature}; {len(model.manifest.graphs)} graphs ran on {model.runner.provider}")


def _unchecked(folder: Path) -> str:
    return "no signature" if read_signature(folder) is None else "a signature that no public_key checks"


def _cuda_driver() -> tuple[int, int]:
    """(GPUs, version of CUDA that the driver has) by the driver's own library; zeros where there is none."""
    n, number = ctypes.c_int(0), ctypes.c_int(0)
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0, 0
    cuda.cuDriverGetVersion(ctypes.byref(number))
    if cuda.cuInit(0) == 0:  # else there is no device, or none that may be used
        cuda.cuDeviceGetCount(ctypes.byref(n))
    return n.value, number.value or 1
