"""One image: from its bytes to its files in the store and its row of the manifest. Engines call this, in any order."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from weakseg.batch.inputs import Item, read
from weakseg.batch.manifest import MIN_SCORE, Row, Written, config_bytes, sha256
from weakseg.batch.store import Store, open_store
from weakseg.classes import BACKGROUND, ClassTable
from weakseg.errors import (
    DataError,
    InvalidRequestError,
    ModelFailedError,
    ModelLoadingError,
    OutOfMemoryError,
    ResponseTooLargeError,
    ServiceError,
    WeaksegError,
)
from weakseg.manifest import OutputKind, Precision
from weakseg.masks.cams import npz_from_cams
from weakseg.model import Refinement
from weakseg.quality import MaskQuality
from weakseg.result import MaskKind, Result

if TYPE_CHECKING:
    from weakseg.wire import ModelInfo

logger = logging.getLogger(__name__)

SERVER_TIMEOUT_S = 300.0  # for an image, waiting for a server that restarts included
READY_POLL_S = 0.2
# Of a server: what it says of this image. Everything else it says of itself.
_OF_THE_IMAGE = (DataError, ModelFailedError, OutOfMemoryError, ResponseTooLargeError, InvalidRequestError)
# Reasons with which a server says that it may be otherwise in a moment; SERVICE = it cannot be reached.
_PASSING = frozenset(
    {
        "SERVICE",
        "DRAINING",
        "MODEL_LOADING",
        "MODEL_UNHEALTHY",
        "QUEUE_FULL",
        "OUT_OF_MEMORY",
        "RATE_LIMITED",
        "DEADLINE_TOO_SHORT",
    }
)
_DIGITS = 6


@dataclass(frozen=True)
class Ask:
    """What is wanted of every image; part of the configuration that an output keeps to.

    mask: None = the pseudo-mask, or what the model has instead. cams: also the maps, as .npz.
    use_tags: pseudo-masks show the classes that the input names, where it says anything; else items have no tags.
    threshold, refine: as of Model.segment.
    """

    mask: MaskKind | None = None
    cams: bool = False
    use_tags: bool = True
    threshold: float | None = None
    refine: Refinement | None = None


@dataclass(frozen=True)
class Backend:
    """What computes: a bundle here, or a server."""

    bundle: Path | None = None
    runtime: str = "onnxruntime"
    provider: str | None = None
    precision: Precision = "fp32"
    public_key: Path | None = None
    endpoint: str | None = None
    access: Mapping[str, Any] = field(default_factory=dict)  # of weakseg.channel.AccessOptions


@dataclass(frozen=True)
class Assignment:
    """All that a worker is told, here or on another machine."""

    backend: Backend
    ask: Ask
    output: str
    scratch: str  # see open_store


@dataclass(frozen=True)
class Outcome:
    """row: of the manifest. seconds: of each step, of this run."""

    row: Row
    seconds: dict[str, float]


class Segmenter(Protocol):
    """A model, here or elsewhere."""

    classes: ClassTable
    palette: NDArray[np.uint8]
    outputs: tuple[OutputKind, ...]
    model: str
    model_sha256: str

    def segment(self, image: bytes, outputs: Sequence[OutputKind], tags: Sequence[str] | None, ask: Ask) -> Result: ...

    def close(self) -> None: ...


class Here:
    """A bundle in this process. Executions take one core each: side by side they are faster than one on all cores, and
    what they compute does not depend on how many cores there are."""

    def __init__(self, backend: Backend) -> None:
        from weakseg.model import load

        assert backend.bundle is not None
        options: Any = {name: getattr(backend, name) for name in ("runtime", "provider", "precision", "public_key")}
        self._model = load(backend.bundle, threads=1, **options)
        self.classes, self.palette = self._model.classes, self._model.palette
        self.outputs = self._model.manifest.outputs
        self.model, self.model_sha256 = self._model.manifest.id, self._model.bundle.sha256

    def segment(self, image: bytes, outputs: Sequence[OutputKind], tags: Sequence[str] | None, ask: Ask) -> Result:
        return self._model.segment(
            image, outputs=outputs, tags=tags, threshold=ask.threshold, refine=ask.refine, quality=True
        )

    def close(self) -> None:
        self._model.close()


class There:
    """A server. It may restart meanwhile; it may not go over to another model."""

    def __init__(self, backend: Backend) -> None:
        from weakseg.client import Client

        assert backend.endpoint is not None
        access: Any = dict(backend.access)
        self._client = Client(backend.endpoint, timeout_s=SERVER_TIMEOUT_S, **access)
        info = self._ready(backend.endpoint)
        assert info.classes is not None
        self.classes, self.palette, self.outputs = info.classes, info.palette, info.outputs
        self.model, self.model_sha256 = info.id, info.sha256

    def segment(self, image: bytes, outputs: Sequence[OutputKind], tags: Sequence[str] | None, ask: Ask) -> Result:
        options: Any = {"threshold": ask.threshold, "refine": ask.refine}
        ends = monotonic() + SERVER_TIMEOUT_S
        while True:
            try:
                result = self._client.segment(
                    image, outputs=outputs, tags=tags, quality=True, priority="bulk", **options
                )
                break
            except ModelFailedError as error:
                if self._client.model().state == "failed":
                    raise ServiceError(f"the server could not load {self.model} again: {error}") from error
                raise
            except ServiceError as error:
                if error.reason not in _PASSING or monotonic() > ends:
                    raise
                sleep(max(READY_POLL_S, error.retry_s or 0.0))
        if result.model_sha256 != self.model_sha256:
            raise ServiceError(
                f"expected every mask of {self.model} ({self.model_sha256[:12]}), the server now has {result.model} "
                f"({result.model_sha256[:12]}): load the former again, or begin a new output"
            )
        return result

    def close(self) -> None:
        self._client.close()

    def _ready(self, endpoint: str) -> ModelInfo:
        """Jobs and servers are started side by side."""
        ends = monotonic() + SERVER_TIMEOUT_S
        while True:
            try:
                info = self._client.model()
                if info.state == "ready":
                    return info
                if info.state == "failed":
                    raise ModelFailedError(f"{endpoint}: model {info.id} could not be loaded: {info.failure}")
            except ServiceError as error:
                if error.reason not in _PASSING or monotonic() > ends:
                    raise
            if monotonic() > ends:
                raise ModelLoadingError(f"{endpoint}: the model is not ready after {SERVER_TIMEOUT_S:.0f} s")
            sleep(READY_POLL_S)


class Labeller:
    """Thread-safe. Raises what concerns the job: storage that fails, a server that is gone. An image's own faults, and
    errors that nobody foresaw, become its row."""

    def __init__(self, assignment: Assignment, config_sha256: str | None = None) -> None:
        self.segmenter: Segmenter = (
            There(assignment.backend) if assignment.backend.endpoint is not None else Here(assignment.backend)
        )
        self.store: Store = open_store(assignment.output, assignment.scratch)
        self.ask, self._backend = assignment.ask, assignment.backend
        has = self.segmenter.outputs
        self.kind: MaskKind = assignment.ask.mask or ("pseudo_mask" if "pseudo_mask" in has else "segmentation")
        self.outputs: tuple[OutputKind, ...] = (self.kind, "cam") if assignment.ask.cams else (self.kind,)
        self.config_sha256 = config_sha256 or ""

    def configuration(self, shards: int) -> dict[str, Any]:
        """What config.json says: all that masks depend on besides the images and their tags."""
        by = self._backend
        where = ("server",) if by.endpoint is not None else (by.runtime, by.provider or "default", by.precision)
        return {
            "model": self.segmenter.model,
            "model_sha256": self.segmenter.model_sha256,
            "classes": list(self.segmenter.classes.names),
            **asdict(self.ask),
            "mask": self.kind,
            "computed_by": " ".join(where),
            "num_shards": shards,
        }

    def __call__(self, item: Item) -> Outcome:
        began = perf_counter()
        tags = None if item.tags is None else list(item.tags)
        row: Row = {"uri": item.uri, "key": item.key, "status": "failed", "size_bytes": item.size, "tags": tags}
        seconds: dict[str, float] = {}
        try:
            data = read(item)
            row |= {"size_bytes": len(data), "sha256": sha256(data)}
            seconds["read"] = perf_counter() - began
            result = self.segmenter.segment(data, self.outputs, tags, self.ask)
            seconds |= result.seconds
            filled = self._described(row, result)
            files = self._encoded(item.key, result)
        except _OF_THE_IMAGE as error:
            row["error"] = {"reason": error.reason, "message": str(error)}
        except MemoryError:
            row["error"] = {"reason": "OUT_OF_MEMORY", "message": "there was not enough memory for this image"}
        except (WeaksegError, OSError):
            raise
        except Exception as error:
            logger.exception("%s: unexpected error", item.uri)
            row["error"] = {"reason": "INTERNAL", "message": f"unexpected {type(error).__name__}, see the log"}
        else:
            storing = perf_counter()
            filled["outputs"] = {kind: self._stored(path, content) for kind, (path, content) in files.items()}
            row = filled
            seconds["store"] = perf_counter() - storing
        row |= {
            "model": self.segmenter.model,
            "model_sha256": self.segmenter.model_sha256,
            "config_sha256": self.config_sha256,
        }
        return Outcome(row, {**seconds, "total": perf_counter() - began})

    def close(self) -> None:
        self.segmenter.close()

    def _described(self, row: Row, result: Result) -> Row:
        filled: Row = {**row, "status": "ok", "width": result.width, "height": result.height}
        filled["present"] = list(result.present)
        quality = result.quality[self.kind]
        filled["classes"] = [
            {
                "value": one.value,
                "name": one.name,
                "area_px": one.area_px,
                "confidence": _rounded(one.confidence),
            }
            for one in quality.classes
            if one.value != BACKGROUND
        ]
        filled["scores"] = {name: round(score, _DIGITS) for name, score in result.scores.items() if score >= MIN_SCORE}
        filled["quality"] = _quality(quality)
        pseudo = self.kind == "pseudo_mask"
        filled["threshold"] = result.threshold.to_dict() if pseudo and result.threshold is not None else None
        filled["refined_by"] = result.refined_by if pseudo else None
        if result.refinement_cut_short:
            filled["refinement_cut_short"] = True
        return filled

    def _encoded(self, key: str, result: Result) -> dict[str, tuple[str, bytes]]:
        files = {"mask": (f"masks/{key}.png", result.mask_png(self.kind))}
        if self.ask.cams:
            names = list(result.heatmaps)
            values = [self.segmenter.classes.mask_value(name) for name in names]
            size = (result.height, result.width)
            maps = [np.asarray(result.heatmaps[name], np.float32) for name in names]
            files["cams"] = (f"cams/{key}.npz", npz_from_cams(maps, values, names, size))
        return files

    def _stored(self, path: str, content: bytes) -> Written:
        self.store.write(path, content)
        return {"path": path, "sha256": sha256(content), "bytes": len(content)}


def config_of(labeller: Labeller, shards: int) -> bytes:
    """config.json; the labeller's rows carry its hash from now on."""
    content = config_bytes(labeller.configuration(shards))
    labeller.config_sha256 = sha256(content)
    return content


def _quality(quality: MaskQuality) -> dict[str, float | int | None]:
    return {
        "confidence": _rounded(quality.confidence),
        "entropy": _rounded(quality.entropy),
        "undecided_px": quality.undecided_px,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)
