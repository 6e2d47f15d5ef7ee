"""What a model bundle says about itself: manifest.json as frozen dataclasses. docs/bundle.md explains every field."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import IGNORE, MAX_CLASSES_U8, ClassTable, voc_palette
from weakseg.errors import BundleError, WeaksegError
from weakseg.preprocess import InputPolicy
from weakseg.recipe import PseudoLabelConfig, WalkConfig
from weakseg.records import RecordError, from_json, to_json
from weakseg.threshold import Threshold

SCHEMA_VERSION = 3  # 2 lacks `training.presence_frequency` and `training.confidence`, nothing else
OLDEST_SCHEMA = 1  # also lacks `variants`, `parity` and the output `labels`
INPUT = "images"

OutputKind = Literal["cam", "pseudo_mask", "segmentation"]
OUTPUT_KINDS: tuple[OutputKind, ...] = ("cam", "pseudo_mask", "segmentation")

CLASSIFIER, MULTISCALE = "classifier", "classifier_multiscale"
AFFINITY, SEGMENTATION = "affinity", "segmentation"
GRAPH_OUTPUTS = {
    CLASSIFIER: ("scores", "cam"),
    MULTISCALE: ("scores", "cam"),
    AFFINITY: ("affinities",),
    SEGMENTATION: ("logits", "labels"),
}
OPTIONAL_OUTPUTS = frozenset({"labels"})

Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Graph:
    """One network.

    file: its ONNX file in fp32. variants: {precision: file} of the same graph in other precisions.
    stride: input pixels per cell of its maps. views: how many views the raw maps are summed over.
    """

    file: str
    outputs: tuple[str, ...]
    stride: int = 4
    views: int = 1
    variants: dict[str, str] = field(default_factory=dict)

    def files(self) -> dict[str, str]:
        """{precision: file}, fp32 first."""
        return {"fp32": self.file, **self.variants}


@dataclass(frozen=True)
class CamSettings:
    """How maps were made: of the multi-scale graph, and how they are brought into [0, 1]."""

    method: str = "cam"
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    normalisation: Literal["max", "minmax"] = "max"


@dataclass(frozen=True)
class TrainingStatistics:
    """What the training images looked like: a service that sees something else is drifting.

    class_frequency: share of images with each class. brightness_*: over the images' mean grey value in [0, 1].
    score_mean: mean score of each class over the images that have it; None where no score is known.
    presence_frequency: share of images that each class is present in by its score, right or wrong: what a service can
        count, too. Empty = not known.
    confidence: shares of images whose highest score lies in each tenth of [0, 1]. Empty = not known.
    """

    n_images: int
    class_frequency: dict[str, float]
    brightness_mean: float
    brightness_std: float
    score_mean: dict[str, float | None] = field(default_factory=dict)
    presence_frequency: dict[str, float] = field(default_factory=dict)
    confidence: tuple[float, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """Where the model came from. No dates and no paths: the same training gives the same bytes."""

    weakseg: str
    torch: str | None = None
    commit: str | None = None
    recipe: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Licences:
    """Licences of the training images and of the weights that training started from."""

    data: str = "unknown"
    weights: str = "unknown"


@dataclass(frozen=True)
class Manifest:
    """manifest.json.

    classes: names in order of class index; mask value = index + 1.
    palette: RGB by mask value, background first (n_classes + 1 rows).
    outputs: what can be asked for.
    presence: without tags, a class is present when its score >= this.
    background: the threshold t of pseudo-masks and the rule that chose it.
    pseudo_label: CRF and band of the pseudo-masks that the segmentation network was trained on.
    walk: the random walk that made them instead of that CRF, over the graph `affinity`; None = none.
    method: training method of the classifier.
    metrics: records of the run's evaluation, each with its split, tags and threshold.
    parity: records of what each graph, runtime and precision was measured to differ from torch by.
    files: {path relative to the manifest: SHA-256}, all files of the bundle but the manifest.
    """

    name: str
    version: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    input: InputPolicy
    outputs: tuple[OutputKind, ...]
    graphs: dict[str, Graph]
    presence: float
    background: Threshold
    pseudo_label: PseudoLabelConfig
    cam: CamSettings
    method: str
    provenance: Provenance
    walk: WalkConfig | None = None
    licences: Licences = field(default_factory=Licences)
    metrics: tuple[dict[str, Any], ...] = ()
    parity: tuple[dict[str, Any], ...] = ()
    training: TrainingStatistics | None = None
    files: dict[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.name}/{self.version}"

    def class_table(self) -> ClassTable:
        return ClassTable(self.classes)

    def colours(self) -> NDArray[np.uint8]:
        """`colour_table` of the palette."""
        return colour_table(self.palette)


def colour_table(palette: Sequence[tuple[int, int, int]]) -> NDArray[np.uint8]:
    """(n, 3) uint8 RGB by mask value: 256 rows for 8-bit label maps, IGNORE last; 65,536 for 16-bit ones.

    `palette` has background and the classes; other rows have the VOC colours.
    """
    n_rows = 256 if len(palette) - 1 <= MAX_CLASSES_U8 else 65536
    colours = np.resize(voc_palette(), (n_rows, 3))  # rows beyond 255 repeat, the last is VOC's cream either way
    colours[: len(palette)] = palette
    return colours


def palette_for(classes: ClassTable) -> tuple[tuple[int, int, int], ...]:
    """The VOC colours of background and the classes; IGNORE's colour is skipped."""
    rows = [row for i, row in enumerate(voc_palette().tolist()) if i != IGNORE]
    return tuple((r, g, b) for r, g, b in (rows[i % len(rows)] for i in range(len(classes) + 1)))


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """The file's content; the same manifest gives the same bytes."""
    content = {"schema_version": SCHEMA_VERSION, **to_json(manifest)}
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def manifest_from_bytes(data: bytes, where: str) -> Manifest:
    """Parse and check manifest.json.

    Args:
        where: path of the file, for messages.
    Raises:
        BundleError: not JSON, an unknown schema version, a missing, unknown or impossible field.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: expected JSON, got {error}: export the model again") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int:
        raise BundleError(f"{where}: expected a manifest with a schema_version, got none: is this a model bundle?")
    if not OLDEST_SCHEMA <= version <= SCHEMA_VERSION:
        newer = "install a newer weakseg" if version > SCHEMA_VERSION else "export the model again"
        raise BundleError(
            f"{where}: expected schema_version {OLDEST_SCHEMA} to {SCHEMA_VERSION}, got {version}: {newer}"
        )
    fields = {key: value for key, value in content.items() if key != "schema_version"}
    try:
        manifest = from_json(Manifest, fields, "manifest")
        check_manifest(manifest)
    except (RecordError, WeaksegError) as error:
        raise BundleError(f"{where}: {error}") from error
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Raises BundleError (or the field's own error) when fields do not fit each other."""
    for what in ("name", "version"):
        if not _NAME.fullmatch(getattr(manifest, what)):
            raise BundleError(
                f"{what} must be letters, digits, '.', '_' and '-', at most 64, got {getattr(manifest, what)!r}"
            )
    manifest.class_table()
    if len(manifest.palette) != len(manifest.classes) + 1 or not all(
        0 <= v <= 255 for row in manifest.palette for v in row
    ):
        raise BundleError(f"palette must have {len(manifest.classes) + 1} rows of 0..255, background first")
    if not 0 <= manifest.presence <= 1 or not 0 < manifest.background.t < 1:
        raise BundleError(f"thresholds must lie in (0, 1), got {manifest.presence} and {manifest.background.t}")
    _check_graphs(manifest)
    for file, digest in manifest.files.items():
        if not _SHA256.fullmatch(digest):
            raise BundleError(f"files: expected a SHA-256 for {file!r}, got {digest!r}")


def _check_graphs(manifest: Manifest) -> None:
    for name, graph in manifest.graphs.items():
        known = GRAPH_OUTPUTS.get(name, graph.outputs)
        if graph.outputs not in (known, tuple(output for output in known if output not in OPTIONAL_OUTPUTS)):
            raise BundleError(f"graph {name} must have the outputs {known}, got {graph.outputs}")
        if graph.stride < 1 or graph.views < 1:
            raise BundleError(f"graph {name}: stride and views must be at least 1, got {graph.stride}, {graph.views}")
        if not set(graph.variants) <= set(PRECISIONS[1:]):
            raise BundleError(
                f"graph {name}: variants may be {', '.join(PRECISIONS[1:])}, got {', '.join(graph.variants)}"
            )
        for file in graph.files().values():
            if not file.endswith(".onnx"):  # runtimes look into a file, not at its name: every graph is checked as ONNX
                raise BundleError(f"graph {name}: expected a file *.onnx, got {file!r}")
            if file not in manifest.files:
                raise BundleError(f"graph {name}: its file {file!r} is not in `files`, so its hash is unknown")
    if (manifest.walk is None) != (AFFINITY not in manifest.graphs):
        raise BundleError(
            f"a graph {AFFINITY} and the settings `walk` of the walk over it belong together, got one of them"
        )
    if not manifest.outputs:
        raise BundleError("outputs must not be empty")
    for kind in manifest.outputs:
        need = SEGMENTATION if kind == "segmentation" else CLASSIFIER
        if need not in manifest.graphs:
            raise BundleError(f"output {kind} needs the graph {need}, got {', '.join(manifest.graphs) or 'no graph'}")
