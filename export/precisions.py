"""The graphs of a bundle in other precisions than float32."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from export.fp16 import fp16_from_fp32
from export.int8 import Int8Result, int8_from_fp32, label_maps
from weakseg.datasets import Dataset
from weakseg.errors import ParityError
from weakseg.image import read_image
from weakseg.manifest import AFFINITY, CLASSIFIER, MULTISCALE, Manifest, Precision
from weakseg.preprocess import InputPolicy, prepare
from weakseg.progress import Progress

N_CALIBRATION = 64  # images, evenly spaced over the training split
CALIBRATION_MAX_SIDE = 512


def in_precisions(
    files: Mapping[str, bytes], precisions: Collection[str], manifest: Manifest, train: Dataset, progress: Progress
) -> dict[str, dict[Precision, bytes]]:
    """Every graph in float32 and in what else is asked for.

    AffinityNet stays float32 where INT8 is asked for, as it has no label maps to judge by; so does a graph whose label
    maps INT8 changes too much.

    Args:
        files: {graph: serialised ONNX in float32}.
        precisions: of fp16, int8.
    Returns:
        {graph: {precision: serialised ONNX}}, fp32 first.
    Raises:
        ParityError: INT8 changes the label maps of every graph too much. ConfigError: a graph without layers.
    """
    forms: dict[str, dict[Precision, bytes]] = {name: {"fp32": data} for name, data in files.items()}
    if "fp16" in precisions:
        progress.say("bundle: float16")
        for name, data in files.items():
            forms[name]["fp16"] = fp16_from_fp32(data)
    if "int8" in precisions:
        judged = {name: data for name, data in files.items() if name != AFFINITY}
        for name, data in in_int8(judged, manifest, calibration_images(train), progress).items():
            forms[name]["int8"] = data
    return forms


def in_int8(
    files: Mapping[str, bytes], manifest: Manifest, images: Sequence[NDArray[np.uint8]], progress: Progress
) -> dict[str, bytes]:
    """{graph: it in INT8} of those that bear it; the views of one network share what they found out."""
    labels = partial(
        label_maps,
        presence=manifest.presence,
        threshold=manifest.background.t,
        normalisation=manifest.cam.normalisation,
    )
    found: dict[str, Int8Result] = {}
    refused: list[ParityError] = []
    for name, data in files.items():
        float_layers = found[CLASSIFIER].float_layers if name == MULTISCALE and CLASSIFIER in found else ()
        try:
            made = int8_from_fp32(data, images, labels=labels, float_layers=float_layers)
        except ParityError as error:
            progress.say(f"bundle: {name} stays float32: {error}")
            refused.append(error)
            continue
        found[name] = made
        progress.say(
            f"bundle: {name} in INT8: {made.agreement:.2%} of the labels as before, "
            f"{len(made.float_layers)} of {len(made.layers)} layers stay float"
        )
    if refused and not found:
        raise refused[0]
    return {name: made.model for name, made in found.items()}


def calibration_images(train: Dataset) -> list[NDArray[np.uint8]]:
    """(H, W, 3) uint8 images of the training split, as the networks see them; the same for the same split."""
    step = max(1, len(train) // N_CALIBRATION)
    policy = InputPolicy(CALIBRATION_MAX_SIDE)
    return [prepare(read_image(sample.image), policy) for sample in train.samples[::step][:N_CALIBRATION]]
