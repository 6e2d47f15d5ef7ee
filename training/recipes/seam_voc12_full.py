"""SEAM's whole protocol on PASCAL VOC 2012: maps, AffinityNet, random walk, DeepLab. Wang et al., CVPR 2020.

weakseg run seam_voc12_full --data.root VOCdevkit/VOC2012 --backbone.weights ilsvrc-cls_rna-a1_cls1000_ep-0001.params

The paper's figures, mIoU: pseudo-masks after the random walk on train (1,464 images, tags given) 63.61, DeepLab on val
64.5, on test 65.7. They are the paper's, not ours: VOC 2012 was not at hand. DeepLab's CRF is not in here.
Hardware of the paper: four GPUs; AffinityNet 8 epochs, DeepLab 20,000 steps of 10 crops.
"""

from dataclasses import replace

from training.recipes.seam_voc12 import RECIPE as SEAM
from weakseg.cam import threshold_from_alpha
from weakseg.recipe import AffinityConfig, SegConfig, ThresholdConfig, WalkConfig

# The paper's backgrounds (1 - max)^alpha: 24 and 4 for the labels of AffinityNet, 6 for the walk.
SURE, WALK, WEAK = (threshold_from_alpha(alpha) for alpha in (24, 6, 4))

RECIPE = replace(
    SEAM,
    name="seam_voc12_full",
    pseudo_label=replace(
        SEAM.pseudo_label,
        threshold=ThresholdConfig(rule="fixed", value=WALK),
        band=1 - SURE / WALK,
        band_above=WEAK / WALK - 1,
    ),
    affinity=AffinityConfig(
        output_stride=8,
        walk=WalkConfig(radius=5, beta=8.0, steps=2**6, band=0.0),
        optim=replace(SEAM.train.optim, long_side_px=(500, 500)),  # as they are
    ),
    train_seg=SegConfig(
        network="deeplab_largefov",
        start="weights",
        width=512,
        balance="none",
        optim=replace(
            SEAM.train.optim,
            optimizer="sgd",
            lr=1e-3,
            momentum=0.9,
            epochs=19,  # 20,000 steps
            batch_size=10,
            long_side_px=(250, 750),  # 0.5 to 1.5 times the 500 pixels of a photograph
        ),
    ),
    evaluate=replace(SEAM.evaluate, seg_scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), seg_flip=True),
)
