"""SEAM on the 1,310 photographs of wsss-mini, MobileNetV2 at stride 16.

weakseg run seam_wsss_mini --data.root ../shared/data/wsss-mini \
    --backbone.weights ../shared/data/weights/mobilenet_v2_1.0_224_imagenet_dequant.pth
"""

from dataclasses import replace

from training.recipes.wsss_mini import RECIPE as PLAIN
from weakseg.recipe import CamConfig, SeamConfig

RECIPE = replace(
    PLAIN,
    name="seam_wsss_mini",
    train=replace(PLAIN.train, method="seam", seam=SeamConfig(rescale=0.5)),
    # Refined maps of half the size, 10 cells high, are blots; plain maps gain from them.
    cam=CamConfig(method="pcm", scales=(1.0, 1.5, 2.0), normalisation="minmax"),
    export=replace(PLAIN.export, name="seam-wsss-mini"),
)
