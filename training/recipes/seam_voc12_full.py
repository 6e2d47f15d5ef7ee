"""SEAM's whole protocol on PASCAL VOC 2012: maps, AffinityNet, random walk, DeepLab. Wang et al., CVPR 2020.

weakseg run seam_voc12_full --data.root VOCdevkit/VOC2012 --backbone.weights ilsvrc-cls_rna-a1_cls1000_ep-0001.params

deeplab_voc12 under the chain's own name, scored on train and val. Stages that a run of seam_voc12 (classifier, maps),
affinity_voc12 (up to the random walk) or deeplab_voc12 (up to the scores) has finished are done in the same --folder.

The paper's figures, mIoU: pseudo-masks after the random walk on train (1,464 images, tags given) 63.61, DeepLab on val
64.5, on test 65.7. They are the paper's, not ours: VOC 2012 was not at hand.
Hardware of the paper: four GPUs; SEAM and AffinityNet 8 epochs each, DeepLab 20,000 steps of 10 crops.
"""

from dataclasses import replace

from training.recipes.deeplab_voc12 import RECIPE as DEEPLAB

RECIPE = replace(DEEPLAB, name="seam_voc12_full")
