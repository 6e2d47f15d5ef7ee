"""A job: what is done already, what is left, and how it ends.

The same command twice does nothing the second time. Killed anywhere and run again it ends in the same bytes: files are
whole or absent, an image whose row was not stored is done again, and everything about many images is written from the
rows, in the order of their URIs.
"""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

from weakseg.batch.exports import EXPORTS, Export, Finished, Format, write_exports
from weakseg.batch.inputs import Item
from weakseg.batch.journal import Journal
from weakseg.batch.labeller import Labeller, Outcome, config_of
from weakseg.batch.manifest import CONFIG, SUCCESS, part_path, shard_name
from weakseg.batch.review import write_review
from weakseg.batch.store import WORK, Store, beside_cleaning
from weakseg.batch.telemetry import Telemetry
from weakseg.errors import ConfigError, UsageError

Stopping: TypeAlias = Callable[[], bool]
Engine: TypeAlias = Callable[[Iterable[Item], Labeller, Stopping], Iterator[Outcome]]
ALL_FAILED = 42  # exit code: no image of the shard can be used, so that trying again is in vain


@dataclass(frozen=True)
class Shard:
    """index: of n. items: all of it."""

    index: int
    n: int
    items: Sequence[Item]

    @property
    def name(self) -> str:
        return shard_name(self.index, self.n)


@dataclass(frozen=True)
class Plan:
    """How to go about it; nothing of this changes a byte of the output.

    max_failures: stop when more images have failed; None = go on whatever happens.
    force: begin anew where the output was made with other settings. retry_failed: also images that failed before.
    """

    formats: tuple[Format, ...] = ("png",)
    review: int = 0
    max_failures: int | None = None
    force: bool = False
    retry_failed: bool = False
    silent: bool = False
    timings: Path | None = None
    textfile: Path | None = None


@dataclass(frozen=True)
class Summary:
    """total: images of the shard; ok, failed: of all runs; labelled: in this run. reasons: of this run's failures.
    signal: what ended it before its time. too_many: failures did. written: formats. config_sha256: of config.json."""

    total: int
    ok: int
    failed: int
    labelled: int
    images_per_s: float
    reasons: dict[str, int]
    signal: int | None
    too_many: bool
    tolerated: bool
    written: tuple[str, ...]
    config_sha256: str

    @property
    def finished(self) -> bool:
        return self.ok + self.failed == self.total

    @property
    def exit_code(self) -> int:
        """0 all is done, 3 some images failed, 42 all did, 128 + n ended by signal n."""
        if self.signal is not None and not self.finished:
            return 128 + self.signal
        if self.total and self.failed == self.total:
            return ALL_FAILED
        return 3 if self.too_many or (self.failed and not self.tolerated) else 0


def max_failures(text: str, n_items: int) -> int:
    """ "12" or "1%" as a number of images.

    Raises:
        ConfigError: neither.
    """
    share = text.endswith("%")
    try:
        value = float(text.removesuffix("%")) if share else int(text)
    except ValueError:
        value = -1
    if not value >= 0 or (share and value > 100):  # nor NaN
        raise ConfigError(f"expected --max-failures as a number of images or a share like 1%, got {text!r}")
    return ceil(value / 100 * n_items) if share else int(value)


def run(labeller: Labeller, shard: Shard, engine: Engine, plan: Plan) -> Summary:
    """Do what is left of a shard.

    Raises:
        UsageError: the output was made with other settings or another number of shards.
        OSError, StorageError, ServiceError: a disk, a bucket or a server fails; what is finished is kept.
    """
    store = labeller.store
    folder = f"{WORK}/{shard.name}"
    part = part_path(shard.index, shard.n)
    _agree(store, config_of(labeller, shard.n), plan.force)
    if plan.force:
        store.remove(part)
        store.remove(folder)
    with Journal(store, f"{folder}/journal", shard.items) as journal, _Signals() as signals:
        journal.load(part, labeller.config_sha256, again=plan.retry_failed)
        n_before = journal.n_done
        with Telemetry(
            len(shard.items),
            n_before,
            journal.n_failed,
            silent=plan.silent,
            timings=plan.timings,
            textfile=plan.textfile,
        ) as telemetry:

            def too_many() -> bool:
                return plan.max_failures is not None and telemetry.failed > plan.max_failures

            def stopping() -> bool:
                return signals.received is not None or too_many()

            try:
                if n_before < len(shard.items):
                    store.remove(SUCCESS)
                    for outcome in engine(journal.pending(), labeller, stopping):
                        journal.add(outcome.row)
                        telemetry.count(outcome)
            finally:
                journal.flush()
            written: list[str] = []
            if journal.n_done == len(shard.items):
                written = beside_cleaning(lambda: _finish(store, journal, shard, labeller, plan))
            ok = journal.n_done - telemetry.failed
            return Summary(
                len(shard.items),
                ok,
                telemetry.failed,
                journal.n_done - n_before,
                round(telemetry.images_per_s, 3),
                dict(telemetry.reasons),
                signals.received,
                too_many(),
                plan.max_failures is not None and not too_many(),
                tuple(written),
                labeller.config_sha256,
            )


def _agree(store: Store, config: bytes, force: bool) -> None:
    """One output has one configuration. Of several workers that begin at once one writes it, the others find theirs."""
    if store.create(CONFIG, config):
        return
    there = store.read(CONFIG)
    if there == config:
        return
    if not force:
        raise UsageError(
            f"{store.url} was made with other settings ({_difference(there or b'', config)}): choose another --output, "
            "give the settings of its config.json, or --force to begin it anew"
        )
    store.remove(SUCCESS)
    store.remove("manifest")
    store.remove(WORK)
    store.write(CONFIG, config)


def _difference(there: bytes, ours: bytes) -> str:
    """The settings that differ, as `name: theirs, now ours`."""
    try:
        theirs, mine = json.loads(there), json.loads(ours)
        names = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
        return "; ".join(f"{name}: {_brief(theirs.get(name))}, now {_brief(mine.get(name))}" for name in names)
    except (ValueError, AttributeError):
        return f"its {CONFIG} is damaged"


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _finish(store: Store, journal: Journal, shard: Shard, labeller: Labeller, plan: Plan) -> list[str]:
    """The shard's part of the manifest, what was asked for besides, and away with what only mattered on the way."""
    part = part_path(shard.index, shard.n)
    digest = _digest(journal.lines())
    if not store.exists(part) or digest != _digest(store.lines(part)):
        with store.writing(part) as file:
            for line in journal.lines():
                file.write(line)
    by = labeller.segmenter
    finished = Finished(store, journal, by.classes, by.palette, by.model, shard.name)
    names = dict.fromkeys(("png", *plan.formats))
    exports: list[tuple[str, str, Export]] = [(name, digest, EXPORTS[name]) for name in names]
    if plan.review:
        n = ceil(plan.review / shard.n)
        exports.append(("review", f"{digest}-{n}", lambda one: write_review(one, n)))
    written = write_exports(finished, exports)
    if not store.exists(SUCCESS) and all(_is_ours(store, i, shard.n, labeller) for i in range(shard.n)):
        store.write(SUCCESS, b"")
    store.remove(f"{WORK}/{shard.name}")
    store.prune(WORK)
    return written


def _is_ours(store: Store, index: int, n: int, labeller: Labeller) -> bool:
    """Whether a shard's part is there, made by this configuration; of an empty shard it is an empty file."""
    part = part_path(index, n)
    first = next(iter(store.lines(part)), b"")
    return store.exists(part) and (not first or json.loads(first)["config_sha256"] == labeller.config_sha256)


def _digest(lines: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line)
    return digest.hexdigest()


class _Signals:
    """SIGTERM and SIGINT: the first is noted, so that what is under way is finished; the second ends the process."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)
