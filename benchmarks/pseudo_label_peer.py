"""Pseudo-labels as the field's repositories make them, written down in the clearest way: what benchmarks compare with.

torch, one image at a time, one view after the other; pydensecrf2 twice; a pickle for the maps and one for each CRF.
After the steps of psa and SEAM (infer_cls.py, infer_SEAM.py), without their data parallelism over GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from training.models import load_model

SCALES = (0.5, 1.0, 1.5, 2.0)
ALPHAS = (4, 24)


def label_images(classifier: Path, images: Iterable[tuple[Path, list[int]]], out: Path) -> None:
    """images: path and class indices. Writes out/{cam,crf_4,crf_24}/<id>.npy."""
    model, _ = load_model(classifier, kind="classifier")
    model.eval()
    for folder in ("cam", *(f"crf_{alpha}" for alpha in ALPHAS)):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for path, classes in images:
        image = np.array(Image.open(path).convert("RGB"))
        cams = multi_scale_cams(model, image, classes)
        np.save(out / "cam" / f"{path.stem}.npy", cams, allow_pickle=True)  # type: ignore[arg-type]
        for alpha in ALPHAS:
            refined = crf_with_alpha(image, cams, alpha)
            np.save(out / f"crf_{alpha}" / f"{path.stem}.npy", refined, allow_pickle=True)  # type: ignore[arg-type]


@torch.inference_mode()
def multi_scale_cams(model: nn.Module, image: NDArray[np.uint8], classes: list[int]) -> dict[int, NDArray[np.float32]]:
    """{class: (H, W) float32 in [0, 1]}."""
    height, width = image.shape[:2]
    total = np.zeros((len(classes), height, width), np.float32)
    for scale in SCALES:
        size = (round(width * scale), round(height * scale))
        view = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        for mirrored in (False, True):
            x = torch.from_numpy(view[:, ::-1].copy() if mirrored else view.copy()).permute(2, 0, 1)[None].float()
            cam = F.relu(model(x).cam[:, classes])
            cam = F.interpolate(cam, (height, width), mode="bilinear", align_corners=False)[0].numpy()
            total += cam[:, :, ::-1] if mirrored else cam
    total /= total.max(axis=(1, 2), keepdims=True) + 1e-5
    return dict(zip(classes, total, strict=True))


def crf_with_alpha(
    image: NDArray[np.uint8], cams: dict[int, NDArray[np.float32]], alpha: float
) -> dict[int, NDArray[np.float32]]:
    """{0: background, class + 1: ...} (H, W) float32 marginals."""
    import pydensecrf.densecrf as dcrf
    from pydensecrf.utils import unary_from_softmax

    maps = np.stack(list(cams.values()))
    scores = np.concatenate([(1 - maps.max(axis=0, keepdims=True)) ** alpha, maps])
    height, width = image.shape[:2]
    crf = dcrf.DenseCRF2D(width, height, len(scores))
    crf.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(scores, clip=1e-5)))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=50, srgb=5, rgbim=np.ascontiguousarray(image), compat=10)
    marginals = np.array(crf.inference(10)).reshape(len(scores), height, width)
    return dict(zip([0, *(c + 1 for c in cams)], marginals, strict=True))
