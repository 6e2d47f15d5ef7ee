"""MXNet's `.params` files without MXNet, and the names that ResNet-38's published one uses.

The file (MXNet `src/ndarray/ndarray.cc`, little endian): u64 0x112, u64 reserved, u64 count, the arrays, u64 count, the
names as u64 length and bytes. An array: u32 version, [i32 storage], u32 ndim, dims, i32 device type, i32 device, i32
dtype, data. Without a version the first word is ndim already, and dims are u32 instead of i64.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weakseg.errors import WeightsError

LIST_MAGIC = 0x112
V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
DENSE, MAX_NDIM = 0, 32
DTYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "u1", 4: "<i4", 5: "i1", 6: "<i8"}

BATCH_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}
LAYER = re.compile(
    r"(?P<kind>res|bn)(?P<level>\d)(?:a|b(?P<block>\d+))_(?P<branch>branch\w+?)_(?P<what>weight|gamma|beta|moving_\w+)"
)


def read_params(path: Path) -> dict[str, NDArray[Any]]:
    """Arrays by name, as the file has them (`arg:conv1a_weight`); views of the mapped file, not in memory.

    Raises:
        WeightsError: not such a file, damaged, or with sparse arrays; says where.
    """
    if not path.is_file():
        raise WeightsError(f"no weights file {path}")
    if path.stat().st_size == 0:
        raise WeightsError(f"{path} is empty")
    cursor = _Cursor(path, np.memmap(path, np.uint8, "r"))
    magic, _ = cursor.read("<QQ")
    if magic != LIST_MAGIC:
        raise WeightsError(f"{path} is not an MXNet .params file: expected 0x112 at its start, got {magic:#x}")
    arrays = [_read_array(cursor) for _ in range(cursor.count(least_bytes=4))]
    names = [_read_name(cursor) for _ in range(cursor.count(least_bytes=8))]
    if len(names) != len(arrays) or len(set(names)) != len(names):
        raise WeightsError(f"{path} has {len(set(names))} different names for {len(arrays)} arrays")
    return dict(zip(names, arrays, strict=True))


class _Cursor:
    """A place in the file; reading beyond its end is an error, whatever a length in the file says."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, n_bytes: int) -> NDArray[np.uint8]:
        if n_bytes > len(self.data) - self.at:
            raise WeightsError(
                f"{self.path} is damaged: byte {self.at} announces {n_bytes} more, the file ends at {len(self.data)}"
            )
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def read(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def count(self, least_bytes: int) -> int:
        """How many items follow, of at least so many bytes each."""
        (n,) = self.read("<Q")
        if n * least_bytes > len(self.data) - self.at:
            raise WeightsError(f"{self.path} is damaged: byte {self.at - 8} announces {n} items")
        return n


def _read_array(cursor: _Cursor) -> NDArray[Any]:
    began = cursor.at
    (version,) = cursor.read("<I")
    if version in (V2, V3) and (storage := cursor.read("<i")[0]) != DENSE:
        raise WeightsError(f"{cursor.path} has a sparse array at byte {began} (storage {storage}): expected dense ones")
    ndim = cursor.read("<I")[0] if version in (V1, V2, V3) else version
    if ndim > MAX_NDIM:
        raise WeightsError(f"{cursor.path} is damaged: the array at byte {began} has {ndim} dimensions")
    shape = cursor.read(f"<{ndim}{'q' if version in (V1, V2, V3) else 'I'}")
    if ndim == 0:  # MXNet's array that holds nothing
        return np.empty(0, np.float32)
    _, _, flag = cursor.read("<iii")
    if flag not in DTYPES or min(shape) < 0 or max(shape) > len(cursor.data):
        raise WeightsError(f"{cursor.path} is damaged: the array at byte {began} has dtype {flag} and shape {shape}")
    dtype = np.dtype(DTYPES[flag])
    return cursor.take(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


def _read_name(cursor: _Cursor) -> str:
    return cursor.take(cursor.read("<Q")[0]).tobytes().decode("utf-8", "replace")


def resnet38d_from_mxnet(arrays: dict[str, NDArray[Any]]) -> dict[str, Tensor]:
    """State dict of ResNet38d from `ilsvrc-cls_rna-a1_cls1000_ep-0001.params` (github.com/itijyou/ademxapp).

    Its classifier is left out; names that are not this network's are kept, so that loading lists them.
    """
    named = {name.removeprefix("arg:").removeprefix("aux:"): array for name, array in arrays.items()}
    return {
        resnet38d_name(name): torch.from_numpy(array.astype(np.float32))
        for name, array in named.items()
        if not name.startswith("linear")
    }


def resnet38d_name(name: str) -> str:
    """bn4b2_branch2b1_moving_var -> b4_2.bn_branch2b1.running_var, res4a_branch1_weight -> b4.conv_branch1.weight."""
    if name == "conv1a_weight":
        return "conv1a.weight"
    if name.startswith("bn7_"):
        return f"bn7.{BATCH_NORM.get(name[4:], name[4:])}"
    match = LAYER.fullmatch(name)
    if match is None:
        return name
    block = f"b{match['level']}" + (f"_{match['block']}" if match["block"] else "")
    kind = "conv" if match["kind"] == "res" else "bn"
    return f"{block}.{kind}_{match['branch']}.{BATCH_NORM.get(match['what'], match['what'])}"
