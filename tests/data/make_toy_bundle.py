"""Write the toy bundle of schema version 3 beside this file: python tests/data/make_toy_bundle.py

Three classes, red, green and blue; the graphs look at colours only, so what they must answer has a closed form:

    m     = mean colour of each 4 x 4 cell, in [0, 1]; cells cut by the border average what there is
    cam_c = relu(m_c - m of the other two, summed)      (2 x that, of two views, in the multi-scale graph)
    score = largest value of cam_c (of one view)
    logit = 0.25 for background, cam_c for the classes
    label = argmax of the logits, each cell's bilinearly brought to its 4 x 4 pixels

bundles/toy/1 has the same graphs without labels. It was written by this script when the schema had version 1, and is
the golden file of that: it stays as it is, as bundles_of_schema_2/toy/2 does. bundles_of_schema_3/toy/3 will when the
schema moves on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from weakseg import bundle
from weakseg.classes import ClassTable
from weakseg.manifest import (
    GRAPH_OUTPUTS,
    CamSettings,
    Graph,
    Licences,
    Manifest,
    Provenance,
    TrainingStatistics,
    palette_for,
)
from weakseg.preprocess import InputPolicy
from weakseg.recipe import PseudoLabelConfig
from weakseg.threshold import Threshold

CLASSES = ClassTable(("red", "green", "blue"))
BACKGROUND_LOGIT = 0.25


def constant(name: str, value) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)


def cam_nodes(views: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes from images to cam_one (one view) and cam (all views)."""
    excess = (2 * np.eye(3) - np.ones((3, 3))).astype(np.float32)[:, :, None, None]
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["planes", "scale"], ["unit"]),
        helper.make_node("AveragePool", ["unit"], ["cells"], kernel_shape=[4, 4], strides=[4, 4], ceil_mode=1),
        helper.make_node("Conv", ["cells", "excess"], ["signed"]),
        helper.make_node("Relu", ["signed"], ["cam_one"]),
        helper.make_node("Mul", ["cam_one", "views"], ["cam"]),
    ]
    weights = [
        constant("scale", np.float32(1 / 255)),
        constant("excess", excess),
        constant("views", np.float32(views)),
    ]
    return nodes, weights


def model(nodes, weights, outputs: dict[str, list]) -> bytes:
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 3])
    kinds = {"labels": TensorProto.UINT8}
    infos = [
        helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape)
        for name, shape in outputs.items()
    ]
    graph = helper.make_graph(nodes, "toy", [images], infos, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8, producer_name="weakseg")
    onnx.checker.check_model(made, full_check=True)
    return made.SerializeToString(deterministic=True)


def classifier(views: int) -> bytes:
    nodes, weights = cam_nodes(views)
    nodes += [
        helper.make_node("ReduceMax", ["cam_one", "sides"], ["top"], keepdims=0),
        helper.make_node("Identity", ["top"], ["scores"]),
    ]
    weights.append(constant("sides", np.array([2, 3])))
    return model(nodes, weights, {"scores": ["B", 3], "cam": ["B", 3, "h", "w"]})


def segmentation(int8: bool) -> bytes:
    """int8: what enters the convolution is rounded to 255ths. Pixels have such values, the means of cells need not."""
    nodes, weights = cam_nodes(1)
    if int8:
        conv = next(node for node in nodes if node.op_type == "Conv")
        conv.input[0] = "rounded"
        at = nodes.index(conv)
        nodes[at:at] = [
            helper.make_node("QuantizeLinear", ["cells", "scale", "zero_point"], ["bytes"]),
            helper.make_node("DequantizeLinear", ["bytes", "scale", "zero_point"], ["rounded"]),
        ]
        weights.append(constant("zero_point", np.uint8(0)))
    nodes += [
        helper.make_node("ReduceMax", ["cam", "channel"], ["any"], keepdims=1),
        helper.make_node("Mul", ["any", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "background"], ["first"]),
        helper.make_node("Concat", ["first", "cam"], ["logits"], axis=1),
        helper.make_node("Resize", ["logits", "", "four_times"], ["padded"], mode="linear"),
        helper.make_node("Shape", ["images"], ["size"], start=1, end=3),
        helper.make_node("Slice", ["padded", "corner", "size", "sides"], ["pixels"]),
        helper.make_node("ArgMax", ["pixels"], ["best"], axis=1, keepdims=0),
        helper.make_node("Cast", ["best"], ["labels"], to=TensorProto.UINT8),
    ]
    weights += [
        constant("channel", np.array([1])),
        constant("zero", np.float32(0)),
        constant("background", np.float32(BACKGROUND_LOGIT)),
        constant("four_times", np.array([1, 1, 4, 4], np.float32)),
        constant("corner", np.array([0, 0])),
        constant("sides", np.array([2, 3])),
    ]
    return model(nodes, weights, {"logits": ["B", 4, "h", "w"], "labels": ["B", "H", "W"]})


MANIFEST = Manifest(
    name="toy",
    version="3",
    classes=CLASSES.names,
    palette=palette_for(CLASSES),
    input=InputPolicy(max_side=64),
    outputs=("cam", "pseudo_mask", "segmentation"),
    graphs={
        "classifier": Graph("classifier.onnx", GRAPH_OUTPUTS["classifier"]),
        "classifier_multiscale": Graph("classifier_multiscale.onnx", GRAPH_OUTPUTS["classifier_multiscale"], views=2),
        "segmentation": Graph(
            "segmentation.onnx", GRAPH_OUTPUTS["segmentation"], variants={"int8": "segmentation_int8.onnx"}
        ),
    },
    presence=0.5,
    background=Threshold(0.4, "fixed", "set in the recipe"),
    pseudo_label=PseudoLabelConfig(crf=None, band=0.2),
    cam=CamSettings(scales=(1.0,), flip=True),
    method="cam",
    provenance=Provenance(weakseg="0.1.0"),
    licences=Licences(data="none: no data was used", weights="Apache-2.0"),
    metrics=(
        {
            "what": "segmentation",
            "split": "val",
            "tags": "none",
            "threshold": None,
            "crf": None,
            "scales": [1.0],
            "flip": False,
            "n_images": 1,
            "miou": 0.75,
            "iou": {"background": 1.0, "red": 1.0, "green": 1.0, "blue": 0.0},
        },
    ),
    parity=({"graph": "segmentation", "runtime": "onnxruntime", "precision": "int8", "logits": 0.01, "labels": 0.999},),
    training=TrainingStatistics(
        n_images=1000,
        class_frequency={"red": 0.4, "green": 0.3, "blue": 0.3},
        brightness_mean=0.4,
        brightness_std=0.1,
        score_mean={"red": 0.9, "green": 0.9, "blue": None},
        presence_frequency={"red": 0.4, "green": 0.3, "blue": 0.3},
        confidence=(0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.2, 0.2, 0.2, 0.3),
    ),
)
FILES = {
    "classifier.onnx": classifier(views=1),
    "classifier_multiscale.onnx": classifier(views=2),
    "segmentation.onnx": segmentation(int8=False),
    "segmentation_int8.onnx": segmentation(int8=True),
}


def main() -> None:
    print(bundle.write(Path(__file__).parent / "bundles_of_schema_3", MANIFEST, FILES).folder)


if __name__ == "__main__":
    main()
