"""Tensors of the Open Inference Protocol, both ways: images of a request, arrays of a response.

Elements travel in one of two forms. Raw (tritonclient's): `raw_input_contents` and `raw_output_contents`, row-major and
little-endian; an element of type BYTES is its length in 4 bytes and then itself. Typed: `contents` of the tensor, in
the field of its type. Source: github.com/open-inference/open-inference-protocol, open_inference_grpc.proto; of the
length, tritonclient.utils `serialize_byte_tensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.inference import grpc_inference_service_pb2 as oip
from serve.job import Image
from serve.oip_requests import said, values_of
from weakseg.errors import ImageError, InvalidRequestError

INPUT = "image"
_DATATYPES = {
    "u1": ("UINT8", "uint_contents"),
    "u2": ("UINT16", "uint_contents"),
    "f4": ("FP32", "fp32_contents"),
    "f2": ("FP16", ""),  # no field: raw only
}
_STEP = 65536  # elements between two chances for other threads to run
_RAW = "raw_input_contents[0]"
_InputTensor = oip.ModelInferRequest.InferInputTensor


def images_from_request(
    message: oip.ModelInferRequest, max_batch: int, max_pixels: int
) -> Sequence[Image | Callable[[], Image]]:
    """The images of a batch, as jobs take them.

    Raises:
        InvalidRequestError: `field` is the path of what is wrong.
        ImageError: IMAGE_TOO_LARGE, pixels above `max_pixels` an image.
    """
    if len(message.inputs) != 1:
        raise InvalidRequestError(f"expected one input, {INPUT!r}, got {len(message.inputs)}", "inputs")
    tensor = message.inputs[0]
    if tensor.name != INPUT:
        raise InvalidRequestError(f"expected the input {INPUT!r}, got {said(tensor.name)}", "inputs[0].name")
    values_of(tensor.parameters, (), "inputs[0].parameters")
    raw = _raw(message)
    if tensor.datatype == "BYTES":
        return _files(tensor, raw, max_batch)
    if tensor.datatype == "UINT8":
        return _pixels(tensor, raw, max_batch, max_pixels)
    raise InvalidRequestError(
        f"expected BYTES (image files) or UINT8 (pixels), got {said(tensor.datatype)}", "inputs[0].datatype"
    )


def datatype_of(dtype: Any) -> str:
    """The protocol's name of a NumPy type that outputs have."""
    return _DATATYPES[np.dtype(dtype).str[1:]][0]


def add_output(
    response: oip.ModelInferResponse, name: str, array: NDArray[Any], *, raw: bool
) -> oip.ModelInferResponse.InferOutputTensor:
    """Append an array of uint8, uint16, float32 or (raw only) float16; all of a response raw, or none."""
    datatype, field = _DATATYPES[array.dtype.str[1:]]
    tensor = response.outputs.add(name=name, datatype=datatype, shape=array.shape)
    if raw:
        response.raw_output_contents.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    else:
        flat = array.reshape(-1)
        for at in range(0, flat.size, _STEP):
            getattr(tensor.contents, field).extend(flat[at : at + _STEP].tolist())
    return tensor


def _raw(message: oip.ModelInferRequest) -> bytes | None:
    n = len(message.raw_input_contents)
    if n == 0:
        return None
    if n != 1:
        raise InvalidRequestError(f"expected raw contents of one input, got {n}", "raw_input_contents")
    if message.inputs[0].contents.ListFields():
        raise InvalidRequestError(
            "expected raw_input_contents or contents, got both: leave contents empty", "inputs[0].contents"
        )
    return message.raw_input_contents[0]


def _files(tensor: _InputTensor, raw: bytes | None, max_batch: int) -> list[bytes]:
    """Shape (B,), or (B, 1) as models on Triton have it, whose configuration leaves the batch out."""
    shape = tensor.shape[:3]  # no more: it is the client's, of any length
    if len(shape) not in (1, 2) or shape[1:] not in ([], [1]):
        raise InvalidRequestError(f"expected the shape [B] of B image files, got {shape}", "inputs[0].shape")
    _check_batch(shape[0], max_batch)
    return _elements(raw, shape[0]) if raw is not None else list(_typed(tensor, "bytes_contents", shape[0]))


def _elements(raw: bytes, n: int) -> list[bytes]:
    elements: list[bytes] = []
    end = 0
    for i in range(n):
        start = end + 4
        end = start + int.from_bytes(raw[end:start], "little")
        if end > len(raw):
            raise InvalidRequestError(
                f"expected {n} elements, each after its length in 4 bytes, little-endian, got {len(raw)} bytes; "
                f"element {i} would end at {end}",
                _RAW,
            )
        elements.append(raw[start:end])
    if end != len(raw):
        raise InvalidRequestError(f"expected {n} elements that end at {end}, got {len(raw)} bytes", _RAW)
    return elements


def _pixels(
    tensor: _InputTensor, raw: bytes | None, max_batch: int, max_pixels: int
) -> Sequence[Image | Callable[[], Image]]:
    shape = tuple(tensor.shape[:5])
    if len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise InvalidRequestError(f"expected the shape [B, H, W, 3] of pixels, got {list(shape)}", "inputs[0].shape")
    batch, height, width, _ = shape
    _check_batch(batch, max_batch)
    if height * width > max_pixels:
        raise ImageError(
            f"expected at most {max_pixels} pixels, got {width}x{height}: scale the image down", "IMAGE_TOO_LARGE"
        )
    if raw is None:
        values = _typed(tensor, "uint_contents", prod(shape))
        return [partial(_pixels_from_uints, values, i, shape[1:]) for i in range(batch)]
    if len(raw) != prod(shape):
        raise InvalidRequestError(f"expected {' * '.join(map(str, shape))} = {prod(shape)} bytes, got {len(raw)}", _RAW)
    return list(np.frombuffer(raw, np.uint8).reshape(shape))


def _pixels_from_uints(values: Any, i: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Image i of the elements of a batch. In steps: each holds the interpreter for 1 ms, all may for 1 s."""
    start, size = i * prod(shape), prod(shape)
    try:
        steps = (bytes(values[at : min(at + _STEP, start + size)]) for at in range(start, start + size, _STEP))
        return np.frombuffer(b"".join(steps), np.uint8).reshape(shape)
    except ValueError:
        raise InvalidRequestError(
            "expected UINT8 elements from 0 to 255, got a larger one", "inputs[0].contents.uint_contents"
        ) from None


def _typed(tensor: _InputTensor, field: str, n: int) -> Any:
    """The elements of a tensor without raw contents, n of them in this field and none in others."""
    for other, _ in tensor.contents.ListFields():
        if other.name != field:
            raise InvalidRequestError(
                f"expected {tensor.datatype} elements in {field}, got {other.name}", f"inputs[0].contents.{other.name}"
            )
    values = getattr(tensor.contents, field)
    if len(values) != n:
        raise InvalidRequestError(
            f"expected {n} elements for the shape {list(tensor.shape)}, got {len(values)}: set raw_input_contents or "
            f"contents.{field}",
            f"inputs[0].contents.{field}",
        )
    return values


def _check_batch(n: int, max_batch: int) -> None:
    if not 1 <= n <= max_batch:
        raise InvalidRequestError(f"expected a batch of 1 to {max_batch} images, got {n}", "inputs[0].shape")
