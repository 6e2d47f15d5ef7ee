"""Rows of finished images, kept as a job goes on: what is in the journal is not done again.

Rows are gathered and stored every few seconds as segments, files that are whole or absent: object stores cannot append.
What was not stored when a job was killed is done again, to the same bytes. In this process rows lie in a temporary
file; memory holds the names of the images and two numbers for each.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import uuid
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import cast

from weakseg.batch.inputs import Item
from weakseg.batch.manifest import Row, line_of
from weakseg.batch.store import Store

FLUSH_S, FLUSH_ROWS = 5.0, 1000


class Journal:
    """The rows of one shard. `close` it, or use `with`."""

    def __init__(self, store: Store, folder: str, items: Sequence[Item]) -> None:
        self._store, self._folder, self._items = store, folder, items
        self._index = {item.uri: i for i, item in enumerate(items)}
        self._spool = tempfile.TemporaryFile(prefix="weakseg-rows-")  # noqa: SIM115  # closed by `close`
        self._start, self._length = array("q", [0] * len(items)), array("q", [0] * len(items))
        self._unclear: set[int] = set()  # images of which rows contradict each other
        self._unstored: list[bytes] = []
        self._stored_at = time.monotonic()
        self.n_done, self.n_failed = 0, 0

    def load(self, part: str, config_sha256: str, again: bool = False) -> None:
        """Take over what earlier runs have finished.

        Rows of other settings, of images that are gone or have another size, key or other tags now, are left out. Of
        several rows of an image those of success count; where these differ, nobody knows which files lie there: again.

        Args:
            part: path of the shard's part of the manifest, which is there once it was finished.
            again: leave failed images out, too.
        """
        segments = [f"{self._folder}/{name}" for name in self._store.names(self._folder)]
        self._take(part, config_sha256, again)
        n_of_part = self._spool.seek(0, os.SEEK_END)
        for path in segments:
            self._take(path, config_sha256, again)
        if len(segments) > 1:  # many small ones are slow to read the next time
            with self._store.writing(f"{self._folder}/{uuid.uuid4().hex}.jsonl") as file:
                self._spool.seek(n_of_part)
                shutil.copyfileobj(self._spool, file)
            for path in segments:
                self._store.remove(path)

    def add(self, row: Row) -> None:
        """A finished image; stored within FLUSH_S of the next call, or by `flush`."""
        line = line_of(row)
        if self._keep(self._index[row["uri"]], line, row):
            self._unstored.append(line)
        if len(self._unstored) >= FLUSH_ROWS or time.monotonic() - self._stored_at >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        if self._unstored:
            self._store.write(f"{self._folder}/{uuid.uuid4().hex}.jsonl", b"".join(self._unstored))
            self._unstored = []
        self._stored_at = time.monotonic()

    def pending(self) -> Iterator[Item]:
        return (item for item, length in zip(self._items, self._length, strict=True) if not length)

    def lines(self) -> Iterator[bytes]:
        """Every finished row in the order of the items."""
        for start, length in zip(self._start, self._length, strict=True):
            if length:
                self._spool.seek(start)
                yield self._spool.read(length)

    def rows(self) -> Iterator[Row]:
        return (cast(Row, json.loads(line)) for line in self.lines())

    def close(self) -> None:
        self._spool.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, path: str, config_sha256: str, again: bool) -> None:
        for line in self._store.lines(path):
            row = _parsed(line)
            if row is None or row.get("config_sha256") != config_sha256 or (again and row["status"] == "failed"):
                continue
            i = self._index.get(row["uri"])
            if i is None:
                continue
            if self._length[i]:
                self._settle(i, line, row)
            elif _same_image(self._items[i], row) and i not in self._unclear:
                self._keep(i, line, row)
            elif row["status"] == "ok":  # its files may lie where those of a row that fits are said to be
                self._unclear.add(i)

    def _settle(self, i: int, line: bytes, row: Row) -> None:
        """Another row of an image that has one already."""
        if row["status"] != "ok":
            return
        self._spool.seek(self._start[i])
        kept = json.loads(self._spool.read(self._length[i]))
        if kept == row:
            return
        self._forget(i, kept)
        if kept["status"] == "failed" and _same_image(self._items[i], row):
            self._keep(i, line, row)
        else:
            self._unclear.add(i)

    def _forget(self, i: int, row: Row) -> None:
        self._length[i] = 0
        self.n_done -= 1
        self.n_failed -= row["status"] == "failed"

    def _keep(self, i: int, line: bytes, row: Row) -> bool:
        if self._length[i]:
            return False
        self._start[i], self._length[i] = self._spool.seek(0, os.SEEK_END), len(line)
        self._spool.write(line)
        self.n_done += 1
        self.n_failed += row["status"] == "failed"
        return True


def _parsed(line: bytes) -> Row | None:
    with suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and {"uri", "status"} <= row.keys() and line.endswith(b"\n"):
            return cast(Row, row)
    return None


def _same_image(item: Item, row: Row) -> bool:
    tags = None if item.tags is None else list(item.tags)
    sizes = (item.size, row.get("size_bytes"))
    return row.get("key") == item.key and row.get("tags") == tags and (None in sizes or sizes[0] == sizes[1])
