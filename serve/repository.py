"""What lies in the folders that a server watches: bundles, labels, and whether they have changed."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.stamp import stamp
from weakseg.bundle import find_version, read_manifest
from weakseg.errors import ConfigError, WeaksegError
from weakseg.manifest import manifest_from_bytes

LABELS = "labels.toml"
STABLE, CANARY, PERCENT = "stable", "canary", "canary_percent"


@dataclass(frozen=True)
class BundleFolder:
    """A bundle to serve, by the name and version that clients use."""

    name: str
    version: str
    path: Path


@dataclass(frozen=True)
class Labels:
    """Names for versions of a model. A request without a version gets `stable`, `canary_percent` of them `canary`.

    versions: {label: version}.
    """

    versions: dict[str, str]
    canary_percent: float = 0.0


def find_bundles(bundles: Sequence[Path], models: Path | None) -> list[BundleFolder]:
    """Single bundles (as `weakseg.bundle.find_version` takes them), and every `<models>/<name>/<version>`.

    Raises:
        BundleError: a path that is no bundle.
        ConfigError: no folder of models, two bundles of the same name and version, or nothing to serve.
    """
    paths = [find_version(path) for path in bundles]
    if models is not None:
        if not models.is_dir():
            raise ConfigError(f"expected a folder of bundles, got {models}: it holds <name>/<version>/manifest.json")
        paths += sorted(manifest.parent for manifest in models.glob("*/*/manifest.json"))
        if not paths:
            raise ConfigError(f"{models} holds no bundle: {_obstacle(models)}")
    found: dict[tuple[str, str], Path] = {}
    for path in dict.fromkeys(path.resolve() for path in paths):
        key = _identity(path)
        if key in found:
            raise ConfigError(f"{found[key]} and {path} are both {'/'.join(key)}: serve one of them")
        found[key] = path
    if not found:
        raise ConfigError("no bundle to serve: pass --bundle <folder>, --models <folder> or --demo")
    return [BundleFolder(name, version, path) for (name, version), path in found.items()]


def _obstacle(models: Path) -> str:
    """Why no bundle is seen in a folder of models, and what to do. A folder that may not be read looks empty."""
    for folder in [models, *models.glob("*/")]:
        if not os.access(folder, os.R_OK | os.X_OK):
            return f"{folder} may not be read by this user: chmod -R a+rX {models}"
    return "put one there as <name>/<version>/, by `weakseg bundle fetch`"


def find_labels(folders: Sequence[BundleFolder]) -> dict[str, Labels]:
    """{model: labels} of the files labels.toml beside the folders of its versions.

        stable = "3"
        canary = "4"
        canary_percent = 5

    Raises:
        ConfigError: a file that cannot be read, or says what cannot be.
    """
    found = {}
    for folder in folders:
        path = folder.path.parent / LABELS
        if path.is_file():
            found[folder.name] = read_labels(path)
    return found


def missing_versions(folders: Sequence[BundleFolder], labels: Mapping[str, Labels]) -> dict[str, str]:
    """{"model/label": what is wrong} of the labels of versions that are not there."""
    missing = {}
    for name, of_model in labels.items():
        there = {folder.version for folder in folders if folder.name == name}
        for label, version in of_model.versions.items():
            if version not in there:
                missing[f"{name}/{label}"] = f"the label names version {version}, there is {', '.join(sorted(there))}"
    return missing


def read_labels(path: Path) -> Labels:
    """Raises ConfigError."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"expected a TOML file of labels at {path}, got: {error}") from error
    percent = values.pop(PERCENT, 0)
    if not all(isinstance(version, str) and version for version in values.values()):
        raise ConfigError(f'{path}: expected a version as text for each label, such as stable = "3", got {values}')
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent <= 100:
        raise ConfigError(f"{path}: {PERCENT} must lie from 0 to 100, got {percent!r}")
    if percent and not {STABLE, CANARY} <= values.keys():
        raise ConfigError(
            f"{path}: {PERCENT} needs the labels {STABLE} and {CANARY}, got {', '.join(values) or 'none'}"
        )
    return Labels(values, float(percent))


def bundle_stamp(folder: Path) -> tuple[Any, ...]:
    """Changes when any file of a bundle is written or replaced."""
    return stamp(sorted(folder.rglob("*")))


def weight_bytes(folder: Path) -> int:
    """Size of the largest set of graphs that may be loaded of a bundle: what a model's memory is in proportion to."""
    return sum(path.stat().st_size for path in folder.glob("*.onnx"))


def _identity(path: Path) -> tuple[str, str]:
    """Name and version from the manifest; of a damaged one, which will fail to load, from the folder."""
    try:
        manifest = manifest_from_bytes(read_manifest(path), str(path))
    except WeaksegError:
        return path.parent.name, path.name
    return manifest.name, manifest.version
