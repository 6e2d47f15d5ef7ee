"""Where output goes: a folder, or a prefix of an object store. Files are whole or absent in both.

A folder's files are written under `_work`, synced and renamed into place. An object is put at once, which is whole or
nothing by itself; what fails there is tried again, with longer and longer pauses, before the job gives up.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from weakseg.errors import StorageError, UsageError, WeaksegError

WORK = "_work"  # below it lies what only matters while a job runs
ATTEMPTS = 6
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    WeaksegError,  # what we say ourselves
)

Out = TypeVar("Out")


class Store(Protocol):
    """Paths are relative, with "/" between parts."""

    url: str

    def read(self, path: str) -> bytes | None:
        """The content; None where there is no such file."""

    def lines(self, path: str) -> Iterator[bytes]:
        """Its lines with their ends, one in memory at a time; none where there is no such file."""

    def write(self, path: str, data: bytes) -> None:
        """Make or replace a file. A reader, a crash or a full disk never meets half of it."""

    def create(self, path: str, data: bytes) -> bool:
        """Make a file unless there is one; False where there is. Of an object store two at once may both get True."""

    def writing(self, path: str) -> Any:
        """A context of a binary file for content that does not fit in memory; in place once the block ends well."""

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files right in a folder; none where it is not there."""

    def exists(self, path: str) -> bool: ...

    def remove(self, path: str) -> None:
        """A file or a folder with all that is in it; none is no error."""

    def prune(self, folder: str) -> None:
        """Remove a folder if nothing is in it."""


def open_store(url: str, scratch: str) -> Store:
    """A folder's path, or a URL that fsspec knows (s3://bucket/prefix, gs://, memory://, ...).

    Args:
        scratch: name of a folder below WORK that this process, or those of its shard, may use and clear.
    """
    if "://" not in url:
        return LocalStore(Path(url), scratch)
    return ObjectStore(url)


class LocalStore:
    """A folder on a file system, network file systems among them."""

    def __init__(self, root: Path, scratch: str) -> None:
        self.root, self.url = root, str(root)
        self._scratch = root / WORK / scratch / "tmp"

    def read(self, path: str) -> bytes | None:
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError:
            return None

    def lines(self, path: str) -> Iterator[bytes]:
        with suppress(FileNotFoundError), (self.root / path).open("rb") as file:
            yield from file

    def write(self, path: str, data: bytes) -> None:
        def write_and_rename() -> None:
            with self._written(data) as temporary:
                temporary.replace(self._target(path))

        beside_cleaning(write_and_rename)

    def create(self, path: str, data: bytes) -> bool:
        def write_and_link() -> bool:
            with self._written(data) as temporary:
                try:
                    os.link(temporary, self._target(path))
                except FileExistsError:
                    return False
                return True

        return not self.exists(path) and beside_cleaning(write_and_link)

    @contextmanager
    def writing(self, path: str) -> Iterator[IO[bytes]]:
        temporary = self._temporary()
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._target(path))
        finally:
            temporary.unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self.root / folder) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())
        except FileNotFoundError:
            return []

    def exists(self, path: str) -> bool:
        return (self.root / path).exists()

    def remove(self, path: str) -> None:
        target = self.root / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target, ignore_errors=True)
        else:
            with suppress(FileNotFoundError, IsADirectoryError):  # the latter: another worker made it just now
                target.unlink()

    def prune(self, folder: str) -> None:
        with suppress(OSError):  # not empty, or not there
            (self.root / folder).rmdir()

    @contextmanager
    def _written(self, data: bytes) -> Iterator[Path]:
        temporary = self._temporary()
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _temporary(self) -> Path:
        self._scratch.mkdir(parents=True, exist_ok=True)
        return self._scratch / uuid.uuid4().hex

    def _target(self, path: str) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


class ObjectStore:
    """A prefix of whatever fsspec reaches."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = filesystem(self.url)

    def read(self, path: str) -> bytes | None:
        try:
            return bytes(persistent(lambda: self._fs.cat_file(self._at(path)), f"read {self._at(path)}"))
        except FileNotFoundError:
            return None

    def lines(self, path: str) -> Iterator[bytes]:
        with tempfile.NamedTemporaryFile(prefix="weakseg-") as file, suppress(FileNotFoundError):
            persistent(lambda: self._fs.get_file(self._at(path), file.name), f"read {self._at(path)}")
            yield from file

    def write(self, path: str, data: bytes) -> None:
        persistent(lambda: self._fs.pipe_file(self._at(path), data), f"write {self._at(path)}")

    def create(self, path: str, data: bytes) -> bool:
        if self.exists(path):
            return False
        self.write(path, data)
        return True

    @contextmanager
    def writing(self, path: str) -> Iterator[IO[bytes]]:
        """By way of a temporary file here, so that it can be sent again."""
        with tempfile.NamedTemporaryFile(prefix="weakseg-") as file:
            yield file
            file.flush()
            persistent(lambda: self._fs.put_file(file.name, self._at(path)), f"write {self._at(path)}")

    def names(self, folder: str) -> list[str]:
        try:
            self._fs.invalidate_cache()
            found = persistent(lambda: self._fs.ls(self._at(folder), detail=True), f"list {self._at(folder)}")
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rsplit("/", 1)[-1] for entry in found if entry["type"] == "file")

    def exists(self, path: str) -> bool:
        self._fs.invalidate_cache()
        return bool(persistent(lambda: self._fs.exists(self._at(path)), f"look for {self._at(path)}"))

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            persistent(lambda: self._fs.rm(self._at(path), recursive=True), f"remove {self._at(path)}")

    def prune(self, folder: str) -> None:
        """Object stores have no folders."""

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


def beside_cleaning(act: Callable[[], Out]) -> Out:
    """`act`, which may be done twice: another process of the same shard that ends clears the folder that both write
    in, perhaps with a file that is not in its place yet."""
    for _ in range(ATTEMPTS - 1):
        with suppress(FileNotFoundError, FileExistsError):  # the latter: of a folder that goes as it is made
            return act()
    return act()


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
        UsageError: an unknown protocol, or one whose package is not installed.
    """
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{url}: expected a folder or a URL that fsspec can open, got: {error}") from error
    return fs, path.rstrip("/")


def persistent(act: Callable[[], Out], what: str) -> Out:
    """`act`, again after a pause where it fails: networks and servers do. What says no for good is raised at once.

    Raises:
        FINAL errors as they are; StorageError when the last attempt fails.
    """
    pause_s = FIRST_PAUSE_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return act()
        except FINAL:
            raise
        except Exception as error:  # every store has exceptions of its own
            if attempt == ATTEMPTS:
                raise StorageError(
                    f"could not {what} in {ATTEMPTS} attempts: {type(error).__name__}: {error}. What is finished is "
                    "kept: run the same command again"
                ) from error
        time.sleep(pause_s * random.uniform(0.5, 1.0))  # many workers fail together; let them not come back together
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    raise AssertionError
