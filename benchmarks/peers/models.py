"""The networks that are served: one that computes for a tenth of a second, two that leave the rest to be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import weakseg
from benchmarks import serving
from weakseg import bundle
from weakseg.manifest import SEGMENTATION

FEATURES, PATCH = 128, 16
N_IMAGES = 3


def small(root: Path) -> Path:
    """20 classes, 1 MB of random weights, a few milliseconds."""
    rng = np.random.default_rng(0)

    def weights(name: str, *shape: int) -> onnx.TensorProto:
        scale = np.sqrt(2 / np.prod(shape[1:]))
        return numpy_helper.from_array((scale * rng.standard_normal(shape)).astype(np.float32), name)

    constants = [
        weights("patches", FEATURES, 3, PATCH, PATCH),
        weights("context", FEATURES, FEATURES, 3, 3),
        weights("head", len(serving.CLASSES) + 1, FEATURES, 1, 1),
        numpy_helper.from_array(np.array([127.5], np.float32), "half"),
        numpy_helper.from_array(np.array([1], np.int64), "channel"),
        numpy_helper.from_array(np.array([len(serving.CLASSES) + 1], np.int64), "channels"),
        numpy_helper.from_array(np.array([3], np.int64), "three"),
        numpy_helper.from_array(np.array([4], np.int64), "four"),
    ]
    nodes = [
        helper.make_node("Transpose", ["images"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["bytes"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["bytes", "half"], ["centred"]),
        helper.make_node("Div", ["centred", "half"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "patches"], ["p"], strides=[PATCH, PATCH]),
        helper.make_node("Relu", ["p"], ["p+"]),
        helper.make_node("Conv", ["p+", "context"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["c+"]),
        helper.make_node("Conv", ["c+", "head"], ["cells"]),
        helper.make_node("ArgMax", ["cells"], ["best"], axis=1),  # (B, 1, h, w)
        helper.make_node("Cast", ["best"], ["coarse"], to=TensorProto.UINT8),
        helper.make_node("Shape", ["planes"], ["size"], start=2),
        helper.make_node("Shape", ["planes"], ["batch"], end=1),
        helper.make_node("Concat", ["batch", "channel", "size"], ["sizes"], axis=0),
        helper.make_node("Resize", ["coarse", "", "", "sizes"], ["fine"], mode="nearest"),
        helper.make_node("Squeeze", ["fine", "channel"], ["labels"]),
        # At a quarter of the image, as ours takes them of images that were scaled down.
        helper.make_node("Add", ["size", "three"], ["size+3"]),
        helper.make_node("Div", ["size+3", "four"], ["quarter"]),
        helper.make_node("Concat", ["batch", "channels", "quarter"], ["quarters"], axis=0),
        helper.make_node("Resize", ["cells", "", "", "quarters"], ["logits"], mode="nearest"),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 3])
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", len(serving.CLASSES) + 1, "h", "w"]),
        helper.make_tensor_value_info("labels", TensorProto.UINT8, ["B", "H", "W"]),
    ]
    graph = helper.make_graph(nodes, "small", [images], outputs, constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    files = {f"{SEGMENTATION}.onnx": made.SerializeToString()}
    return bundle.write(root / "small", serving.manifest("small"), files).folder


MODELS = {"network": serving.network, "small": small, "noop": serving.noop}


def model_folder(name: str, root: Path) -> Path:
    """The bundle of one of MODELS, made below `root` unless it is there."""
    made = sorted((root / name).glob("*/1"))
    return made[0] if made else MODELS[name](root)


def expected(bundle: Path) -> dict[bytes, Any]:
    """Photographs and their label maps, as ours has them without a server."""
    model = weakseg.load(bundle)
    return {image: model.segment(image).mask for image in map(serving.photograph, range(N_IMAGES))}
