"""1,310 VOC photographs with image-level labels to masks, MobileNetV2.

weakseg run wsss_mini --data.root ../shared/data/wsss-mini \
    --backbone.weights ../shared/data/weights/mobilenet_v2_1.0_224_imagenet_dequant.pth
"""

from dataclasses import replace

from weakseg.recipe import (
    BackboneConfig,
    CamConfig,
    CrfConfig,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    OptimConfig,
    PseudoLabelConfig,
    Recipe,
    SegConfig,
    ThresholdConfig,
    TrainConfig,
)

RECIPE = Recipe(
    name="wsss_mini",
    data=DataConfig(
        root="../shared/data/wsss-mini",
        format="voc",
        tune="tune",
        tags="labels.json",
        tags_key="voc_box_labels",  # VOC's own labels; the file's other list was read off the masks
        scored_classes=("cat", "cow", "dog", "horse", "person", "sheep"),
    ),
    backbone=BackboneConfig(
        name="mobilenet_v2",
        weights="../shared/data/weights/mobilenet_v2_1.0_224_imagenet_dequant.pth",
        input_scale="inception",
        output_stride=16,
    ),
    train=TrainConfig(optim=OptimConfig(epochs=6, crop_px=320, long_side_px=(288, 480))),
    cam=CamConfig(),
    pseudo_label=PseudoLabelConfig(threshold=ThresholdConfig(rule="otsu"), crf=CrfConfig()),
    train_seg=SegConfig(width=128, optim=replace(SegConfig().optim, epochs=5, crop_px=256, long_side_px=(256, 448))),
    evaluate=EvaluateConfig(splits=("train", "val")),
    export=ExportConfig(name="wsss-mini", data_licence="research only (PASCAL VOC)", weights_licence="Apache-2.0"),
)
