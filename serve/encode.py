"""Results to wire messages: arrays become PNG, run lengths, polygons or raw bytes. Runs in a thread."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from time import monotonic
from typing import Any

import numpy as np
from google.protobuf import duration_pb2
from numpy.typing import NDArray
from PIL import Image

from serve.drift import Drift
from serve.job import Answer
from weakseg.classes import ClassTable, ignore_value, mask_dtype
from weakseg.errors import OutputUnsupportedError, ResponseTooLargeError
from weakseg.manifest import OutputKind
from weakseg.masks.coco_rle import rles_from_labels
from weakseg.masks.png import png_from_labels
from weakseg.masks.polygons import Polygon, polygons_from_labels
from weakseg.model import Refinement
from weakseg.quality import MaskQuality
from weakseg.result import Result
from weakseg.v1 import segmentation_service_pb2 as pb

KIND_NAMES: dict[int, OutputKind] = {
    pb.OUTPUT_KIND_CAM: "cam",
    pb.OUTPUT_KIND_PSEUDO_MASK: "pseudo_mask",
    pb.OUTPUT_KIND_SEGMENTATION: "segmentation",
}
REFINEMENT_NAMES: dict[pb.Refinement.ValueType, Refinement] = {
    pb.REFINEMENT_NONE: "none",
    pb.REFINEMENT_CRF: "crf",
    pb.REFINEMENT_RANDOM_WALK: "random_walk",
    pb.REFINEMENT_RANDOM_WALK_CRF: "random_walk_crf",
}
REFINEMENTS = {name: value for value, name in REFINEMENT_NAMES.items()}
_RAW_DTYPES: dict[int, Any] = {pb.MASK_ENCODING_RAW_U8: np.uint8, pb.MASK_ENCODING_RAW_U16: np.dtype("<u2")}


def response_from_answer(
    answer: Answer, request: pb.SegmentRequest, limit_bytes: int
) -> tuple[pb.SegmentResponse, int]:
    """The reply to a valid request, and its size in bytes, which to ask for costs as much as to serialise it.

    Raises:
        ResponseTooLargeError: above `limit_bytes`.
    """
    started = monotonic()
    result = answer.result
    name, version = result.model.split("/")
    response = pb.SegmentResponse(
        request_id=request.request_id,
        model=pb.ModelRef(name=name, version=version),
        model_sha256=result.model_sha256,
        image_width=result.width,
        image_height=result.height,
        scores=_scores(result),
        outputs=[_output(result, spec) for spec in request.outputs],
        timing=pb.Timing(
            **{stage: duration_from_seconds(seconds) for stage, seconds in answer.seconds.items()},
            batch_size=answer.batch_size,
            max_batch_size=answer.max_batch_size,
            max_batch_delay=duration_from_seconds(answer.max_batch_delay_s),
        ),
    )
    response.timing.encode.CopyFrom(duration_from_seconds(monotonic() - started))
    size = response.ByteSize()
    if size > limit_bytes:
        raise ResponseTooLargeError(
            f"expected a response of at most {limit_bytes} bytes, got {size}: ask for fewer classes, "
            "a smaller heatmap_max_side or a PNG encoding"
        )
    return response, size


def check_mask_encoding(encoding: pb.MaskEncoding.ValueType, classes: ClassTable) -> None:
    """Raises OutputUnsupportedError for an encoding that `mask_from_labels` does not have for so many classes."""
    if encoding == pb.MASK_ENCODING_RAW_U8 and mask_dtype(len(classes)) is not np.uint8:
        raise OutputUnsupportedError(
            f"RAW_U8 holds at most 254 classes, this model has {len(classes)}: ask for RAW_U16"
        )


def mask_from_labels(
    labels: NDArray[Any],
    encoding: pb.MaskEncoding.ValueType,
    palette: NDArray[np.uint8],
    *,
    ignore: bool,
    text: Mapping[str, str] | None = None,
    tolerance_px: float = 0.0,
) -> pb.Mask:
    """A label map (H, W), uint8 or uint16, on the wire.

    `ignore` says that pixels may have the IGNORE value; `text` goes into a PNG, other encodings have no place for it;
    `tolerance_px` is for polygons.
    """
    encoding = encoding or pb.MASK_ENCODING_PNG_INDEX
    mask = pb.Mask(width=labels.shape[1], height=labels.shape[0], encoding=encoding)
    if ignore:
        mask.ignore_index = ignore_value(labels)
    if encoding == pb.MASK_ENCODING_PNG_INDEX:
        mask.data = png_from_labels(labels, palette[:256], text)
    elif encoding == pb.MASK_ENCODING_COCO_RLE:
        mask.rle.extend(pb.CocoRle(class_id=id_, counts=counts) for id_, counts in rles_from_labels(labels).items())
    elif encoding == pb.MASK_ENCODING_POLYGON:
        mask.polygons.extend(_polygon(polygon) for polygon in polygons_from_labels(labels, tolerance_px))
    else:
        mask.data = labels.astype(_RAW_DTYPES[encoding], casting="safe").tobytes()
    return mask


def heatmap_from_cam01(cam01: NDArray[np.float32], class_id: int, encoding: pb.HeatmapEncoding.ValueType) -> pb.Heatmap:
    """One map (h, w) in [0, 1] on the wire."""
    encoding = encoding or pb.HEATMAP_ENCODING_PNG_GRAY8
    if encoding == pb.HEATMAP_ENCODING_RAW_F16:
        data = cam01.astype("<f2").tobytes()
    elif encoding == pb.HEATMAP_ENCODING_RAW_F32:
        data = cam01.astype("<f4").tobytes()
    else:
        buffer = io.BytesIO()
        grey = np.rint(np.clip(cam01, 0, 1) * 255).astype(np.uint8)
        Image.fromarray(grey).save(buffer, "PNG", compress_level=1)
        data = buffer.getvalue()
    height, width = cam01.shape
    return pb.Heatmap(
        class_id=class_id,
        width=width,
        height=height,
        encoding=encoding,
        data=data,
        min_value=float(cam01.min()),
        max_value=float(cam01.max()),
    )


@lru_cache(maxsize=64)  # of a thousand classes they take 2 ms of the event loop
def class_infos(names: tuple[str, ...], palette: tuple[tuple[int, int, int], ...]) -> Sequence[pb.ClassInfo]:
    """Rows of the class table, background first; `palette` is the manifest's."""
    return [
        pb.ClassInfo(id=value, name=name, rgb=red << 16 | green << 8 | blue)
        for value, (name, (red, green, blue)) in enumerate(zip(("background", *names), palette, strict=True))
    ]


def drift_message(drift: Drift) -> pb.Drift:
    return pb.Drift(
        n_images=drift.n_images,
        signals=[pb.DriftSignal(name=name, score=score) for name, score in drift.scores.items()],
        classes=[
            pb.ClassDrift(
                class_id=c + 1,
                label=row.name,
                training_share=row.training,
                served_share=row.served,
                score=row.score,
            )
            for c, row in enumerate(drift.classes)
        ],
    )


def duration_from_seconds(seconds: float) -> duration_pb2.Duration:
    whole, rest = divmod(round(seconds * 1e9), 10**9)
    return duration_pb2.Duration(seconds=whole, nanos=rest)


def _scores(result: Result) -> Iterable[pb.ClassScore]:
    for c, name in enumerate(result.classes.names):
        if name in result.scores:
            yield pb.ClassScore(class_id=c + 1, label=name, score=result.scores[name], present=name in result.present)


def _polygon(polygon: Polygon) -> pb.Polygon:
    outer, *holes = (pb.Ring(xy=ring.ravel().tolist()) for ring in (polygon.outer, *polygon.holes))
    return pb.Polygon(class_id=polygon.value, outer=outer, holes=holes)


def _output(result: Result, spec: pb.OutputSpec) -> pb.Output:
    kind = KIND_NAMES[spec.kind]
    if kind == "cam":
        index = {name: c + 1 for c, name in enumerate(result.classes.names)}
        maps = (heatmap_from_cam01(m, index[name], spec.heatmap_encoding) for name, m in result.heatmaps.items())
        return pb.Output(kind=spec.kind, heatmaps=pb.HeatmapSet(heatmaps=maps))
    labels = result.segmentation if kind == "segmentation" else result.pseudo_mask
    assert labels is not None, f"the model gave no {kind} though it was asked for one"
    is_pseudo = kind == "pseudo_mask"
    mask = mask_from_labels(
        labels,
        spec.mask_encoding,
        result.palette,
        ignore=is_pseudo,
        text=result.mask_text(kind),
        tolerance_px=spec.polygon_tolerance,
    )
    output = pb.Output(kind=spec.kind, mask=mask)
    if is_pseudo and result.threshold is not None:
        output.threshold.value, output.threshold.rule = result.threshold.t, result.threshold.rule
    if is_pseudo and result.refined_by is not None:
        output.refinement, output.refinement_cut_short = REFINEMENTS[result.refined_by], result.refinement_cut_short
    if spec.quality:
        output.quality.CopyFrom(_quality(result.quality[kind]))
    return output


def _quality(quality: MaskQuality) -> pb.MaskQuality:
    return pb.MaskQuality(
        classes=[
            pb.ClassQuality(class_id=one.value, area_pixels=one.area_px, mean_confidence=one.confidence)
            for one in quality.classes
        ],
        undecided_pixels=quality.undecided_px,
        mean_confidence=quality.confidence,
        mean_entropy=quality.entropy,
    )
