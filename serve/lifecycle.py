"""How models come and go.

`reload` looks at the folders again. A version that is new or changed is loaded; one that fails leaves what was there as
it was; one that is gone goes when its last request is answered. A model that answers is never closed under a request.
`load` and `unload` are the operator's word about one version, which holds over every later look at the folders.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, Literal, TypeVar

from serve.models import Entry, Key, Loaded, Models, ModelState, key_order
from serve.repository import CANARY, BundleFolder, Labels, bundle_stamp, find_labels, weight_bytes
from weakseg.errors import (
    ConfigError,
    FoldersUnreadableError,
    ModelFailedError,
    ModelNeededError,
    ModelNotFoundError,
    WeaksegError,
)
from weakseg.memory import available_bytes
from weakseg.model import Model

LoadPolicy = Literal["swap", "stop_first"]
T = TypeVar("T")

# Measured with MobileNetV2: a loaded bundle takes 1.2 times its graphs, twice that side by side, an image 50 MiB.
MEMORY_FACTOR = 3
MEMORY_MARGIN = 64 * 2**20
FOLDERS = re.compile(r"(?<![\w./])/(?:[^\s/:]+/)+(?=[^\s/:])")  # of absolute paths; the last name stays

log = logging.getLogger("serve.models")


class Lifecycle:
    """Loads, replaces and closes models. Belongs to one event loop; loading runs in a thread, one model at a time.

    Changes are made one after the other, each to its end even if its caller goes away: half of one would leave a
    version that is LOADING for ever.

    Args:
        models: what there is; nobody else changes it.
        scan: the bundles that there should be.
        load: opens one.
        on_change: told of every entry that has changed; one that is gone is UNLOADING.
        close: of a model that nobody uses any more; None = its own.
        policy: `swap` loads what is new beside what it replaces, `stop_first` after it: this takes the memory of one,
            and nothing answers in between.
        keep: so many of the newest versions of each model, and those with a label; 0 = all.
    """

    def __init__(
        self,
        models: Models,
        scan: Callable[[], Sequence[BundleFolder]],
        load: Callable[[Path], Model],
        on_change: Callable[[Entry], None],
        *,
        close: Callable[[Model], Awaitable[None]] | None = None,
        policy: LoadPolicy = "swap",
        keep: int = 0,
    ) -> None:
        self.models = models
        self._scan = scan
        self._load = load
        self._on_change = on_change
        self._close = close or (lambda model: asyncio.to_thread(model.close))
        self._policy = policy
        self._keep = keep
        self._out: set[Key] = set()  # what the operator has unloaded: as if it lay in no folder
        self._pinned: set[Key] = set()  # what the operator has loaded beyond `keep`
        self._unmoved: set[tuple[str, str, str]] = set()  # labels of versions that do not answer: model, label, version
        self._changing = asyncio.Lock()
        self._task: asyncio.Task[Any] | None = None  # of the latest change
        folders = scan()
        self._labels = find_labels(folders)  # as the files have them
        self.models.labels = self._labels
        for folder in self._wanted(folders):
            self.models.by_key[_key(folder)] = Entry(folder)

    @property
    def settled(self) -> bool:
        """Whether nothing is being loaded."""
        states = [entry.state for entry in self.models.by_key.values()]
        return not self._changing.locked() and ModelState.LOADING not in states

    def unloaded(self) -> list[Key]:
        """Versions that the operator has taken out of service, by name and version."""
        return sorted(self._out, key=key_order)

    async def reload(self) -> str:
        """Look at the folders, and load, replace and drop what is new, changed or gone; what fails stops nothing else.

        Returns: why they could not be read; empty = they were.
        """
        try:
            await self._alone(self._reload)
        except FoldersUnreadableError as error:
            log.error("models not reloaded", extra={"fields": {"failure": str(error)}})
            return str(error)
        return ""

    async def load(self, name: str, version: str) -> Entry:
        """Load a version that lies in the folders, and keep it from now on; one that answers, unchanged, stays.

        Raises:
            ModelNotFoundError: there is none such in the folders. FoldersUnreadableError
            ModelFailedError: it cannot be loaded; what answered before still does, but for `stop_first`.
        """
        entry = await self._alone(lambda: self._load_one((name, version)))
        if entry.failure:
            raise ModelFailedError(f"model {name}/{version} could not be loaded: {entry.failure}")
        return entry

    async def unload(self, name: str, version: str, *, force: bool) -> None:
        """Take a version out of service until `load`; returns when its last request is answered.

        Raises:
            ModelNotFoundError
            ModelNeededError: it has a label, or is the last one that answers, and no `force`.
        """
        await self._alone(lambda: self._unload_one((name, version), force=force))

    async def _alone(self, change: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """A caller that goes away while it waits for its turn has changed nothing; after that the change goes on."""
        await self._changing.acquire()
        task = asyncio.create_task(change())
        task.add_done_callback(self._changed)
        self._task = task
        await asyncio.wait([task])
        return task.result()

    def _changed(self, task: asyncio.Task[Any]) -> None:
        self._changing.release()
        if not task.cancelled():
            task.exception()  # seen, even if its caller is gone

    async def _reload(self) -> None:
        folders = await _reading(self._scan)
        self._labels = await _reading(find_labels, folders)
        self._move_labels()
        there = {_key(folder): folder for folder in folders if _key(folder) not in self._out}
        wanted = {_key(folder) for folder in self._wanted(folders)}
        if self._policy == "stop_first":
            await self._unload_all(key for key in self.models.by_key if key not in wanted)
        for key in sorted(wanted, key=key_order):
            await self._refresh(self.models.by_key.setdefault(key, Entry(there[key])), there[key])
        for name in sorted({name for name, _ in (*wanted, *self.models.by_key)}):
            await self._replace(name, wanted, there)
        self._tell_unmoved()

    async def _load_one(self, key: Key) -> Entry:
        folders = await _reading(self._scan)
        there = {_key(folder): folder for folder in folders}
        if key not in there:
            known = ", ".join("/".join(one) for one in sorted(there, key=key_order))
            raise ModelNotFoundError(f"no {'/'.join(key)} in the folders of models: there is {known}")
        self._out.discard(key)
        if key not in {_key(folder) for folder in self._wanted(folders)}:
            self._pinned.add(key)
        entry = self.models.by_key.setdefault(key, Entry(there[key]))
        if entry.failure:
            entry.stamp = None  # try again, though nothing has changed
        await self._refresh(entry, there[key])
        return entry

    async def _unload_one(self, key: Key, *, force: bool) -> None:
        entry = self.models.by_key.get(key)
        if entry is None and key in self._out:
            return
        if entry is None:
            known = ", ".join(f"{one.name}/{one.version}" for one in self.models.entries())
            raise ModelNotFoundError(f"no {'/'.join(key)} in service: there is {known}")
        labels = self.models.labels_of(entry)
        if labels and not force:
            raise ModelNeededError(f"{'/'.join(key)} is {', '.join(labels)}: move the label first, or use force")
        others = [one for one in self.models.by_key.values() if one.name == entry.name and one is not entry]
        if entry.loaded is not None and not force and all(one.loaded is None for one in others):
            raise ModelNeededError(
                f"{'/'.join(key)} is the last version of {entry.name} that answers: load another first, or use force"
            )
        self._out.add(key)
        self._pinned.discard(key)
        await self._unload(self.models.by_key.pop(key))

    async def _replace(self, name: str, wanted: Set[Key], there: Mapping[Key, BundleFolder]) -> None:
        """Versions that are not wanted go once wanted ones answer; where none of these can, what can stays."""
        answers = [self.models.by_key[key].loaded is not None for key in wanted if key[0] == name]
        others = [key for key in self.models.by_key if key[0] == name and key not in wanted]
        if all(answers):
            await self._unload_all(others)
            return
        if any(answers):
            await self._unload_all(key for key in others if key not in there)
            return
        older = sorted((key for key in there if key[0] == name and key not in wanted), key=key_order, reverse=True)
        for key in older:
            if any(entry.loaded is not None for entry in self.models.by_key.values() if entry.name == name):
                return
            await self._refresh(self.models.by_key.setdefault(key, Entry(there[key])), there[key])

    def _wanted(self, folders: Sequence[BundleFolder]) -> list[BundleFolder]:
        served = [folder for folder in folders if _key(folder) not in self._out]
        newest_first = sorted(served, key=lambda folder: key_order(_key(folder)), reverse=True)
        rank: Counter[str] = Counter()
        found = []
        for folder in newest_first:
            rank[folder.name] += 1
            labels = self._labels.get(folder.name, Labels({}))
            newest = not self._keep or rank[folder.name] <= self._keep
            if newest or folder.version in labels.versions.values() or _key(folder) in self._pinned:
                found.append(folder)
        return found

    def _move_labels(self) -> None:
        """A label whose new version cannot answer stays where it was, as long as that version can.

        Not `canary`: its share of the requests goes to `stable` then.
        """
        moved = {}
        for name, labels in self._labels.items():
            before, versions = self.models.labels.get(name, labels).versions, dict(labels.versions)
            for label in versions.keys() & before.keys() - {CANARY}:
                if not self._answers(name, versions[label]) and self._answers(name, before[label]):
                    versions[label] = before[label]
            moved[name] = replace(labels, versions=versions)
        self.models.labels = moved

    def _tell_unmoved(self) -> None:
        unmoved = {
            (name, label, version)
            for name, labels in self._labels.items()
            for label, version in labels.versions.items()
            if not self._answers(name, version)
        }
        for name, label, version in sorted(unmoved - self._unmoved):
            kept = self.models.labels[name].versions[label] != version
            fields = {"model": name, "label": label, "version": version, "kept": kept}
            log.error("label of a version that does not answer", extra={"fields": fields})
        self._unmoved = unmoved

    def _answers(self, name: str, version: str) -> bool:
        entry = self.models.by_key.get((name, version))
        return entry is not None and entry.loaded is not None

    async def close(self) -> None:
        """Also what a change under way has loaded; that one is given up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for entry in self.models.by_key.values():
            if entry.loaded is not None:
                await self._close_unused(entry.loaded)

    async def _refresh(self, entry: Entry, folder: BundleFolder) -> None:
        """Load it if it is new, was moved, or has changed since it was last tried."""
        now = await _reading(bundle_stamp, folder.path)
        if entry.stamp == now and entry.folder == folder:
            return
        entry.stamp, entry.folder = now, folder
        if entry.loaded is not None and self._policy == "stop_first":
            await self._release(entry, ModelState.LOADING)
        if entry.loaded is None:
            self._change(entry, ModelState.LOADING)
        started = monotonic()
        try:
            model = await asyncio.to_thread(load_checked, self._load, folder.path)
        except WeaksegError as error:
            self._failed(entry, str(error))
        except Exception:
            log.exception("loading %s/%s failed", entry.name, entry.version)
            self._failed(entry, "internal error: the server's log says more")
        else:
            before, entry.loaded = entry.loaded, Loaded(model)
            entry.failure, entry.loaded_at, entry.load_s = "", datetime.now(UTC), monotonic() - started
            self._change(entry, ModelState.READY)
            fields = {"model": entry.name, "version": entry.version, "seconds": round(entry.load_s, 3)}
            log.info(
                "model ready",
                extra={"fields": fields | {"sha256": model.bundle.sha256, "replaced": before is not None}},
            )
            if before is not None:
                await self._close_unused(before)

    def _failed(self, entry: Entry, failure: str) -> None:
        entry.failure = _told(failure, entry.folder)
        fields = {"model": entry.name, "version": entry.version, "failure": failure, "kept": entry.loaded is not None}
        log.error("model failed", extra={"fields": fields})
        self._change(entry, ModelState.FAILED if entry.loaded is None else ModelState.READY)

    async def _unload_all(self, keys: Iterable[Key]) -> None:
        for key in list(keys):
            await self._unload(self.models.by_key.pop(key))

    async def _unload(self, entry: Entry) -> None:
        await self._release(entry, ModelState.UNLOADING)
        log.info("model unloaded", extra={"fields": {"model": entry.name, "version": entry.version}})

    async def _release(self, entry: Entry, state: ModelState) -> None:
        loaded, entry.loaded = entry.loaded, None
        self._change(entry, state)
        if loaded is not None:
            await self._close_unused(loaded)

    async def _close_unused(self, loaded: Loaded) -> None:
        await loaded.idle.wait()
        await self._close(loaded.model)

    def _change(self, entry: Entry, state: ModelState) -> None:
        entry.state = state
        self._move_labels()
        self.models.started = self.models.started or self.models.ready
        self._on_change(entry)


async def _reading(read: Callable[..., T], *args: Any) -> T:
    """What a look at the folders gives, in a thread.

    Raises:
        FoldersUnreadableError
    """
    try:
        return await asyncio.to_thread(read, *args)
    except (WeaksegError, OSError) as error:  # OSError: they change under us
        raise FoldersUnreadableError(f"the folders of models cannot be read: {error}") from error


def _told(failure: str, folder: BundleFolder) -> str:
    """Without where the bundle lies, or a key or a library: clients read this. The log has it in full."""
    told = failure.replace(f"{folder.path}/", "").replace(f" {folder.path}", f" {folder.name}/{folder.version}")
    return FOLDERS.sub("", told)


def load_checked(load: Callable[[Path], Model], folder: Path) -> Model:
    """Refuses a bundle that would not fit beside what is loaded, while nothing has been taken yet."""
    needed, available = MEMORY_FACTOR * weight_bytes(folder) + MEMORY_MARGIN, available_bytes()
    if available is not None and needed > available:
        raise ConfigError(
            f"expected about {needed >> 20} MiB of free memory to load it, got {available >> 20} MiB: give the server "
            "more, serve fewer versions, or replace them with load_policy stop_first"
        )
    return load(folder)


def _key(folder: BundleFolder) -> Key:
    return folder.name, folder.version
