"""What a request of the Open Inference Protocol asks for; every field is checked here, before anything costs time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from serve.inference import grpc_inference_service_pb2 as oip
from serve.lanes import Priority
from serve.requests import MAX_REQUEST_ID, RANGES
from weakseg.errors import InvalidRequestError, OutputUnsupportedError, UnknownClassError
from weakseg.model import REFINEMENTS, Decoded, Model, Refinement, Request

OUTPUTS = ("segmentation", "pseudo_mask", "scores", "cam")
DENSE = ("segmentation", "pseudo_mask", "cam")  # arrays that are as large as the image, or in proportion to it
CAM_DATATYPES = ("FP32", "FP16")
MAX_TAGS_CHARACTERS = 4096
_MAX_SAID = 200  # characters of what the client wrote in a message about it


@dataclass(frozen=True)
class Options:
    """`outputs`, `parameters` and the form of the answer, before the model is known; no outputs = all it has."""

    outputs: tuple[str, ...]
    raw: bool
    tags: tuple[str, ...] | None = None
    threshold: float | None = None
    refinement: Refinement | None = None
    cam_datatype: str = "FP32"
    priority: Priority = "interactive"


def options_from_request(message: oip.ModelInferRequest) -> Options:
    """Everything but the images.

    FP16 has no typed field, so an answer with it is raw; any other has the form of the request: tritonclient reads raw
    contents only, and clients that write typed ones by hand read them by hand.

    Raises:
        InvalidRequestError: `field` is the path of what is wrong.
    """
    if len(message.id) > MAX_REQUEST_ID:
        raise InvalidRequestError(f"id must have at most {MAX_REQUEST_ID} characters, got {len(message.id)}", "id")
    if len(message.outputs) > len(OUTPUTS):
        raise InvalidRequestError(f"expected at most {len(OUTPUTS)} outputs, got {len(message.outputs)}", "outputs")
    names: list[str] = []
    for i, output in enumerate(message.outputs):
        if output.name not in OUTPUTS or output.name in names:
            expected = f"expected each of {', '.join(OUTPUTS)} at most once"
            raise InvalidRequestError(f"{expected}, got {said(output.name)}", f"outputs[{i}].name")
        values_of(output.parameters, (), f"outputs[{i}].parameters")
        names.append(output.name)
    values = values_of(message.parameters, tuple(_PARAMETERS), "parameters")
    given = {name: _PARAMETERS[name](value) for name, value in values.items()}
    raw = bool(message.raw_input_contents) or given.get("cam_datatype") == "FP16"
    return Options(tuple(names), raw, **given)


def with_model(options: Options, model: Model) -> tuple[Options, Request]:
    """The options with their outputs named, and the request in the model's terms.

    Raises:
        InvalidRequestError: a tag that is no class (reason UNKNOWN_CLASS).
        OutputUnsupportedError: the model does not have an output or an affinity graph.
    """
    has = outputs_of(model)
    missing = [name for name in options.outputs if name not in has]
    if missing:
        raise OutputUnsupportedError(f"model {model.manifest.id} has no {missing[0]}: it has {', '.join(has)}")
    names = options.outputs or has
    kinds = [kind for kind in model.manifest.outputs if kind in names]
    if "scores" in names and not {"cam", "pseudo_mask"} & {*kinds}:
        kinds.append("cam")  # what runs the classifier
    try:
        request = model.request(
            outputs=kinds, tags=options.tags, threshold=options.threshold, refine=options.refinement
        )
    except UnknownClassError as error:
        told = InvalidRequestError(str(error), "parameters.tags")
        told.reason = error.reason
        raise told from error
    shown = range(len(model.classes)) if "cam" in names else ()
    return replace(options, outputs=names), replace(request, heatmap_classes=tuple(shown))


def outputs_of(model: Model) -> tuple[str, ...]:
    """Names of the outputs that a model has; scores come with its CAMs."""
    has = {*model.manifest.outputs} | ({"scores"} if "cam" in model.manifest.outputs else set())
    return tuple(name for name in OUTPUTS if name in has)


def check_sizes(decoded: Sequence[Decoded], outputs: Sequence[str]) -> None:
    """Raises InvalidRequestError for images of different sizes with outputs that could then not be one array."""
    sizes = [f"{width}x{height}" for height, width in (image.size for image in decoded)]
    dense = [name for name in outputs if name in DENSE]
    if dense and len({*sizes}) > 1:
        raise InvalidRequestError(
            f"{dense[0]} of a batch is one array: expected images of one size, got {', '.join(sizes)}: "
            "send them one by one, or ask for scores alone",
            "inputs[0]",
        )


def values_of(
    parameters: Mapping[str, oip.InferParameter], known: Sequence[str], path: str
) -> dict[str, bool | int | float | str]:
    """The values of parameters; one that is not known, or not set, is refused: it would be ignored in silence."""
    values = {}
    for name, value in parameters.items():
        if name not in known:
            expected = f"expected {', '.join(known)}" if known else "there is none"
            raise InvalidRequestError(f"unknown parameter {said(name)}: {expected}", path)
        choice = value.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidRequestError(f"expected a value of the parameter {name}, got none", f"{path}.{name}")
        values[name] = getattr(value, choice)
    return values


def _threshold(value: bool | int | float | str) -> float:
    """A number, or its text, for clients that have no parameters of type double."""
    low, high = RANGES["background_threshold"]
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise InvalidRequestError(f"expected a number from {low} to {high}, got {said(value)}", "parameters.threshold")
    return number


def _tags(value: bool | int | float | str) -> tuple[str, ...]:
    """Class names joined by commas, or a JSON list, for names that have commas."""
    if not isinstance(value, str) or len(value) > MAX_TAGS_CHARACTERS:
        raise InvalidRequestError(
            f"expected class names joined by commas, {MAX_TAGS_CHARACTERS} characters at most, got {said(value)}",
            "parameters.tags",
        )
    try:
        names = json.loads(value) if value.startswith("[") else [part.strip() for part in value.split(",") if part]
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidRequestError(f"expected a,b or a JSON list of texts, got {said(value)}", "parameters.tags")
    return tuple(names)


def _choice(name: str, choices: Sequence[str], value: bool | int | float | str) -> str:
    if value not in choices:
        raise InvalidRequestError(f"expected one of {', '.join(choices)}, got {said(value)}", f"parameters.{name}")
    return str(value)


def _priority(value: bool | int | float | str) -> Priority:
    """Triton's: a whole number, 1 is the most urgent, 0 the default."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequestError(f"expected 1 (interactive) or 2 (bulk), got {said(value)}", "parameters.priority")
    return "bulk" if value > 1 else "interactive"


_PARAMETERS: dict[str, Callable[[Any], Any]] = {
    "refinement": partial(_choice, "refinement", REFINEMENTS),
    "threshold": _threshold,
    "tags": _tags,
    "cam_datatype": partial(_choice, "cam_datatype", CAM_DATATYPES),
    "priority": _priority,
}


def said(value: object) -> str:
    """What the client wrote, short enough for a message."""
    text = repr(value[:_MAX_SAID] if isinstance(value, str) else value)
    return text if len(text) <= _MAX_SAID else text[:_MAX_SAID] + "…"
