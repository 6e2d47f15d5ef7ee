"""Backbones and heads, and how a trained one is stored."""

from training.models.affinity import AffinityNet
from training.models.build import build_backbone
from training.models.classifier import CamClassifier
from training.models.deeplab import DeepLabV3Plus, build_segmentation
from training.models.irn import EdgeNet
from training.models.seam import SeamClassifier
from training.models.store import AFFINITY_NETWORKS, load_model, save_model
from training.models.tokens import TokenClassifier

__all__ = [
    "AFFINITY_NETWORKS",
    "AffinityNet",
    "CamClassifier",
    "DeepLabV3Plus",
    "EdgeNet",
    "SeamClassifier",
    "TokenClassifier",
    "build_backbone",
    "build_segmentation",
    "load_model",
    "save_model",
]
