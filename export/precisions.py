"""The graphs of a bundle in other precisions than float32."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from export.half import Half, HalfResult, half_within
from export.int8 import Int8Result, int8_from_fp32, label_maps
from weakseg.datasets import Dataset
from weakseg.errors import ParityError
from weakseg.image import read_image
from weakseg.manifest import AFFINITY, CLASSIFIER, MULTISCALE, Manifest, Precision
from weakseg.preprocess import InputPolicy, prepare
from weakseg.progress import Progress
from weakseg.tolerance import CAM_MIN_SCORE

N_CALIBRATION = 64  # images, evenly spaced over the training split
CALIBRATION_MAX_SIDE = 512
N_HALF = 16  # of them, that 16 bits are judged on

Made = TypeVar("Made", HalfResult, Int8Result)


def in_precisions(
    files: Mapping[str, bytes], precisions: Collection[str], manifest: Manifest, train: Dataset, progress: Progress
) -> dict[str, dict[Precision, bytes]]:
    """Every graph in float32 and in what else is asked for.

    AffinityNet stays float32 where INT8 is asked for, as it has no label maps to judge by; so does a graph that bears a
    precision in none of its layers.

    Args:
        files: {graph: serialised ONNX in float32}.
        precisions: of fp16, bf16, int8.
    Returns:
        {graph: {precision: serialised ONNX}}, fp32 first.
    Raises:
        ParityError: no graph bears a precision that is asked for. ConfigError: a graph without layers.
    """
    forms: dict[str, dict[Precision, bytes]] = {name: {"fp32": data} for name, data in files.items()}
    images = calibration_images(train) if precisions else []
    halves: tuple[Half, ...] = ("fp16", "bf16")
    for half in (half for half in halves if half in precisions):
        min_score = CAM_MIN_SCORE.get(manifest.cam.method, 0.0)
        narrow = partial(half_within, images=images[:N_HALF], half=half, min_score=min_score)
        for name, made in _of_graphs(files, narrow, half, progress).items():
            forms[name][half] = made.model
    if "int8" in precisions:
        labels = partial(
            label_maps,
            presence=manifest.presence,
            threshold=manifest.background.t,
            normalisation=manifest.cam.normalisation,
        )
        quantise = partial(int8_from_fp32, images=images, labels=labels)
        judged = {name: data for name, data in files.items() if name != AFFINITY}
        for name, int8 in _of_graphs(judged, quantise, "INT8", progress).items():
            forms[name]["int8"] = int8.model
    return forms


def _of_graphs(files: Mapping[str, bytes], make: Callable[..., Made], what: str, progress: Progress) -> dict[str, Made]:
    """{graph: it in another precision} of those that bear it; views of one network share what they found out."""
    found: dict[str, Made] = {}
    refused: list[ParityError] = []
    for name, data in files.items():
        known = found[CLASSIFIER].float_layers if name == MULTISCALE and CLASSIFIER in found else ()
        try:
            made = make(data, float_layers=known)
        except ParityError as error:
            progress.say(f"bundle: {name} stays float32: {error}")
            refused.append(error)
            continue
        found[name] = made
        progress.say(f"bundle: {name} in {what}: {made.quality}")
    if refused and not found:
        raise refused[0]
    return found


def calibration_images(train: Dataset) -> list[NDArray[np.uint8]]:
    """(H, W, 3) uint8 images of the training split, as the networks see them; the same for the same split."""
    step = max(1, len(train) // N_CALIBRATION)
    policy = InputPolicy(CALIBRATION_MAX_SIDE)
    return [prepare(read_image(sample.image), policy) for sample in train.samples[::step][:N_CALIBRATION]]
