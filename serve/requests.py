"""Wire messages to jobs: every field is checked here, before anything costs time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serve.encode import KIND_NAMES, REFINEMENT_NAMES, check_mask_encoding
from serve.lanes import Priority
from weakseg.cam import threshold_from_alpha
from weakseg.classes import ClassTable
from weakseg.errors import ImageError, InvalidRequestError, UnknownClassError
from weakseg.manifest import OutputKind
from weakseg.masks.polygons import MAX_TOLERANCE_PX
from weakseg.model import Model, Request
from weakseg.v1 import segmentation_service_pb2 as pb

MAX_REQUEST_ID = 128
MAX_PAGE = 1000
MAX_PAGE_TOKEN = 1024  # name/version, which are names of folders; a number of 5000 digits is more than int() takes
DEFAULT_PAGE = 100
RANGES: dict[Literal["background_threshold", "background_alpha", "polygon_tolerance"], tuple[float, float]] = {
    "background_threshold": (0.001, 0.999),
    "background_alpha": (0.01, 1000.0),
    "polygon_tolerance": (0.0, MAX_TOLERANCE_PX),
}
MASK_ENCODINGS = frozenset(pb.MaskEncoding.values())
HEATMAP_ENCODINGS = frozenset(pb.HeatmapEncoding.values())
REFINEMENTS = frozenset(pb.Refinement.values())
PRIORITY_NAMES: dict[int, Priority] = {
    pb.PRIORITY_UNSPECIFIED: "interactive",
    pb.PRIORITY_INTERACTIVE: "interactive",
    pb.PRIORITY_BULK: "bulk",
}


def check_request(message: pb.SegmentRequest, max_pixels: int) -> None:
    """What can be said without the model.

    Raises:
        InvalidRequestError: `field` is the path of what is wrong.
        ImageError: IMAGE_TOO_LARGE, a raw image above `max_pixels`.
    """
    if len(message.request_id) > MAX_REQUEST_ID:
        raise InvalidRequestError(
            f"request_id must have at most {MAX_REQUEST_ID} characters, got {len(message.request_id)}", "request_id"
        )
    if message.priority not in PRIORITY_NAMES:
        raise InvalidRequestError(f"expected INTERACTIVE or BULK, got {message.priority}", "priority")
    if not message.outputs:
        raise InvalidRequestError("expected at least one output, got none: ask for a SEGMENTATION", "outputs")
    if len(message.outputs) > len(KIND_NAMES):
        raise InvalidRequestError(
            f"expected at most {len(KIND_NAMES)} outputs, one of each kind, got {len(message.outputs)}", "outputs"
        )
    seen: set[int] = set()
    for i, spec in enumerate(message.outputs):
        _check_output(spec, f"outputs[{i}]", seen)
    _check_image(message.image, max_pixels)


def request_from_message(message: pb.SegmentRequest, model: Model) -> Request:
    """The message in the model's terms, after `check_request`.

    Raises:
        InvalidRequestError: an id that is no class (reason UNKNOWN_CLASS).
        OutputUnsupportedError: the model does not have an output or an affinity graph, or an output not this encoding.
    """
    specs = {KIND_NAMES[spec.kind]: (i, spec) for i, spec in enumerate(message.outputs)}
    for spec in message.outputs:
        check_mask_encoding(spec.mask_encoding, model.classes)
    kinds: list[OutputKind] = list(specs)
    tags = _names(message.tags.class_ids, model.classes, "tags.class_ids") if message.HasField("tags") else None
    threshold = refine = max_side = shown = None
    if "pseudo_mask" in specs:
        _, spec = specs["pseudo_mask"]
        threshold, refine = _threshold(spec), REFINEMENT_NAMES.get(spec.refinement)
    if "cam" in specs:
        i, spec = specs["cam"]
        max_side = spec.heatmap_max_side or None
        shown = _names(spec.class_ids, model.classes, f"outputs[{i}].class_ids") if spec.class_ids else None
    return model.request(
        outputs=kinds,
        tags=tags,
        threshold=threshold,
        refine=refine,
        heatmap_max_side=max_side,
        heatmap_classes=shown,
        quality=any(spec.quality for name, (_, spec) in specs.items() if name != "cam"),
    )


def image_from_message(image: pb.Image) -> bytes | NDArray[np.uint8]:
    """The encoded file, or (H, W, 3) uint8. For a thread, unless it is small: the bytes of a
    message are copied each time they are read.

    Raises:
        InvalidRequestError: raw pixels that are not as many as they should be.
    """
    if image.WhichOneof("source") == "encoded":
        return image.encoded
    width, height, rgb = image.raw.width, image.raw.height, image.raw.rgb
    if len(rgb) != width * height * 3:
        raise InvalidRequestError(
            f"expected {width} * {height} * 3 = {width * height * 3} bytes, got {len(rgb)}", "image.raw.rgb"
        )
    return np.frombuffer(rgb, dtype=np.uint8).reshape(height, width, 3)


def page_size(request: pb.ListModelsRequest) -> int:
    if request.page_size < 0:
        raise InvalidRequestError(f"page_size must not be negative, got {request.page_size}", "page_size")
    return min(request.page_size or DEFAULT_PAGE, MAX_PAGE)


def _check_output(spec: pb.OutputSpec, path: str, seen: set[int]) -> None:
    if spec.kind not in KIND_NAMES:
        raise InvalidRequestError(f"expected CAM, PSEUDO_MASK or SEGMENTATION, got {spec.kind}", f"{path}.kind")
    if spec.kind in seen:
        raise InvalidRequestError(f"{pb.OutputKind.Name(spec.kind)} is asked for twice", f"{path}.kind")
    seen.add(spec.kind)
    for field, known in (
        ("mask_encoding", MASK_ENCODINGS),
        ("heatmap_encoding", HEATMAP_ENCODINGS),
        ("refinement", REFINEMENTS),
    ):
        if getattr(spec, field) not in known:
            raise InvalidRequestError(f"{getattr(spec, field)} is no {field}", f"{path}.{field}")
    for field, (low, high) in RANGES.items():
        if spec.HasField(field) and not low <= getattr(spec, field) <= high:
            raise InvalidRequestError(
                f"{field} must lie from {low} to {high}, got {getattr(spec, field)}", f"{path}.{field}"
            )
    if spec.HasField("background_threshold") and spec.HasField("background_alpha"):
        raise InvalidRequestError(
            "background_threshold and background_alpha say the same in two ways: give one of them",
            f"{path}.background_alpha",
        )


def _check_image(image: pb.Image, max_pixels: int) -> None:
    source = image.WhichOneof("source")
    if source is None:
        raise InvalidRequestError("expected an image, got none: set image.encoded or image.raw", "image")
    if source == "encoded":
        return
    width, height = image.raw.width, image.raw.height
    if width < 1 or height < 1:
        raise InvalidRequestError(f"expected at least 1x1 pixels, got {width}x{height}", "image.raw")
    if width * height > max_pixels:
        raise ImageError(
            f"expected at most {max_pixels} pixels, got {width}x{height}: scale the image down", "IMAGE_TOO_LARGE"
        )


def _threshold(spec: pb.OutputSpec) -> float | None:
    if spec.HasField("background_alpha"):
        return threshold_from_alpha(spec.background_alpha)
    return spec.background_threshold if spec.HasField("background_threshold") else None


def _names(ids: Sequence[int], classes: ClassTable, path: str) -> list[str]:
    if len(ids) > len(classes):
        raise InvalidRequestError(f"expected at most {len(classes)} class ids, got {len(ids)}", path)
    names = []
    for i, id_ in enumerate(ids):
        if not 1 <= id_ <= len(classes):
            error = InvalidRequestError(f"expected class ids from 1 to {len(classes)}, got {id_}", f"{path}[{i}]")
            error.reason = UnknownClassError.reason
            raise error
        names.append(classes.names[id_ - 1])
    return names
