"""SEAM on the generated scenes, a network from scratch: minutes on two cores.

weakseg data make-synthetic data/synthetic && weakseg run seam_synthetic --data.root data/synthetic
"""

from dataclasses import replace

from training.recipes.synthetic import RECIPE as PLAIN
from weakseg.presets import with_method

SEAM = with_method(PLAIN, "seam")
RECIPE = replace(SEAM, name="seam_synthetic", export=replace(SEAM.export, name="seam-demo"))
