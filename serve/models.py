"""The models that a server has: what state they are in, and which one a request means."""

from __future__ import annotations

import asyncio
import enum
import random
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from serve.repository import CANARY, STABLE, BundleFolder, Labels
from weakseg.bundle import Order, natural_order
from weakseg.errors import ModelFailedError, ModelLoadingError, ModelNotFoundError
from weakseg.model import Model

Key = tuple[str, str]  # name and version


class ModelState(enum.Enum):
    """Values are those of weakseg.v1.ModelState."""

    LOADING = 1
    READY = 2
    UNLOADING = 3
    FAILED = 4


class Loaded:
    """A model and the requests that use it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.idle = asyncio.Event()
        self.idle.set()
        self._users = 0

    @contextmanager
    def in_use(self) -> Iterator[Model]:
        self._users += 1
        self.idle.clear()
        try:
            yield self.model
        finally:
            self._users -= 1
            if not self._users:
                self.idle.set()


@dataclass(eq=False)
class Entry:
    """One version of one model. `loaded` is set exactly while it answers; a failed reload sets `failure` beside it."""

    folder: BundleFolder
    state: ModelState = ModelState.LOADING
    loaded: Loaded | None = None
    failure: str = ""
    loaded_at: datetime | None = None
    load_s: float = 0.0
    stamp: tuple[Any, ...] | None = field(default=None, repr=False)  # of the files that were tried last

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def version(self) -> str:
        return self.folder.version

    @property
    def model(self) -> Model | None:
        loaded = self.loaded  # once: other threads ask, too
        return None if loaded is None else loaded.model


class Models:
    """All versions of all models; serve/lifecycle.py makes them come and go. Belongs to one event loop.

    labels: what they mean to requests; a file may say already what is not so yet.
    started: whether all were ready once.
    """

    def __init__(self) -> None:
        self.by_key: dict[Key, Entry] = {}
        self.labels: Mapping[str, Labels] = {}
        self.started = False

    @property
    def ready(self) -> bool:
        """Whether a load balancer may send requests.

        First when every model that the server started with can answer, and what is labelled `stable` is one of them:
        one that failed keeps a new server out of rotation, where it is noticed. From then on as long as every model
        that could answer has a version that can: one that is being loaded for the first time, or cannot be, takes
        nothing from anybody.
        """
        by_name: dict[str, list[bool]] = {}
        for entry in list(self.by_key.values()):  # at once: /readyz asks from another thread
            if not self.started or entry.loaded_at is not None:
                by_name.setdefault(entry.name, []).append(entry.loaded is not None)
        if not self.started:
            for name, labels in self.labels.items():
                if STABLE in labels.versions:
                    stable = self.by_key.get((name, labels.versions[STABLE]))
                    by_name.setdefault(name, []).append(stable is not None and stable.loaded is not None)
        enough = any if self.started else all
        return bool(by_name) and all(enough(answers) for answers in by_name.values())

    def entries(self) -> list[Entry]:
        """By name, then version. May be called in any thread."""
        entries = self.by_key.copy()  # in one step: none comes or goes in between
        return [entries[key] for key in sorted(entries, key=key_order)]

    def labels_of(self, entry: Entry) -> list[str]:
        labels = self.labels.get(entry.name)
        return sorted(label for label, version in labels.versions.items() if version == entry.version) if labels else []

    def get(self, name: str, version: str, key: str = "") -> Entry:
        """The entry that a request means, in whatever state.

        An empty name means the only model there is. A version is one, or a label; an empty one means the label `stable`
        (`canary` for its share of the requests) or, without labels, the newest that can answer, or the newest at all.

        Args:
            key: requests of the same key get the same of `stable` and `canary`; empty = each is drawn.
        Raises:
            ModelNotFoundError: no such model or version; the message lists what there is.
        """
        names = {key[0] for key in self.by_key}
        known = ", ".join(sorted(names)) or "none"
        if not name and len(names) != 1:
            raise ModelNotFoundError(f"expected the name of a model, got none: one of {known}")
        name = name or next(iter(names))
        of_name = (self.by_key[key] for key in sorted(self.by_key, key=key_order) if key[0] == name)
        versions = {entry.version: entry for entry in of_name}
        if not versions:
            raise ModelNotFoundError(f"no model {name!r}: this server has {known}")
        labels = self.labels.get(name, Labels({}))
        if not version and STABLE not in labels.versions:
            newest_first = list(reversed(versions.values()))
            return next((entry for entry in newest_first if entry.loaded is not None), newest_first[0])
        if not version:
            canary = versions.get(labels.versions.get(CANARY, ""))
            drawn = canary is not None and canary.loaded is not None and _share(key) < labels.canary_percent
            version = CANARY if drawn else STABLE
        found = versions.get(version) or versions.get(labels.versions.get(version, ""))
        if found is None:
            known = ", ".join([*versions, *labels.versions])
            named = labels.versions.get(version)
            asked = repr(version) if named is None else f"{named!r}, which is its {version!r},"
            raise ModelNotFoundError(f"no version {asked} of model {name!r}: there is {known}")
        return found

    @contextmanager
    def use(self, name: str, version: str, key: str = "") -> Iterator[tuple[Entry, Model]]:
        """As `get`, and able to answer; it stays so until the end of the context.

        Raises:
            ModelNotFoundError, ModelLoadingError, ModelFailedError
        """
        entry = self.get(name, version, key)
        if entry.loaded is None and entry.state is ModelState.FAILED:
            raise ModelFailedError(f"model {entry.name}/{entry.version} could not be loaded: {entry.failure}")
        if entry.loaded is None:
            raise ModelLoadingError(f"model {entry.name}/{entry.version} is being loaded: try again in a moment")
        with entry.loaded.in_use() as model:
            yield entry, model


def key_order(key: Key) -> tuple[str, Order]:
    """By name, then version, 9 before 10."""
    return key[0], natural_order(key[1])


def _share(key: str) -> float:
    """0 to 100: of equal keys the same, of many keys evenly spread."""
    return random.random() * 100 if not key else zlib.crc32(key.encode()) % 10_000 / 100
