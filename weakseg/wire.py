"""weakseg.v1 messages as the client's own types: images and options in, results and errors out. No channel in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import ClassTable, mask_dtype
from weakseg.errors import ConfigError, DataError, ImageError, UnknownClassError
from weakseg.image import FILE_FORMATS, MAX_PIXELS, SERVICE_FORMATS, probe, read_image
from weakseg.manifest import OUTPUT_KINDS, OutputKind, colour_table
from weakseg.masks.coco_rle import labels_from_rles
from weakseg.masks.png import labels_from_png, provenance_of
from weakseg.masks.polygons import Polygon, labels_from_polygons
from weakseg.model import REFINEMENTS, Refinement, Source, rgb_from_pixels
from weakseg.quality import ClassQuality, MaskQuality
from weakseg.result import MaskKind, Result
from weakseg.threshold import Threshold
from weakseg.v1 import segmentation_service_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration

MaskEncoding = Literal["png", "rle", "raw", "polygon"]
HeatmapEncoding = Literal["png", "f16", "f32"]
Priority = Literal["interactive", "bulk"]

_KINDS = dict(
    zip(OUTPUT_KINDS, (pb.OUTPUT_KIND_CAM, pb.OUTPUT_KIND_PSEUDO_MASK, pb.OUTPUT_KIND_SEGMENTATION), strict=True)
)
_KIND_NAMES = {kind: name for name, kind in _KINDS.items()}
_HEATMAP_ENCODINGS = {
    "png": pb.HEATMAP_ENCODING_PNG_GRAY8,
    "f16": pb.HEATMAP_ENCODING_RAW_F16,
    "f32": pb.HEATMAP_ENCODING_RAW_F32,
}
_REFINEMENTS = {
    "none": pb.REFINEMENT_NONE,
    "crf": pb.REFINEMENT_CRF,
    "random_walk": pb.REFINEMENT_RANDOM_WALK,
    "random_walk_crf": pb.REFINEMENT_RANDOM_WALK_CRF,
}
_REFINEMENT_NAMES: dict[int, Refinement] = {_REFINEMENTS[name]: name for name in REFINEMENTS}
_PRIORITIES = {"interactive": pb.PRIORITY_INTERACTIVE, "bulk": pb.PRIORITY_BULK}
_STAGES = ("queue", "decode", "infer", "postprocess", "encode")


class SegmentOptions(TypedDict, total=False):
    """What to compute of an image; the names and meanings of `weakseg.Model.segment`.

    outputs: of "cam", "pseudo_mask", "segmentation"; None = the segmentation, or what the model has instead.
    tags: names of the classes in the image, if that is known.
    threshold, refine: of the pseudo-mask; None = as the model's manifest says.
    heatmap_max_side, heatmap_classes: of the CAMs; None = as the network gives them, of the present classes.
    quality: also say how sure the masks are of themselves, `Result.quality`.
    ignore_orientation: take the pixels as they are stored, whatever the EXIF orientation says.
    reduced_decoding: decode JPEG files faster, and a little less exactly, see `weakseg.Model.segment`.
    priority: "bulk" gives way to "interactive", the default, on a server that is busy.
    mask_encoding: "png" is the smallest; all are lossless.
    heatmap_encoding: "f16" is within 5e-4, "png" within 2e-3 and smaller, "f32" exact.
    """

    outputs: Sequence[OutputKind] | None
    tags: Sequence[str] | None
    threshold: float | None
    refine: Refinement | bool | None
    heatmap_max_side: int | None
    heatmap_classes: Sequence[str] | None
    quality: bool
    ignore_orientation: bool
    reduced_decoding: bool
    priority: Priority
    mask_encoding: MaskEncoding
    heatmap_encoding: HeatmapEncoding


@dataclass(frozen=True, eq=False)
class ModelInfo:
    """What a server says about a version of a model; see `Model` in the .proto for the fields.

    drift: score by signal of `Client.model()`; see `Drift` there.
    """

    name: str
    version: str
    state: Literal["loading", "ready", "unloading", "failed"]
    failure: str
    sha256: str
    classes: ClassTable | None  # None unless ready
    palette: NDArray[np.uint8]
    outputs: tuple[OutputKind, ...]
    provider: str
    max_batch: int
    max_pixels: int
    max_message_bytes: int
    max_side: int
    presence: float
    refinements: tuple[Refinement, ...]
    drift: Mapping[str, float]

    @property
    def id(self) -> str:
        return f"{self.name}/{self.version}"


@dataclass(frozen=True, eq=False)
class Outgoing:
    """An image on its way. pixels: those of images that came as pixels, for the result's overlay."""

    message: pb.Image
    pixels: NDArray[np.uint8] | None = None


def info_from_message(message: pb.Model) -> ModelInfo:
    names = tuple(info.name for info in message.classes if info.id > 0)
    colours = [(info.rgb >> 16 & 255, info.rgb >> 8 & 255, info.rgb & 255) for info in message.classes]
    states: dict[int, Literal["loading", "ready", "unloading", "failed"]] = {
        pb.MODEL_STATE_LOADING: "loading",
        pb.MODEL_STATE_READY: "ready",
        pb.MODEL_STATE_UNLOADING: "unloading",
    }
    return ModelInfo(
        name=message.ref.name,
        version=message.ref.version,
        state=states.get(message.state, "failed"),
        failure=message.failure,
        sha256=message.sha256,
        classes=ClassTable(names) if names else None,
        palette=colour_table(colours or [(0, 0, 0)]),
        outputs=tuple(_KIND_NAMES[kind] for kind in message.output_kinds if kind in _KIND_NAMES),
        provider=message.execution_provider,
        max_batch=message.max_batch_size,
        max_pixels=message.max_image_pixels,
        max_message_bytes=message.max_message_bytes,
        max_side=message.max_side,
        presence=message.presence_threshold,
        refinements=tuple(_REFINEMENT_NAMES[value] for value in message.refinements if value in _REFINEMENT_NAMES),
        drift={signal.name: signal.score for signal in message.drift.signals},
    )


def outgoing_from_source(source: Source, *, ignore_orientation: bool = False) -> Outgoing:
    """JPEG, PNG and WebP travel as they are; other files and pixels are decoded here and travel raw.

    Raises:
        ImageError: a file that is missing or no image. DataError: pixels of another shape or type.
    """
    if isinstance(source, (str, Path)):
        try:
            return _outgoing_from_file(Path(source).read_bytes(), ignore_orientation)
        except OSError as error:
            raise ImageError(f"{source}: expected an image file, got: {error.strerror or error}") from error
        except ImageError as error:
            raise ImageError(f"{source}: {error}", error.reason) from error
    if isinstance(source, bytes):
        return _outgoing_from_file(source, ignore_orientation)
    return _outgoing_from_pixels(rgb_from_pixels(source, ignore_orientation=ignore_orientation))


def segment_request(
    image: Outgoing, info: ModelInfo, options: SegmentOptions, request_id: str = ""
) -> pb.SegmentRequest:
    """The message for a ready model.

    Raises:
        UnknownClassError: a tag that the model does not have. ConfigError: another option.
    """
    unknown = set(options) - SegmentOptions.__annotations__.keys()
    if unknown:
        raise ConfigError(f"unknown option {min(unknown)!r}: expected {', '.join(SegmentOptions.__annotations__)}")
    tags = options.get("tags")
    request = pb.SegmentRequest(
        request_id=request_id,
        model=pb.ModelRef(name=info.name, version=info.version),
        image=image.message,
        outputs=[_spec(kind, info, options) for kind in _output_kinds(options.get("outputs"), info)],
        tags=None if tags is None else pb.Tags(class_ids=_class_ids(tags, info)),
        priority=_choice("priority", options.get("priority", "interactive"), _PRIORITIES),
    )
    request.image.reduced_decoding = options.get("reduced_decoding", False)
    return request


def result_from_response(response: pb.SegmentResponse, info: ModelInfo, image: Outgoing) -> Result:
    """The result that `weakseg.Model.segment` gives, as far as the encodings are exact.

    Raises:
        DataError: a response that is damaged.
    """
    assert info.classes is not None
    labels: dict[MaskKind, NDArray[Any]] = {}
    quality: dict[MaskKind, MaskQuality] = {}
    heatmaps: dict[str, NDArray[np.float32]] = {}
    threshold: Threshold | None = None
    made: dict[str, Any] = {}
    refined_by: Refinement | None = None
    for output in response.outputs:
        if output.HasField("heatmaps"):
            for heatmap in output.heatmaps.heatmaps:
                heatmaps[info.classes.names[heatmap.class_id - 1]] = cam01_from_heatmap(heatmap)
        else:
            kind: MaskKind = "segmentation" if output.kind == pb.OUTPUT_KIND_SEGMENTATION else "pseudo_mask"
            labels[kind] = labels_from_mask(output.mask, info.classes)
            if output.HasField("quality"):
                quality[kind] = _quality(output.quality, info.classes)
        if output.HasField("threshold"):
            made = provenance_of(output.mask.data) if output.mask.encoding == pb.MASK_ENCODING_PNG_INDEX else {}
            threshold = Threshold(output.threshold.value, output.threshold.rule, str(made.get("provenance", "")))
            refined_by = _REFINEMENT_NAMES.get(output.refinement)
    return Result(
        info.classes,
        info.palette,
        response.image_height,
        response.image_width,
        segmentation=labels.get("segmentation"),
        pseudo_mask=labels.get("pseudo_mask"),
        heatmaps=heatmaps,
        scores={score.label: score.score for score in response.scores},
        present=tuple(score.label for score in response.scores if score.present),
        model=f"{response.model.name}/{response.model.version}",
        model_sha256=response.model_sha256,
        threshold=threshold,
        refinement={key: made[key] for key in ("band", "crf", "random_walk") if key in made},
        refined_by=refined_by,
        refinement_cut_short=any(output.refinement_cut_short for output in response.outputs),
        quality=quality,
        seconds={stage: _seconds(getattr(response.timing, stage)) for stage in _STAGES},
        image=image.pixels,
    )


def labels_from_mask(mask: pb.Mask, classes: ClassTable) -> NDArray[Any]:
    """(height, width) label map of a mask in any encoding.

    Raises:
        DataError: one that is damaged.
    """
    dtype = mask_dtype(len(classes))
    if mask.encoding == pb.MASK_ENCODING_COCO_RLE:
        return labels_from_rles({rle.class_id: rle.counts for rle in mask.rle}, mask.height, mask.width, dtype)
    if mask.encoding == pb.MASK_ENCODING_POLYGON:
        return labels_from_polygons(map(_polygon, mask.polygons), mask.height, mask.width, dtype)
    if mask.encoding == pb.MASK_ENCODING_PNG_INDEX:
        labels: NDArray[Any] = labels_from_png(mask.data)
    else:
        wire = np.dtype(np.uint8) if mask.encoding == pb.MASK_ENCODING_RAW_U8 else np.dtype("<u2")
        labels = _raster(mask.data, mask.height, mask.width, wire).astype(dtype)
    if labels.shape != (mask.height, mask.width):
        raise DataError(f"expected a mask of {mask.width}x{mask.height}, got {labels.shape[1]}x{labels.shape[0]}")
    return labels


def cam01_from_heatmap(heatmap: pb.Heatmap) -> NDArray[np.float32]:
    """(h, w) float32 in [0, 1]."""
    if heatmap.encoding == pb.HEATMAP_ENCODING_PNG_GRAY8:
        return labels_from_png(heatmap.data).astype(np.float32) / np.float32(255)
    wire = np.dtype("<f2" if heatmap.encoding == pb.HEATMAP_ENCODING_RAW_F16 else "<f4")
    return _raster(heatmap.data, heatmap.height, heatmap.width, wire).astype(np.float32)


def _outgoing_from_file(data: bytes, ignore_orientation: bool) -> Outgoing:
    if probe(data, formats=FILE_FORMATS).format in SERVICE_FORMATS:
        return Outgoing(pb.Image(encoded=data, ignore_orientation=ignore_orientation))
    return _outgoing_from_pixels(read_image(data, max_pixels=MAX_PIXELS, ignore_orientation=ignore_orientation))


def _outgoing_from_pixels(rgb: NDArray[np.uint8]) -> Outgoing:
    height, width = rgb.shape[:2]
    return Outgoing(pb.Image(raw=pb.RawImage(width=width, height=height, rgb=rgb.tobytes())), rgb)


def _output_kinds(outputs: Sequence[OutputKind] | None, info: ModelInfo) -> Sequence[OutputKind]:
    if outputs is None:
        return ("segmentation",) if "segmentation" in info.outputs else info.outputs
    if isinstance(outputs, str) or not outputs or any(kind not in _KINDS for kind in outputs):
        raise ConfigError(f"outputs must be some of {', '.join(_KINDS)}, got {outputs!r}")
    return tuple(dict.fromkeys(outputs))


def _spec(kind: OutputKind, info: ModelInfo, options: SegmentOptions) -> pb.OutputSpec:
    spec = pb.OutputSpec(kind=_KINDS[kind])
    if kind == "cam":
        spec.heatmap_encoding = _choice("heatmap_encoding", options.get("heatmap_encoding", "f16"), _HEATMAP_ENCODINGS)
        spec.heatmap_max_side = options.get("heatmap_max_side") or 0
        shown = options.get("heatmap_classes")
        spec.class_ids.extend([] if shown is None else _class_ids(shown, info))
        return spec
    assert info.classes is not None
    raw = pb.MASK_ENCODING_RAW_U8 if mask_dtype(len(info.classes)) is np.uint8 else pb.MASK_ENCODING_RAW_U16
    encodings = {
        "png": pb.MASK_ENCODING_PNG_INDEX,
        "rle": pb.MASK_ENCODING_COCO_RLE,
        "raw": raw,
        "polygon": pb.MASK_ENCODING_POLYGON,
    }
    spec.quality = options.get("quality", False)
    spec.mask_encoding = _choice("mask_encoding", options.get("mask_encoding", "png"), encodings)
    if kind == "pseudo_mask":
        threshold, refine = options.get("threshold"), options.get("refine")
        if threshold is not None:
            spec.background_threshold = threshold
        if refine is not None:
            name = ("crf" if refine else "none") if isinstance(refine, bool) else refine
            spec.refinement = _choice("refine", name, _REFINEMENTS)
    return spec


def _choice(option: str, value: str, choices: Mapping[str, Any]) -> Any:
    if value not in choices:
        raise ConfigError(f"{option} must be one of {', '.join(choices)}, got {value!r}")
    return choices[value]


def _class_ids(names: Sequence[str], info: ModelInfo) -> list[int]:
    assert info.classes is not None
    if isinstance(names, str):
        raise UnknownClassError(f"expected a list of class names, got the text {names!r}: write [{names!r}]")
    return sorted({info.classes.mask_value(name) for name in names})


def _quality(message: pb.MaskQuality, classes: ClassTable) -> MaskQuality:
    names = ("background", *classes.names)
    return MaskQuality(
        tuple(
            ClassQuality(one.class_id, names[one.class_id], one.area_pixels, _set(one, "mean_confidence"))
            for one in message.classes
        ),
        message.undecided_pixels,
        _set(message, "mean_confidence"),
        _set(message, "mean_entropy"),
    )


def _set(message: pb.ClassQuality | pb.MaskQuality, field: Any) -> float | None:
    return getattr(message, field) if message.HasField(field) else None


def _polygon(message: pb.Polygon) -> Polygon:
    return Polygon(message.class_id, _points(message.outer), tuple(map(_points, message.holes)))


def _points(ring: pb.Ring) -> NDArray[np.float32]:
    if len(ring.xy) % 2:
        raise DataError(f"expected a ring of pairs x, y, got {len(ring.xy)} numbers")
    return np.fromiter(ring.xy, np.float32, len(ring.xy)).reshape(-1, 2)


def _raster(data: bytes, height: int, width: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    if len(data) != height * width * dtype.itemsize:
        raise DataError(f"expected {height} x {width} values of {dtype}, got {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(height, width)


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
