"""The models that a server has: where they come from, what state they are in, which one a request means."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

from weakseg.bundle import find_version, natural_order, read_manifest
from weakseg.errors import ConfigError, ModelFailedError, ModelLoadingError, ModelNotFoundError, WeaksegError
from weakseg.manifest import manifest_from_bytes
from weakseg.model import Model

log = logging.getLogger("serve.models")


class ModelState(enum.Enum):
    """Values are those of weakseg.v1.ModelState."""

    LOADING = 1
    READY = 2
    FAILED = 4


@dataclass(frozen=True)
class BundleFolder:
    """A bundle to serve, by the name and version that clients use."""

    name: str
    version: str
    path: Path


@dataclass
class Entry:
    """One version of one model. `model` is set exactly while the state is READY."""

    folder: BundleFolder
    state: ModelState = ModelState.LOADING
    model: Model | None = None
    failure: str = ""
    loaded_at: datetime | None = None
    load_s: float = 0.0

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def version(self) -> str:
        return self.folder.version


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
    found: dict[tuple[str, str], Path] = {}
    for path in dict.fromkeys(path.resolve() for path in paths):
        key = _identity(path)
        if key in found:
            raise ConfigError(f"{found[key]} and {path} are both {'/'.join(key)}: serve one of them")
        found[key] = path
    if not found:
        raise ConfigError("no bundle to serve: pass --bundle <folder>, --models <folder> or --demo")
    return [BundleFolder(name, version, path) for (name, version), path in found.items()]


def _identity(path: Path) -> tuple[str, str]:
    """Name and version from the manifest; of a damaged one, which will fail to load, from the folder."""
    try:
        manifest = manifest_from_bytes(read_manifest(path), str(path))
    except WeaksegError:
        return path.parent.name, path.name
    return manifest.name, manifest.version


class Models:
    """All versions of all models. Belongs to one event loop; loading runs in a thread."""

    def __init__(
        self,
        folders: Sequence[BundleFolder],
        load: Callable[[Path], Model],
        on_change: Callable[[Entry], None],
    ) -> None:
        entries = [Entry(folder) for folder in folders]
        self._entries = sorted(entries, key=lambda entry: (entry.name, natural_order(entry.version)))
        self._load = load
        self._on_change = on_change

    @property
    def ready(self) -> bool:
        """Whether every model can answer. One that failed keeps a new server out of rotation, where it is noticed."""
        return all(entry.state is ModelState.READY for entry in self._entries)

    def entries(self) -> list[Entry]:
        """By name, then version."""
        return list(self._entries)

    async def load_all(self) -> None:
        """Load one after the other; a model that cannot be loaded is FAILED and stops no other."""
        for entry in self._entries:
            await self._load_one(entry)

    def get(self, name: str, version: str) -> Entry:
        """The entry that a request means, in whatever state.

        An empty name means the only model there is; an empty version the newest that is ready, or the newest at all.

        Raises:
            ModelNotFoundError: no such model or version; the message lists what there is.
        """
        names = sorted({entry.name for entry in self._entries})
        if not name and len(names) > 1:
            raise ModelNotFoundError(f"expected the name of a model, got none: one of {', '.join(names)}")
        versions = [entry for entry in self._entries if entry.name == (name or names[0])]
        if not versions:
            raise ModelNotFoundError(f"no model {name!r}: this server has {', '.join(names)}")
        if not version:
            return next((entry for entry in reversed(versions) if entry.state is ModelState.READY), versions[-1])
        for entry in versions:
            if entry.version == version:
                return entry
        known = ", ".join(entry.version for entry in versions)
        raise ModelNotFoundError(f"no version {version!r} of model {versions[0].name!r}: there is {known}")

    def get_ready(self, name: str, version: str) -> tuple[Entry, Model]:
        """As `get`, and able to answer.

        Raises:
            ModelNotFoundError, ModelLoadingError, ModelFailedError
        """
        entry = self.get(name, version)
        if entry.state is ModelState.FAILED:
            raise ModelFailedError(f"model {entry.name}/{entry.version} could not be loaded: {entry.failure}")
        if entry.model is None:
            raise ModelLoadingError(f"model {entry.name}/{entry.version} is being loaded: try again in a moment")
        return entry, entry.model

    def close(self) -> None:
        for entry in self._entries:
            if entry.model is not None:
                entry.model.close()

    async def _load_one(self, entry: Entry) -> None:
        started = monotonic()
        self._on_change(entry)
        try:
            entry.model = await asyncio.to_thread(self._load, entry.folder.path)
        except WeaksegError as error:
            self._failed(entry, str(error))
        except Exception:
            log.exception("loading %s/%s failed", entry.name, entry.version)
            self._failed(entry, "internal error: the server's log says more")
        else:
            entry.state, entry.loaded_at = ModelState.READY, datetime.now(UTC)
            entry.load_s = monotonic() - started
            fields = {"model": entry.name, "version": entry.version, "seconds": round(entry.load_s, 3)}
            log.info("model ready", extra={"fields": fields})
        self._on_change(entry)

    def _failed(self, entry: Entry, failure: str) -> None:
        entry.state, entry.failure = ModelState.FAILED, failure
        fields = {"model": entry.name, "version": entry.version, "failure": failure}
        log.error("model failed", extra={"fields": fields})
