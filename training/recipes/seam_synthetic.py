"""SEAM on the generated scenes, a network from scratch: minutes on two cores.

weakseg data make-synthetic data/synthetic && weakseg run seam_synthetic --data.root data/synthetic
"""

from dataclasses import replace

from training.recipes.synthetic import RECIPE as PLAIN
from weakseg.recipe import SeamConfig

RECIPE = replace(
    PLAIN,
    name="seam_synthetic",
    train=replace(PLAIN.train, method="seam", seam=SeamConfig(rescale=0.5)),
    cam=replace(PLAIN.cam, method="pcm", normalisation="minmax"),
    export=replace(PLAIN.export, name="seam-demo"),
)
