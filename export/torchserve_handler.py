"""What a worker of TorchServe runs: an image in, masks out, by `weakseg.load` of the bundle beside this file.

Its source goes into the archive, so it imports nothing but weakseg, and has one class: TorchServe takes the only one.
A request that cannot be answered gets a status and a reason of its own; the others of its batch are answered.

Images are worked on one after the other, exactly as `Model.segment` does it: a batch of TorchServe saves messages, not
arithmetic. docs/torchserve.md lists fields and replies.
"""

from __future__ import annotations

import base64
import difflib
import io
import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image

import weakseg
from weakseg.classes import BACKGROUND, ignore_value
from weakseg.errors import InvalidRequestError, WeaksegError
from weakseg.image import SERVICE_FORMATS
from weakseg.masks.coco_rle import rles_from_labels
from weakseg.model import Model
from weakseg.result import MASK_KINDS, MaskKind, Result

Reply: TypeAlias = tuple[int, str, bytes]  # HTTP status, content type, body
Format = Literal["json", "coco_rle", "png"]

BUNDLE = "bundle"  # its folder in the archive
IMAGE_FIELDS = ("body", "data")  # what TorchServe calls the body of a POST, and what its clients call a part
OPTIONS = ("outputs", "tags", "threshold", "refine", "cam", "heatmap_max_side")  # of `Model.segment`
HEADER_PREFIX = "weakseg-"  # a POST whose body is the image has its options in headers: weakseg-heatmap-max-side
ROUTING = ("model_name", "model_version")  # /invocations puts its whole query among the fields
FORMATS: tuple[Format, ...] = ("json", "coco_rle", "png")
STATUS = {"IMAGE_TOO_LARGE": 413, "UNSUPPORTED_FORMAT": 415, "MODEL_FAILED": 500}  # by reason; others are 400

log = logging.getLogger(__name__)


class Handler:
    """One worker. WEAKSEG_RUNTIME, _PRECISION, _THREADS and _PUBLIC_KEY are the arguments of `weakseg.load`."""

    def initialize(self, context: Any) -> None:
        """Open the bundle; its errors end the worker, and stand in its log."""
        self.model = weakseg.load(Path(context.system_properties["model_dir"]) / BUNDLE, **_settings(os.environ))
        log.info("weakseg: %s on %s", self.model.manifest.id, self.model.runner.provider)

    def handle(self, requests: Sequence[Mapping[str, Any]], context: Any) -> list[bytes]:
        """The body of each reply, in order; `context` is told status and content type."""
        bodies = []
        for i, fields in enumerate(requests):
            headers = options_from_headers(context.get_all_request_header(i))
            status, content_type, body = reply(self.model, headers | dict(fields))
            context.set_response_status(status, HTTPStatus(status).phrase, i)
            context.set_response_content_type(i, content_type)
            bodies.append(body)
        return bodies


def options_from_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a request's headers are: `Weakseg-Format: png` is {"format": "png"}; letter case is ignored."""
    named = {name.lower(): value for name, value in headers.items()}
    return {
        name.removeprefix(HEADER_PREFIX).replace("-", "_"): value
        for name, value in named.items()
        if name.startswith(HEADER_PREFIX)
    }


def reply(model: Model, fields: Mapping[str, Any]) -> Reply:
    """Answer one request; never raises, so that one request does not take its batch with it.

    Args:
        fields: {name: bytes-like, text or parsed JSON}: the image and the options, as TorchServe hands them over.
    """
    try:
        return 200, *_answer(model, fields)
    except WeaksegError as error:
        return _error(STATUS.get(error.reason, 400), error.reason, str(error))
    except Exception:
        error_id = uuid.uuid4().hex
        log.exception("weakseg: error %s", error_id)
        return _error(500, "INTERNAL", f"an internal error; its trace is in the worker's log under {error_id}")


def _answer(model: Model, fields: Mapping[str, Any]) -> tuple[str, bytes]:
    _refuse_unknown(fields)
    form = _format(fields)
    request = model.request(**{name: _option(name, fields[name]) for name in OPTIONS if name in fields})
    if form == "png" and len(set(request.outputs) & set(MASK_KINDS)) != 1:
        raise InvalidRequestError(
            f"format=png is one mask, got outputs={','.join(request.outputs)}: ask for one of {', '.join(MASK_KINDS)}",
            "outputs",
        )
    decoded = model.decode(_image(fields), formats=SERVICE_FORMATS)
    result = model.finish(decoded, model.infer(decoded, request), request)
    if form == "png":
        return "image/png", result.mask_png()
    return "application/json", _json(described(result, form))


def described(result: Result, form: Format = "json") -> dict[str, Any]:
    """A result as JSON can hold it; classes are told by mask value (`id`) and name."""
    return {
        "model": result.model,
        "model_sha256": result.model_sha256,
        "width": result.width,
        "height": result.height,
        "scores": result.scores,
        "present": list(result.present),
        "masks": {kind: _mask(result, kind, form) for kind in result.mask_kinds},
        "heatmaps": {name: _base64(_grey_png(cam01)) for name, cam01 in result.heatmaps.items()},
    }


def _mask(result: Result, kind: MaskKind, form: Format) -> dict[str, Any]:
    labels = getattr(result, kind)
    names = {BACKGROUND: "background", ignore_value(labels): "ignore"}
    names |= {c + 1: name for c, name in enumerate(result.classes.names)}
    out: dict[str, Any] = {}
    if form == "coco_rle":
        size = [result.height, result.width]
        rles = {value: {"size": size, "counts": counts.decode()} for value, counts in rles_from_labels(labels).items()}
        out["classes"] = [{"id": value, "name": names[value], "rle": rle} for value, rle in rles.items()]
    else:
        out["classes"] = [{"id": int(value), "name": names[int(value)]} for value in np.unique(labels)]
        out["png"] = _base64(result.mask_png(kind))
    if kind == "pseudo_mask" and result.threshold is not None:
        out |= {"threshold": result.threshold.to_dict(), "refinement": result.refinement}
    return out


def _settings(env: Mapping[str, str]) -> dict[str, Any]:
    kinds: dict[str, Callable[[str], Any]] = {"runtime": str, "precision": str, "threads": int, "public_key": Path}
    named = {name: f"WEAKSEG_{name.upper()}" for name in kinds}
    return {name: kinds[name](env[variable]) for name, variable in named.items() if variable in env}


def _refuse_unknown(fields: Mapping[str, Any]) -> None:
    known = (*IMAGE_FIELDS, "format", *OPTIONS)
    for name in fields:
        if name not in known and name not in ROUTING:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise InvalidRequestError(f"unknown field {name!r}: {hint}", name)


def _format(fields: Mapping[str, Any]) -> Format:
    asked = _text("format", fields.get("format", "json"))
    for form in FORMATS:
        if asked == form:
            return form
    raise InvalidRequestError(f"format must be one of {', '.join(FORMATS)}, got {asked!r}", "format")


def _image(fields: Mapping[str, Any]) -> bytes:
    given = [name for name in IMAGE_FIELDS if name in fields]
    if len(given) != 1 or not isinstance(fields[given[0]], (bytes, bytearray)):
        got = " and ".join(given) or "none"
        got = type(fields[given[0]]).__name__ if len(given) == 1 else got
        raise InvalidRequestError(
            f"expected the bytes of one image file as the body, or as the field {IMAGE_FIELDS[1]!r}, got {got}: "
            "send it with the content type application/octet-stream or image/*",
            "image",
        )
    return bytes(fields[given[0]])


def _option(name: str, value: Any) -> Any:
    """A field as the argument of `Model.request`, which checks names and ranges."""
    if name in ("outputs", "tags"):
        return _list(name, value)
    text = _text(name, value)
    if name in ("refine", "cam"):
        return text
    kind = {"threshold": float, "heatmap_max_side": int}[name]
    try:
        return kind(text)
    except ValueError:
        raise InvalidRequestError(f"{name} must be a number ({kind.__name__}), got {text[:40]!r}", name) from None


def _list(name: str, value: Any) -> list[str]:
    """Names joined by commas, or a JSON list, for names that have commas."""
    if not isinstance(value, list):
        text = _text(name, value)
        try:
            value = json.loads(text) if text.startswith("[") else [part.strip() for part in text.split(",") if part]
        except ValueError as error:
            raise InvalidRequestError(f"{name} must be a,b or a JSON list, got damaged JSON: {error}", name) from None
    if not all(isinstance(item, str) for item in value):
        raise InvalidRequestError(f"{name} must be a list of names, got other values among them", name)
    return list(value)


def _text(name: str, value: Any) -> str:
    if isinstance(value, (bytes, bytearray)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            raise InvalidRequestError(f"{name} must be UTF-8 text, got other bytes", name) from None
    if isinstance(value, (str, int, float)):  # a number: TorchServe parses parts that say they are JSON
        return str(value)
    raise InvalidRequestError(f"{name} must be text, got {type(value).__name__}", name)


def _grey_png(cam01: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.rint(np.clip(cam01, 0, 1) * 255).astype(np.uint8)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _error(status: int, reason: str, message: str) -> Reply:
    return status, "application/json", _json({"error": {"reason": reason, "message": message}})


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
