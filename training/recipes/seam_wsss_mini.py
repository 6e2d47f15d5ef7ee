"""SEAM on the 1,310 photographs of wsss-mini, MobileNetV2 at stride 16.

weakseg run seam_wsss_mini --data.root ../shared/data/wsss-mini \
    --backbone.weights ../shared/data/weights/mobilenet_v2_1.0_224_imagenet_dequant.pth
"""

from dataclasses import replace

from training.recipes.wsss_mini import RECIPE as PLAIN
from weakseg.presets import with_method

SEAM = with_method(PLAIN, "seam")
RECIPE = replace(SEAM, name="seam_wsss_mini", export=replace(SEAM.export, name="seam-wsss-mini"))
