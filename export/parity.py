"""Does an exported graph compute what torch computes? On real images and at the sizes where exporters go wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from weakseg.cam import labels_from_cam, normalise
from weakseg.errors import ParityError
from weakseg.manifest import Precision
from weakseg.runners import Runner, open_runner
from weakseg.segmentation import labels_from_logits
from weakseg.tolerance import BATCH_ATOL, CAM_FLOOR, HALF_ERROR, HALF_MIN_SIDE, TOLERANCES, Tolerance

if TYPE_CHECKING:
    from torch import nn  # engines are built, and compared with onnxruntime, where there is no torch

EDGE_SIZES = ((1, 1), (31, 32), (32, 33), (33, 31), (1, 2000), (2000, 1))  # no cell, stride ± 1, one line
BATCHED_SIZE = (33, 31)
CAM_THRESHOLD = 0.3  # of the label maps that are compared; any value would do

Arrays = dict[str, NDArray[np.float32]]
Pairs = list[tuple[NDArray[Any], NDArray[Any]]]


@dataclass(frozen=True)
class Difference:
    """The largest difference seen of one kind, and where. For `labels` got is the share of equal pixels."""

    output: str
    size: str
    got: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.got >= self.allowed if self.output.endswith("labels") else self.got <= self.allowed


@dataclass(frozen=True)
class ParityReport:
    """What was compared with torch: the worst difference of each output, over `n_cases` batches of images."""

    graph: str
    runtime: str
    precision: Precision
    n_cases: int
    differences: tuple[Difference, ...]

    def summary(self) -> dict[str, float]:
        """{output: worst difference}, for the stage's record."""
        return {difference.output: difference.got for difference in self.differences}

    def record(self) -> dict[str, Any]:
        """For the manifest: differences rounded up to powers of ten, as their last digits are each machine's own."""
        worst = {d.output: d.got if d.output == "labels" else next_power(d.got) for d in self.differences}
        return {"graph": self.graph, "runtime": self.runtime, "precision": self.precision} | worst


def check(
    graph: str,
    module: nn.Module,
    path: Path,
    images: Sequence[NDArray[np.uint8]],
    *,
    normalisation: Literal["max", "minmax"] = "max",
    runtime: str = "onnxruntime",
    precision: Precision = "fp32",
    min_score: float = 0.0,
) -> ParityReport:
    """Run both on each image, on batches, and on pieces of the first image of EDGE_SIZES.

    Compared: `scores` and `affinities` in absolute terms; `cam` and `logits` relative to the largest value of the map;
    `cam01` where the map is not too quiet for that; the label maps that follow from them, and the output `labels`; and
    each image of a batch with the same image alone.

    Args:
        graph: name, for messages.
        module: the torch graph, in evaluation mode, on the CPU.
        path: the exported graph.
        images: (H, W, 3) uint8, real ones of several sizes.
        precision: of the file, which says what is tolerated.
        min_score: maps of classes with a lower one are not compared, in 16 bits none of tiny images; see CAM_MIN_SCORE.
    Raises:
        ParityError: a difference beyond the tolerance, or outputs of another name, shape or that are not finite.
    """
    runner = open_runner({graph: path}, runtime=runtime)
    try:
        return compare(
            graph,
            module,
            runner,
            images,
            normalisation=normalisation,
            runtime=runtime,
            precision=precision,
            views=getattr(module, "n_views", 1),
            min_score=min_score,
        )
    finally:
        runner.close()


def compare(
    graph: str,
    reference: nn.Module | Runner,
    runner: Runner,
    images: Sequence[NDArray[np.uint8]],
    *,
    normalisation: Literal["max", "minmax"],
    runtime: str,
    precision: Precision,
    views: int,
    max_side: int | None = None,
    min_score: float = 0.0,
) -> ParityReport:
    """`check` of a graph that is open already, with torch or with a runtime that agrees with torch.

    Args:
        runtime: name of `runner`'s, for the record.
        views: that the graph's raw maps are summed over.
        max_side: the longest side that `runner` takes; the edge sizes are cut to it. None = any.
    """
    tolerance = TOLERANCES[precision]
    worst: dict[str, Difference] = {}
    agreeing = compared = n_cases = 0
    for batch in batches(images, max_side):
        n_cases += 1
        size = "x".join(map(str, batch.shape[:3]))
        expected = _expected(reference, graph, batch)
        got = runner.run(graph, batch)
        full_size = got.pop("labels", None)
        _check_form(graph, size, expected, got)
        tiny = precision in HALF_ERROR and min(batch.shape[1:3]) < HALF_MIN_SIDE
        least = math.inf if min_score and tiny else min_score
        likely = partial(without_unlikely, scores=expected.get("scores"), min_score=least)
        expected, got = likely(expected), likely(got)
        mean, expected_mean = _mean_over_views(got, views), _mean_over_views(expected, views)
        found = list(_differences(expected_mean, mean, size, tolerance, normalisation))
        if not isinstance(reference, Runner) and not all(difference.ok for difference in found):
            exact = likely(_exact(reference, batch, expected))
            steady = _steady(expected, exact, tolerance)
            expected = _only(exact, steady)
            expected_mean, mean = _mean_over_views(expected, views), _mean_over_views(_only(got, steady), views)
            found = list(_differences(expected_mean, mean, size, tolerance, normalisation))
        if len(batch) > 1:
            found += _alone(likely(runner.run(graph, batch[:1])), got, size)
        for difference in found:
            _raise_beyond(graph, precision, difference)
            if difference.output not in worst or difference.got > worst[difference.output].got:
                worst[difference.output] = difference
        labels = _labels(expected_mean, mean, tolerance, normalisation)
        if full_size is not None:
            labels += zip(_full_size(expected["logits"], batch), full_size, strict=True)
        for own, other in labels:
            agreeing += int((own == other).sum())
            compared += own.size
    if compared:
        worst["labels"] = Difference("labels", "all", agreeing / compared, tolerance.label_agreement)
        _raise_beyond(graph, precision, worst["labels"])
    return ParityReport(graph, runtime, precision, n_cases, tuple(worst.values()))


def next_power(difference: float) -> float:
    """The smallest power of ten that is not below a difference; 0 stays 0."""
    return 10.0 ** math.ceil(math.log10(difference)) if difference > 0 else 0.0


def without_unlikely(outputs: Arrays, scores: NDArray[np.float32] | None, min_score: float) -> Arrays:
    """With 0 for the maps of classes whose score (B or more, C) is lower; see CAM_MIN_SCORE."""
    if scores is None or not min_score:
        return outputs
    return _only(outputs, scores[: len(outputs["cam"])] >= min_score)


def _only(outputs: Arrays, maps: NDArray[np.bool_] | None) -> Arrays:
    """With 0 for the maps that are not among those (B, C); None = all are."""
    if maps is None:
        return outputs
    return outputs | {"cam": np.where(maps[:, :, None, None], outputs["cam"], np.float32(0))}


def _steady(rounded: Arrays, exact: Arrays, tolerance: Tolerance) -> NDArray[np.bool_] | None:
    """(B, C) maps that torch itself computes in float32 to a quarter of the tolerance; others say nothing of an export.

    In some view of PCM a class may have no answer but noise, which it stretches to [0, 1].
    """
    if "cam" not in rounded:
        return None
    ours = exact["cam"]
    scale = np.maximum(np.abs(ours).max(axis=(2, 3)), CAM_FLOOR)
    steady: NDArray[np.bool_] = np.abs(ours - rounded["cam"]).max(axis=(2, 3)) / scale <= tolerance.raw_cam_rtol / 4
    return steady


def _expected(reference: nn.Module | Runner, graph: str, batch: NDArray[np.uint8]) -> Arrays:
    if isinstance(reference, Runner):
        return {name: value for name, value in reference.run(graph, batch).items() if name != "labels"}
    return _outputs(reference, batch)


def _outputs(module: nn.Module, batch: NDArray[np.uint8]) -> Arrays:
    import torch

    with torch.inference_mode():
        return {name: value.float().numpy() for name, value in module(torch.from_numpy(batch)).items()}


def _mean_over_views(outputs: Arrays, views: int) -> Arrays:
    """A tolerance's floor is about the mean over views, which is what a run stores; the graphs return the sum."""
    return outputs | {name: value / np.float32(views) for name, value in outputs.items() if name == "cam"}


def _exact(module: nn.Module, batch: NDArray[np.uint8], rounded: Arrays) -> Arrays:
    """torch's outputs computed in float64, the arbiter when two float32 results differ by more than the tolerance.

    A quiet class's map is a small difference of large sums: torch and a runtime, each within the tolerance of the exact
    value, can be further than that from each other. `rounded` for a module that cannot compute in float64.
    """
    try:
        return _outputs(module.double(), batch)
    except RuntimeError:
        return rounded
    finally:
        module.float()


def batches(images: Sequence[NDArray[np.uint8]], max_side: int | None = None) -> Iterator[NDArray[np.uint8]]:
    """(B, H, W, 3): each image and each edge size alone, the smallest image and one edge size in a batch of five."""
    edges = [tuple(min(side, max_side or side) for side in size) for size in (*EDGE_SIZES, BATCHED_SIZE)]
    *alone, batched = [cut(images[0], height, width) for height, width in edges]
    yield from (image[None] for image in (*images, *alone))
    for image in (min(images, key=lambda image: image.size), batched):
        yield np.stack([image, image[:, ::-1], image[::-1], image[::-1, ::-1], 255 - image])


def cut(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The top left piece of an image, which is repeated where it is too small."""
    down, across = -(-height // image.shape[0]), -(-width // image.shape[1])
    return np.tile(image, (down, across, 1))[:height, :width]


def _check_form(graph: str, size: str, expected: Arrays, got: Arrays) -> None:
    shapes = ({name: value.shape for name, value in outputs.items()} for outputs in (expected, got))
    ours, theirs = shapes
    if ours != theirs:
        raise ParityError(f"graph {graph}, images {size}: expected the outputs {ours}, got {theirs}: export it again")
    for name, value in got.items():
        if not np.isfinite(value).all():
            raise ParityError(
                f"graph {graph}, output {name}, images {size}: expected finite values, got NaN or infinity"
            )


def _differences(
    expected: Arrays, got: Arrays, size: str, tolerance: Tolerance, normalisation: Literal["max", "minmax"]
) -> Iterator[Difference]:
    for name, ours in expected.items():
        theirs = got[name]
        if name in ("scores", "affinities"):  # in [0, 1]
            yield Difference(name, size, _largest(ours - theirs), tolerance.cam01_atol)
            continue
        axes = (2, 3) if name == "cam" else (1, 2, 3)  # logits compete with each other, so they share a scale
        scale = np.maximum(np.abs(ours).max(axis=axes, keepdims=True), _floor(ours, tolerance))
        yield Difference(name, size, _largest((ours - theirs) / scale), tolerance.raw_cam_rtol)
        if name == "cam":
            for one, other, loud in zip(ours, theirs, _loud(ours, tolerance, normalisation), strict=True):
                apart = normalise(one[loud], normalisation) - normalise(other[loud], normalisation)
                yield Difference("cam01", size, _largest(apart), tolerance.cam01_atol)


def _alone(alone: Arrays, together: Arrays, size: str) -> Iterator[Difference]:
    """How much the first image's outputs change with the company it is in."""
    for name, value in together.items():
        scale = max(1.0, float(np.abs(value[0]).max()))
        yield Difference(f"{name}, alone or batched", size, _largest((alone[name][0] - value[0]) / scale), BATCH_ATOL)


def _floor(maps: NDArray[np.float32], tolerance: Tolerance) -> NDArray[np.float32]:
    """(B, 1, 1, 1): a map that does not exceed it is noise."""
    floor: NDArray[np.float32] = np.maximum(tolerance.quiet * maps.max(axis=(1, 2, 3), keepdims=True), tolerance.floor)
    return floor


def _loud(
    maps: NDArray[np.float32], tolerance: Tolerance, normalisation: Literal["max", "minmax"]
) -> NDArray[np.bool_]:
    """(B, C): which maps are compared in [0, 1]. What `minmax` stretches is their range, however high they lie."""
    reach = maps.max(axis=(2, 3), keepdims=True)
    if normalisation == "minmax":
        reach = reach - maps.min(axis=(2, 3), keepdims=True)
    loud: NDArray[np.bool_] = (reach > _floor(maps, tolerance))[:, :, 0, 0]
    return loud


def _labels(expected: Arrays, got: Arrays, tolerance: Tolerance, normalisation: Literal["max", "minmax"]) -> Pairs:
    """Two label maps per image, at the maps' own resolution; of CAMs with the classes that are loud in the first."""
    if "logits" in expected:
        return list(zip(*(outputs["logits"].argmax(axis=1) for outputs in (expected, got)), strict=True))
    if "cam" not in expected:
        return []
    pairs = []
    which = _loud(expected["cam"], tolerance, normalisation)
    for own, other, loud in zip(expected["cam"], got["cam"], which, strict=True):
        classes = np.flatnonzero(loud)
        maps = (normalise(cam[loud], normalisation) for cam in (own, other))
        one, two = (labels_from_cam(cam01, classes, CAM_THRESHOLD, len(own)) for cam01 in maps)
        pairs.append((one, two))
    return pairs


def _full_size(logits: NDArray[np.float32], batch: NDArray[np.uint8]) -> list[NDArray[Any]]:
    """What the graph's own output `labels` must be."""
    return [labels_from_logits(one, *batch.shape[1:3]) for one in logits]


def _raise_beyond(graph: str, precision: Precision, difference: Difference) -> None:
    if not difference.ok:
        kind = "at least" if difference.output == "labels" else "at most"
        raise ParityError(
            f"graph {graph}, output {difference.output}, images {difference.size} (B x H x W), {precision}: expected "
            f"{kind} {difference.allowed:g} between torch and the exported graph, got {difference.got:.3g}: "
            "it is not written; look for a layer that the exporter translates differently"
        )


def _largest(values: NDArray[np.float32]) -> float:
    return float(np.abs(values).max()) if values.size else 0.0
