"""A graph's ONNX file to a TensorRT engine, which computes in the types of the file: fp16 and INT8 graphs are files.

TensorRT 10 can also be told to choose types by itself (builder flags FP16, BF16, INT8); 11 and RTX cannot, and compute
what the graph says ("strongly typed"). All are asked for the latter here: so an engine has the precision of its graph,
which the export has proven, on every GPU and in every version. An INT8 graph has QuantizeLinear and DequantizeLinear
around what is quantised.
https://docs.nvidia.com/deeplearning/tensorrt/latest/api/migration/tensorrt-10x-to-11x.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.dense_labels import dense_labels
from export.symmetric_int8 import symmetric_int8
from weakseg.engines import Platform, Profile
from weakseg.errors import ConfigError, WeaksegError
from weakseg.files import write_bytes_atomic
from weakseg.manifest import INPUT
from weakseg.preprocess import InputPolicy
from weakseg.runners.tensorrt import engine_log


def profile_from_policy(policy: InputPolicy, max_batch: int, typical: tuple[int, int] | None = None) -> Profile:
    """The shapes that a model may meet under its input policy: 1 x 1 to max_side x max_side, 1 to max_batch images.

    Args:
        typical: (height, width) to be fastest at; None = a 4 : 3 photograph that fills max_side, on the stride's grid.
    Raises:
        ConfigError: max_batch < 1, or the typical size is not one that the model takes.
    """
    side = policy.max_side
    height, width = typical or (min(side, -(-side * 3 // 4 // policy.stride) * policy.stride), side)
    if max_batch < 1 or not (1 <= height <= side and 1 <= width <= side):
        raise ConfigError(
            f"expected a batch of at least 1 and a typical size within {side} x {side}, got {max_batch} and "
            f"{height} x {width}: change them, or the model's max_side"
        )
    return Profile((1, 1, 1, 3), (max_batch, height, width, 3), (max_batch, side, side, 3))


def engine_from_onnx(
    trt: Any, graph: str, data: bytes, profile: Profile, platform: Platform, timing_cache: Path | None = None
) -> bytes:
    """Build an engine; minutes with TensorRT, which times its kernels on this GPU, seconds with TensorRT-RTX.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        graph: name, for messages.
        data: the ONNX file, with its weights inside.
        platform: what it is for. TensorRT builds for the GPU that is here; RTX for any, also where there is none.
        timing_cache: a file of kernels' times that makes the next build faster; written afterwards.
    Raises:
        WeaksegError: TensorRT does not take the graph, or finds no kernels for it.
    """
    log = engine_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))  # 11 ignores it
    parser = trt.OnnxParser(network, log)
    if not parser.parse(symmetric_int8(dense_labels(data))):
        why = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)) or log.last
        raise WeaksegError(f"graph {graph} is not one that {platform.library} {platform.version} takes: {why}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; 10 bits of mantissa are not fp32
    # Without it, memory for the largest images is taken whatever their size is.
    config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    shapes = builder.create_optimization_profile()
    shapes.set_shape(INPUT, profile.smallest, profile.typical, profile.largest)
    config.add_optimization_profile(shapes)
    if platform.library == "tensorrt_rtx":
        _build_for(trt, config, platform.compute_capability)
    elif timing_cache is not None:
        _use_timing_cache(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise WeaksegError(f"no engine of graph {graph} can be built for {platform}: {log.last}")
    if timing_cache is not None and (times := config.get_timing_cache()) is not None:
        write_bytes_atomic(timing_cache, bytes(times.serialize()))
    return bytes(plan)


def _build_for(trt: Any, config: Any, compute_capability: str) -> None:
    name = f"SM{compute_capability.replace('.', '')}"
    known = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    if name not in known:
        raise ConfigError(f"tensorrt_rtx builds for {', '.join(known)}, got {name}: use --target tensorrt on this GPU")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)


def _use_timing_cache(config: Any, file: Path) -> None:
    """The file's times where they are of this GPU and version, which TensorRT checks; or none."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        data = b""
    for times in (data, b""):
        if config.set_timing_cache(config.create_timing_cache(times), ignore_mismatch=False):
            return
