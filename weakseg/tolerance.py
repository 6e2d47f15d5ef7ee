"""The one table of numerical tolerances between two ways of computing the same thing.

Used by the export gate, the tests and the demo; a figure of this kind stands nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

from weakseg.manifest import Precision

CAM_FLOOR = 1e-2  # of float32
# {CAM method: least score}: what PCM refines it first stretches to [0, 1], of a class that is not there the noise.
CAM_MIN_SCORE = {"pcm": 0.1}
# Least side of the images whose maps are compared in 16 bits, of those methods: on a handful of cells the stretch makes
# 0.4 of what is rounding, on photographs it stays within the tolerance.
HALF_MIN_SIDE = 64


@dataclass(frozen=True)
class Tolerance:
    """How far a runtime may be from torch.

    raw_cam_rtol: on unnormalised CAMs, relative to the largest value of the map.
    cam01_atol: on CAMs in [0, 1], of classes whose raw maximum, under `minmax` range, is above `floor` and `quiet`.
    floor: a map that never exceeds this is noise; its normalised form is not compared. In units of the class's logit.
    quiet: maps that reach a smaller share of the image's largest value are noise, too: a few bits hold the large
        numbers that a quiet map is the difference of, not the difference.
    label_agreement: least share of equal pixels in label maps.
    miou_points: largest loss of mIoU in points, where labels are allowed to differ; None = not judged.
    """

    raw_cam_rtol: float
    cam01_atol: float
    label_agreement: float
    miou_points: float | None = None
    floor: float = CAM_FLOOR
    quiet: float = 0.0


FP32 = Tolerance(raw_cam_rtol=1e-4, cam01_atol=1e-4, label_agreement=0.999)
FP16 = Tolerance(raw_cam_rtol=2e-2, cam01_atol=2e-2, label_agreement=0.995, floor=1.0, quiet=0.5)
BF16 = Tolerance(raw_cam_rtol=1e-1, cam01_atol=1e-1, label_agreement=0.98, floor=1.0, quiet=0.5)
INT8 = Tolerance(float("inf"), float("inf"), label_agreement=0.0, miou_points=1.0, floor=1.0, quiet=0.5)
# Of outputs, relative to an image's largest value, on training images: more, and a layer stays float. bfloat16 has
# three bits less than float16.
HALF_ERROR = {"fp16": 1e-2, "bf16": 5e-2}
INT8_AGREEMENT = 0.98  # of label maps with float32's on held-out training images: less, and a layer stays float

TOLERANCES: dict[Precision, Tolerance] = {"fp32": FP32, "fp16": FP16, "bf16": BF16, "int8": INT8}

BATCH_ATOL = 1e-5  # same image alone or in a batch
