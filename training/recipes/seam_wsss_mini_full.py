"""SEAM on wsss-mini, its maps refined by AffinityNet and random walk before the segmentation network learns from them.

weakseg run seam_wsss_mini_full --data.root ../shared/data/wsss-mini \
    --backbone.weights ../shared/data/weights/mobilenet_v2_1.0_224_imagenet_dequant.pth

In the folder of a finished run of seam_wsss_mini (--folder) the classifier, its maps and its masks are there already.
"""

from dataclasses import replace

from training.recipes.seam_wsss_mini import RECIPE as SEAM
from weakseg.recipe import AffinityConfig, OptimConfig, WalkConfig

RECIPE = replace(
    SEAM,
    name="seam_wsss_mini_full",
    affinity=AffinityConfig(
        output_stride=16,
        # Two epochs leave affinities close to 1, so the exponent is three times the authors'.
        walk=WalkConfig(radius=5, beta=24.0, steps=2**6),
        optim=OptimConfig(
            epochs=2,
            crop_px=224,
            long_side_px=(224, 352),
            # SGD at the authors' rates leaves the loss at 0.5 where AdamW reaches 0.4.
            optimizer="adamw",
            lr=3e-4,
            new_lr_scale=5.0,
            weight_decay=1e-2,
        ),
    ),
    # A network learns again from what the first one makes of the training images.
    train_seg=replace(SEAM.train_seg, rounds=2),
    export=replace(SEAM.export, name="seam-wsss-mini-full"),
)
