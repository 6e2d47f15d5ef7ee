"""MXNet's .params format, written here byte by byte, and what a damaged file says."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.models import build_backbone, resnet38d
from training.models.mxnet_params import BATCH_NORM, DTYPES, V1, V2, read_params, resnet38d_name
from training.models.weights import authors_state, read_state_dict
from weakseg.errors import WeightsError
from weakseg.recipe import BackboneConfig

ARRAYS = {
    "arg:a_weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "aux:b": np.array([1.5], np.float64),
    "c": np.zeros((0, 2), np.float16),
    "arg:d": np.array([[7], [250]], np.uint8),
    "arg:e": np.array([-(2**40)], np.int64),
}


def packed_array(array: np.ndarray, version: int | None) -> bytes:
    flag = {np.dtype(code): flag for flag, code in DTYPES.items()}[array.dtype]
    head = b"" if version is None else struct.pack("<I", version)
    if version == V2:
        head += struct.pack("<i", 0)
    dims = struct.pack(f"<I{array.ndim}{'I' if version is None else 'q'}", array.ndim, *array.shape)
    return head + dims + struct.pack("<iii", 1, 0, flag) + array.tobytes()


def packed(arrays: dict[str, np.ndarray], version: int | None = V2) -> bytes:
    out = struct.pack("<QQQ", 0x112, 0, len(arrays))
    out += b"".join(packed_array(array, version) for array in arrays.values())
    out += struct.pack("<Q", len(arrays))
    return out + b"".join(struct.pack("<Q", len(name.encode())) + name.encode() for name in arrays)


def write(folder: Path, content: bytes) -> Path:
    path = folder / "w.params"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("version", [V2, V1, None])
def test_every_version_is_read(tmp_path: Path, version: int | None) -> None:
    read = read_params(write(tmp_path, packed(ARRAYS, version)))
    assert list(read) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_an_array_that_holds_nothing(tmp_path: Path) -> None:
    content = struct.pack("<QQQIiI", 0x112, 0, 1, V2, 0, 0) + struct.pack("<QQ", 1, 1) + b"x"
    assert read_params(write(tmp_path, content))["x"].size == 0


CONTENT = packed({"arg:w": np.ones((2, 2), np.float32), "aux:v": np.ones(3, np.float32)})


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, len(CONTENT) - 1))
def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path: Path, length: int) -> None:
    with pytest.raises(WeightsError, match=r"damaged|is empty"):
        read_params(write(tmp_path, CONTENT[:length]))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(CONTENT) - 1), byte=st.integers(0, 255))
def test_a_wrong_byte_is_read_or_refused(tmp_path: Path, at: int, byte: int) -> None:
    content = bytearray(CONTENT)
    content[at] = byte
    try:
        arrays = read_params(write(tmp_path, bytes(content)))
    except WeightsError:
        return
    assert sum(array.nbytes for array in arrays.values()) <= len(CONTENT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(40), r"not an MXNet \.params file: expected 0x112 at its start, got 0x4034b50"),
        (struct.pack("<QQQ", 0x112, 0, 2**60), f"announces {2**60} items"),
        (struct.pack("<QQQII", 0x112, 0, 1, V1, 2**31), f"has {2**31} dimensions"),
        (struct.pack("<QQQIiIq", 0x112, 0, 1, V2, 0, 1, 2**62) + bytes(12), rf"shape \({2**62},\)"),
        (struct.pack("<QQQIiIq", 0x112, 0, 1, V2, 0, 1, -1) + bytes(12), r"shape \(-1,\)"),
        (struct.pack("<QQQIiIqiii", 0x112, 0, 1, V2, 0, 1, 1, 1, 0, 99) + bytes(12), "dtype 99"),
        (struct.pack("<QQQIi", 0x112, 0, 1, V2, 1) + bytes(40), "sparse array at byte 24"),
        (packed({"a": np.ones(1, np.float32)})[:-17] + struct.pack("<Q", 0), "0 different names for 1 arrays"),
    ],
)
def test_what_a_foreign_or_damaged_file_says(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        read_params(write(tmp_path, content))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights file"):
        read_params(tmp_path / "none.params")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv1a_weight", "conv1a.weight"),
        ("bn2a_branch2a_gamma", "b2.bn_branch2a.weight"),
        ("res2a_branch1_weight", "b2.conv_branch1.weight"),
        ("bn4b5_branch2b1_moving_var", "b4_5.bn_branch2b1.running_var"),
        ("res7a_branch2b2_weight", "b7.conv_branch2b2.weight"),
        ("bn7_beta", "bn7.bias"),
        ("bn7_moving_mean", "bn7.running_mean"),
        ("fc1_weight", "fc1_weight"),
    ],
)
def test_names_of_the_published_file(name: str, expected: str) -> None:
    assert resnet38d_name(name) == expected


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> BackboneConfig:
    """ResNet38d with 1/32 of the channels."""
    rows = [(name, n, i // 32, m // 32, o // 32, *rest) for name, n, i, m, o, *rest in resnet38d.ROWS]
    monkeypatch.setattr(resnet38d, "ROWS", rows)
    bottlenecks = [(name, i // 32, o // 32, p) for name, i, o, p in resnet38d.BOTTLENECKS]
    monkeypatch.setattr(resnet38d, "BOTTLENECKS", bottlenecks)
    return BackboneConfig(name="resnet38d", output_stride=8)


def random_state(config: BackboneConfig) -> dict[str, torch.Tensor]:
    state = build_backbone(config).state_dict()
    return {key: torch.rand_like(value) for key, value in state.items() if not key.endswith("num_batches_tracked")}


def mxnet_name(key: str) -> str:
    """The inverse of resnet38d_name."""
    layer, _, rest = key.rpartition(".")
    back = {ours: theirs for theirs, ours in BATCH_NORM.items()}
    what = rest if layer.rpartition(".")[2].startswith("conv") else back[rest]
    prefix = "aux:" if what.startswith("moving") else "arg:"
    if "." not in layer:
        return f"{prefix}{layer}_{what}"
    block, branch = layer.split(".")
    kind, _, branch = branch.partition("_")
    level, _, n = block[1:].partition("_")
    return f"{prefix}{'res' if kind == 'conv' else 'bn'}{level}{f'b{n}' if n else 'a'}_{branch}_{what}"


def test_the_published_file_fills_every_tensor(tmp_path: Path, config: BackboneConfig) -> None:
    state = random_state(config)
    arrays = {mxnet_name(key): value.numpy() for key, value in state.items()}
    arrays |= {"arg:linear1000_weight": np.ones((10, 4), np.float32), "arg:linear1000_bias": np.ones(10, np.float32)}
    path = write(tmp_path, packed(arrays))
    loaded = build_backbone(replace(config, weights=str(path))).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_another_networks_params_are_listed(tmp_path: Path, config: BackboneConfig) -> None:
    path = write(tmp_path, packed({"arg:conv0_weight": np.ones((2, 2), np.float32)}))
    with pytest.raises(WeightsError, match=r"missing: conv1a\.weight.* 1 unexpected: conv0_weight"):
        build_backbone(replace(config, weights=str(path)))


def test_the_authors_state_dict_fills_backbone_and_names_the_head(tmp_path: Path, config: BackboneConfig) -> None:
    state = random_state(config)
    heads = {"fc8": (21, 4096), "f8_3": (64, 512), "f8_4": (128, 1024), "f9": (192, 195)}
    theirs = {f"module.{name}.weight": torch.rand(*shape, 1, 1) for name, shape in heads.items()}
    path = tmp_path / "resnet38_SEAM.pth"
    torch.save({f"module.{key}": value for key, value in state.items()} | theirs, path)
    loaded = build_backbone(replace(config, weights=str(path))).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    backbone, head = authors_state(read_state_dict(path))
    assert backbone.keys() == state.keys()
    assert {key: tuple(value.shape[:2]) for key, value in head.items()} == {
        "head.weight": (21, 4096),
        "pcm.low.weight": (64, 512),
        "pcm.high.weight": (128, 1024),
        "pcm.embed.weight": (192, 195),
    }


def test_a_state_dict_of_another_origin_has_no_head() -> None:
    state = {"conv1.weight": torch.ones(1), "fc8.weight": torch.ones(1)}
    assert authors_state(state) == (state, {})


def test_imagenet_weights_are_to_be_brought(config: BackboneConfig) -> None:
    with pytest.raises(WeightsError, match=r"give ilsvrc-cls_rna-a1_cls1000_ep-0001\.params"):
        build_backbone(replace(config, weights="imagenet"))
