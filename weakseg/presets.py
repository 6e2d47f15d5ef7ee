"""Published settings by name: `affinity=AFFINITY["seam"]` in a recipe, `--affinity seam` on the command line.

They are for PASCAL VOC 2012, photographs of 500 px. The backgrounds (1 - max)^alpha that go with them are settings of
`pseudo_label` (weakseg.cam.threshold_from_alpha): psa labels of alpha 4 and 32 and a walk of 16, SEAM 4, 24, 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from weakseg.recipe import AffinityConfig, OptimConfig, WalkConfig

# Wang et al., CVPR 2020, and YudeWang/SEAM train_aff.py, infer_aff.py
_SEAM = AffinityConfig(
    output_stride=8,
    walk=WalkConfig(radius=5, beta=8.0, steps=2**6, band=0.0),
    optim=OptimConfig(
        epochs=8, batch_size=8, crop_px=448, long_side_px=(500, 500), lr=0.01, momentum=0.0, weight_decay=5e-4
    ),
)
# Ahn & Kwak, CVPR 2018, and jiwoon-ahn/psa train_aff.py, infer_aff.py
_PSA = replace(_SEAM, walk=replace(_SEAM.walk, steps=2**8), optim=replace(_SEAM.optim, lr=0.1))

AFFINITY: Mapping[str, AffinityConfig] = {"default": AffinityConfig(), "seam": _SEAM, "psa": _PSA}
