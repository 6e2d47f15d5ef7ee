"""SEAM's segmentation network on PASCAL VOC 2012: DeepLab-LargeFOV over ResNet38d. Wang et al., CVPR 2020.

weakseg run deeplab_voc12 --folder runs/affinity_voc12 --data.root VOCdevkit/VOC2012 \
    --backbone.weights ilsvrc-cls_rna-a1_cls1000_ep-0001.params

It learns from the pseudo-masks of affinity_voc12: in the --folder of a finished run of that recipe the stages up to
random_walk are done, in another they run first. Predictions are of six scales and their mirror images, without tags,
and once more with a dense CRF behind them.

The paper's figures, mIoU: 64.5 on val, 65.7 on test. They are the paper's, not ours: VOC 2012 was not at hand.
For test, which the server alone can score: `weakseg submission RUN --what segmentation_crf --out results.tgz`.
Hardware of the paper: four GPUs; 20,000 steps of 10 crops. Hours: not measured.
"""

from dataclasses import replace

from training.recipes.affinity_voc12 import RECIPE as AFFINITY
from weakseg.recipe import CrfConfig, SegConfig

RECIPE = replace(
    AFFINITY,
    name="deeplab_voc12",
    train_seg=SegConfig(
        network="deeplab_largefov",
        start="weights",
        width=512,
        balance="none",
        optim=replace(
            AFFINITY.train.optim,
            optimizer="sgd",
            lr=1e-3,
            momentum=0.9,
            epochs=19,  # 20,000 steps
            batch_size=10,
            long_side_px=(250, 750),  # 0.5 to 1.5 times the 500 pixels of a photograph
        ),
    ),
    evaluate=replace(
        AFFINITY.evaluate,
        seg_scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
        seg_flip=True,
        # As in YudeWang/semantic-segmentation-codebase, where the paper's network was trained again: 64.75 on val.
        seg_crf=CrfConfig(iterations=1, bilateral_sxy=32.0, bilateral_srgb=13.0, bilateral_weight=10.0),
    ),
)
