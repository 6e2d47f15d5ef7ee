"""SEAM on PASCAL VOC 2012 as the paper trains it: ResNet38d, train_aug, crops of 448. Wang et al., CVPR 2020.

weakseg run seam_voc12 --data.root VOCdevkit/VOC2012 --backbone.weights ilsvrc-cls_rna-a1_cls1000_ep-0001.params

The paper's figures, mIoU of the maps on train (1,464 images, tags given, best threshold): plain CAM 47.43, SEAM 55.41,
SEAM + CRF 56.83. They are the paper's, not ours: VOC 2012 was not at hand.
Hardware of the paper: four GPUs; 8 epochs of 10,582 images, about 10,600 steps of 8 crops.
"""

from weakseg.recipe import (
    BackboneConfig,
    CamConfig,
    CrfConfig,
    DataConfig,
    EvaluateConfig,
    OptimConfig,
    PseudoLabelConfig,
    Recipe,
    SeamConfig,
    SegConfig,
    ThresholdConfig,
    TrainConfig,
)

RECIPE = Recipe(
    name="seam_voc12",
    data=DataConfig(root="VOCdevkit/VOC2012", format="voc", train="train_aug", tags="xml"),
    backbone=BackboneConfig(
        name="resnet38d", weights="ilsvrc-cls_rna-a1_cls1000_ep-0001.params", output_stride=8, freeze_stages=1
    ),
    train=TrainConfig(
        method="seam",
        dropout=0.5,
        optim=OptimConfig(
            epochs=8,
            batch_size=8,
            crop_px=448,
            long_side_px=(448, 768),
            jitter=0.3,
            lr=0.01,
            momentum=0.0,  # the authors' optimiser has none: its weight decay sits in the momentum's place
            weight_decay=5e-4,
            new_lr_scale=10.0,
            poly_power=0.9,
            workers=4,
        ),
        seam=SeamConfig(parity=True),
    ),
    cam=CamConfig(method="pcm", scales=(0.5, 1.0, 1.5, 2.0), flip=True, normalisation="minmax"),
    pseudo_label=PseudoLabelConfig(
        threshold=ThresholdConfig(rule="otsu"),  # the paper's best threshold is chosen on the masks it is scored on
        crf=CrfConfig(bilateral_sxy=80.0, bilateral_srgb=13.0, bilateral_weight=10.0),
    ),
    train_seg=SegConfig(),
    evaluate=EvaluateConfig(splits=("train", "val")),
)
