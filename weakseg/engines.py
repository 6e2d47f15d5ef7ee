"""TensorRT engines on disk: each belongs to one graph file and one machine, and is loaded only when its hash is known.

    <cache>/<sha256 of the ONNX file>/<library>-<version>-sm<nn>-<GPU>.plan
    <cache>/<sha256 of the ONNX file>/<library>-<version>-sm<nn>-<GPU>.json      the record: what it is, its SHA-256

They are not part of a bundle. A bundle is the same on every machine, may be signed and lie on a read-only volume; an
engine is good for one GPU and one version of TensorRT, and is built where it runs. Keyed by the graph's own hash, it
cannot be taken for another graph's, and a bundle that is exported again with the same graphs keeps its engines.

An engine is machine code: whoever can write to the cache can run code in every process that loads from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weakseg.errors import BundleError, ConfigError
from weakseg.files import write_bytes_atomic, write_json_atomic
from weakseg.records import from_json, to_json

CACHE_VARIABLE = "WEAKSEG_ENGINE_CACHE"
Shape = tuple[int, int, int, int]  # B, H, W, 3


@dataclass(frozen=True)
class Platform:
    """What an engine is built for: another GPU or another version needs another engine.

    library: `tensorrt` or `tensorrt_rtx`. gpu: as the driver calls it. compute_capability: such as "8.9".
    """

    library: str
    version: str
    gpu: str
    compute_capability: str

    def __str__(self) -> str:
        return f"{self.gpu} (compute capability {self.compute_capability}), {self.library} {self.version}"

    @property
    def file_name(self) -> str:
        gpu = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        return f"{self.library}-{self.version}-sm{self.compute_capability.replace('.', '')}-{gpu}"


@dataclass(frozen=True)
class Profile:
    """Shapes of `images` that an engine takes: anything from smallest to largest; it is fastest at typical."""

    smallest: Shape
    typical: Shape
    largest: Shape


@dataclass(frozen=True)
class EngineRecord:
    """An engine's .json. sha256: of the .plan. parity: its largest differences from the graph, measured when built."""

    model: str
    graph: str
    precision: str
    platform: Platform
    profile: Profile
    sha256: str
    parity: dict[str, float]


def cache_folder(env: Mapping[str, str] = os.environ) -> Path:
    """Where engines lie: $WEAKSEG_ENGINE_CACHE, or weakseg/engines in the user's cache folder."""
    if env.get(CACHE_VARIABLE):
        return Path(env[CACHE_VARIABLE])
    return Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weakseg" / "engines"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def engine_path(cache: Path, graph_file: Path, platform: Platform) -> Path:
    """The .plan of a graph on a machine, built or not."""
    return cache / sha256_of(graph_file) / f"{platform.file_name}.plan"


def write_engine(cache: Path, graph_file: Path, record: EngineRecord, plan: bytes) -> Path:
    """Keep an engine; its record is written last, and without one it is not loaded.

    Raises:
        ConfigError: the cache cannot be written.
    """
    path = engine_path(cache, graph_file, record.platform)
    try:
        path.with_suffix(".json").unlink(missing_ok=True)
        write_bytes_atomic(path, plan)
        write_json_atomic(path.with_suffix(".json"), to_json(record))
    except OSError as error:
        raise ConfigError(
            f"cannot write the engine {path}: {error.strerror or error}: set {CACHE_VARIABLE} to a folder that you may "
            "write to"
        ) from error
    return path


def read_engine(cache: Path, graph: str, graph_file: Path, platform: Platform) -> tuple[EngineRecord, bytes]:
    """The engine of a graph file for a machine.

    Raises:
        ConfigError: none was built, or only for other machines. BundleError: its bytes are not those that were built.
    """
    path = engine_path(cache, graph_file, platform)
    if not path.with_suffix(".json").is_file():
        raise ConfigError(_missing(path, graph, graph_file, platform))
    record = read_record(path.with_suffix(".json"))
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}: {_rebuild(graph_file, platform)}") from error
    got = hashlib.sha256(plan).hexdigest()
    if record.platform != platform or got != record.sha256:
        raise BundleError(
            f"{path} is not the engine that was built for {platform}: expected sha256 {record.sha256[:12]}…, "
            f"got {got[:12]}… of an engine for {record.platform}: {_rebuild(graph_file, platform)}"
        )
    return record, plan


def read_record(path: Path) -> EngineRecord:
    """Raises BundleError when it is not an engine's record."""
    try:
        return from_json(EngineRecord, json.loads(path.read_bytes()), "engine")
    except (OSError, ValueError) as error:  # RecordError is a ValueError
        raise BundleError(
            f"{path}: expected the record of an engine, got {error}: remove it and build again"
        ) from error


def _missing(path: Path, graph: str, graph_file: Path, platform: Platform) -> str:
    others = sorted({str(read_record(record).platform) for record in path.parent.glob("*.json")})
    built = f", only for {'; '.join(others)}" if others else ""
    return (
        f"no engine of graph {graph} ({graph_file}) for {platform} in {path.parents[1]}{built}: "
        f"{_rebuild(graph_file, platform)}"
    )


def _rebuild(graph_file: Path, platform: Platform) -> str:
    target = platform.library.replace("_", "-")
    return (
        f'build it here with `weakseg export --target {target} "{graph_file.parent}"` and the precision that you load'
    )
