"""SEAM's pseudo-masks on PASCAL VOC 2012: maps, AffinityNet, random walk. Wang et al., CVPR 2020.

weakseg run affinity_voc12 --data.root VOCdevkit/VOC2012 --backbone.weights ilsvrc-cls_rna-a1_cls1000_ep-0001.params

No segmentation network: the run ends with pseudo-masks of train_aug, train and val and their scores. In the --folder of
a finished run of seam_voc12 the classifier and the maps are done.

The paper's figure, mIoU of the pseudo-masks on train (1,464 images, tags given): 63.61. It is the paper's, not ours:
VOC 2012 was not at hand.
Hardware of the paper: four GPUs; AffinityNet 8 epochs of 10,582 images, about 10,600 steps of 8 crops, after the
classifier's. Hours: not measured.
"""

from dataclasses import replace

from training.recipes.seam_voc12 import RECIPE as SEAM
from weakseg.cam import threshold_from_alpha
from weakseg.presets import AFFINITY
from weakseg.recipe import ThresholdConfig

# The paper's backgrounds (1 - max)^alpha: 24 and 4 for the labels of AffinityNet, 6 for the walk.
SURE, WALK, WEAK = (threshold_from_alpha(alpha) for alpha in (24, 6, 4))

RECIPE = replace(
    SEAM,
    name="affinity_voc12",
    pseudo_label=replace(
        SEAM.pseudo_label,
        threshold=ThresholdConfig(rule="fixed", value=WALK),
        band=1 - SURE / WALK,
        band_above=WEAK / WALK - 1,
    ),
    affinity=replace(AFFINITY["seam"], optim=replace(AFFINITY["seam"].optim, workers=SEAM.train.optim.workers)),
    train_seg=None,
)
