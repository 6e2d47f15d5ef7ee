"""The embedded default: generated scenes, a network from scratch. `weakseg demo` runs it in minutes on two cores.

weakseg data make-synthetic data/synthetic && weakseg run synthetic --data.root data/synthetic
"""

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
    name="synthetic",
    data=DataConfig(root="data/synthetic", format="voc", tune="tune"),
    # No start weights, so everything learns: all stages and batch norm.
    backbone=BackboneConfig(name="small_resnet", weights=None, freeze_stages=0, freeze_bn=False),
    train=TrainConfig(
        dropout=0.0,
        optim=OptimConfig(
            epochs=36,
            batch_size=32,
            crop_px=128,
            long_side_px=(128, 208),
            optimizer="adamw",
            lr=3e-3,
            weight_decay=1e-2,
            new_lr_scale=1.0,
            warmup_steps=20,
        ),
    ),
    cam=CamConfig(scales=(1.0, 1.5)),
    pseudo_label=PseudoLabelConfig(threshold=ThresholdConfig(rule="otsu"), crf=CrfConfig(bilateral_sxy=15.0)),
    train_seg=SegConfig(
        width=64,
        optim=OptimConfig(
            epochs=12,
            batch_size=16,
            crop_px=128,
            long_side_px=(128, 224),
            optimizer="adamw",
            lr=1e-3,
            weight_decay=1e-2,
            new_lr_scale=2.0,
        ),
    ),
    evaluate=EvaluateConfig(splits=("train", "val"), seg_scales=(1.0,)),
    export=ExportConfig(name="demo", data_licence="CC0-1.0 (generated)", weights_licence="Apache-2.0"),
)
