"""SEAM on the 1,310 photographs of wsss-mini, MobileNetV2 at stride 8.

weakseg run seam_wsss_mini --data.root ../shared/data/wsss-mini \
    --backbone.weights ../shared/data/weights/mobilenet_v2_1.0_224_imagenet_dequant.pth
"""

from dataclasses import replace

from training.recipes.wsss_mini import RECIPE as PLAIN
from weakseg.recipe import SeamConfig

RECIPE = replace(
    PLAIN,
    name="seam_wsss_mini",
    backbone=replace(PLAIN.backbone, output_stride=8),
    train=replace(
        PLAIN.train,
        method="seam",
        optim=replace(PLAIN.train.optim, crop_px=224, long_side_px=(224, 384)),
        seam=SeamConfig(rescale=0.5),
    ),
    cam=replace(PLAIN.cam, method="pcm"),
    export=replace(PLAIN.export, name="seam-wsss-mini"),
)
