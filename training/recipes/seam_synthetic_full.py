"""SEAM on the generated scenes, its maps refined by AffinityNet and random walk: the whole chain in minutes.

weakseg data make-synthetic data/synthetic && weakseg run seam_synthetic_full --data.root data/synthetic
"""

from dataclasses import replace

from training.recipes.seam_synthetic import RECIPE as SEAM
from weakseg.recipe import AffinityConfig, WalkConfig

RECIPE = replace(
    SEAM,
    name="seam_synthetic_full",
    affinity=AffinityConfig(
        output_stride=8,
        start="classifier",
        walk=WalkConfig(radius=5, beta=16.0, steps=2**6),
        optim=replace(SEAM.train.optim, epochs=12, lr=1e-3),
    ),
    train_seg=replace(SEAM.train_seg, rounds=2),
    export=replace(SEAM.export, name="seam-demo-full"),
)
