"""`weakseg bundle fetch`: a bundle from elsewhere into a folder of models, verified, whole or not at all.

Files are copied into `<models>/.fetch-<hash of the manifest>/`, each whole or absent, so that what was killed goes on
there. Once all of them are verified, that folder is renamed to `<models>/<name>/<version>/`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from io import FileIO
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import urlopen

from weakseg import signature
from weakseg.batch.store import filesystem, persistent
from weakseg.bundle import (
    LIMIT_BYTES,
    LIMIT_MANIFEST_BYTES,
    MANIFEST,
    SIGNATURE,
    Bundle,
    find_version,
    inside,
    open_bundle,
    open_manifest,
)
from weakseg.errors import BundleError, ConfigError
from weakseg.files import put_folder, write_bytes_atomic

STAGING = ".fetch-"
TIMEOUT_S = 30.0  # of a web server that says nothing
PIECE_BYTES = 2**20
Open = Callable[[str], AbstractContextManager[IO[bytes]]]  # a file of the bundle, by its name in it


def fetch(
    source: str, models: Path, *, sha256: str | None = None, public_key: Path | None = None
) -> tuple[Bundle, bool]:
    """The bundle of `source` below `models`, and whether it had to be fetched: False where it lies there, whole.

    Args:
        source: what `open_bundle` takes; http(s)://… or what fsspec can open (s3://…): the folder of a version.
        sha256: of its manifest.json, as `weakseg bundle verify` prints it; None = any.
        public_key: PEM file of the keys of which one must have signed it.
    Raises:
        BundleError: none there, another than the hash or the key says, damaged, refused, or no room for it.
        StorageError: the source does not answer, also when asked again.
        ConfigError: impossible arguments. OSError: the source says no.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ConfigError(f"--sha256 must be 64 hexadecimal digits, as `weakseg bundle verify` prints, got {sha256!r}")
    if public_key is not None:
        signature.public_keys(public_key)  # an unusable key is no fault of the source
    where = shown(source)
    read = _opener(source)
    models.mkdir(parents=True, exist_ok=True)
    with _alone(models):
        try:
            manifest = _small(read, MANIFEST, LIMIT_MANIFEST_BYTES, where)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BundleError(
                f"expected {MANIFEST} at {where}, got none: name the folder of a version, <models>/<name>/<version>"
            ) from error
        digest = hashlib.sha256(manifest).hexdigest()
        if sha256 not in (None, digest):
            raise BundleError(
                f"{where}: expected a {MANIFEST} of sha256 {sha256}, got {digest}: it is another bundle than the one "
                "that was named; name this one, if you trust it"
            )
        staging = _staging(models, digest)
        write_bytes_atomic(staging / MANIFEST, manifest)
        try:
            write_bytes_atomic(staging / SIGNATURE, _small(read, SIGNATURE, signature.LIMIT_BYTES, where))
        except (FileNotFoundError, PermissionError):  # the latter: what object stores say of what they may not list
            (staging / SIGNATURE).unlink(missing_ok=True)
        try:
            return _filled(read, staging, models, public_key, where)
        except BundleError as error:
            if isinstance(error.__cause__, OSError):  # it is about this side, or names the source itself
                raise
            raise BundleError(str(error).replace(str(staging), where)) from error


def shown(source: str) -> str:
    """A source without what may be secret in a URL."""
    if "://" not in source:
        return source
    parts = urlsplit(source)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _filled(read: Open, staging: Path, models: Path, public_key: Path | None, where: str) -> tuple[Bundle, bool]:
    """Fetch what the manifest in `staging` lists, verify all of it, and put it into its place."""
    manifest, digest, _ = open_manifest(staging, public_key)
    target = models / manifest.name / manifest.version
    try:
        there = open_bundle(target, public_key=public_key)
        if there.sha256 == digest:
            shutil.rmtree(staging)
            return there, False
    except BundleError:
        pass  # none, a damaged one, or one without the signature
    left = LIMIT_BYTES
    for name, expected in manifest.files.items():
        left -= _copied(read, name, inside(staging, name), expected, left, where)
    open_bundle(staging, public_key=public_key)
    put_folder(staging, target)
    return open_bundle(target, public_key=public_key), True


def _copied(read: Open, name: str, path: Path, expected: str, left: int, where: str) -> int:
    """Bytes of a file that is in its place now; one that already was, whole, is not fetched again."""
    if path.is_file() and _sha256(path) == expected:
        return path.stat().st_size
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")

    def copy() -> str:
        n_bytes, digest = 0, hashlib.sha256()
        with read(name) as stream, part.open("wb", buffering=0) as file:
            for piece in iter(lambda: stream.read(PIECE_BYTES), b""):
                n_bytes += len(piece)
                if n_bytes > left:
                    raise BundleError(f"{where}: expected at most {LIMIT_BYTES} bytes, got more: this is no bundle")
                digest.update(piece)
                _write(file, piece, part)
            if getattr(stream, "length", None):  # of a web server's answer: what has not come
                raise ConnectionError(f"the connection ended {stream.length} bytes too early")  # type: ignore[attr-defined]
        return digest.hexdigest()

    try:
        got = persistent(copy, f"fetch {where}/{name}")
    except FileNotFoundError as error:
        raise BundleError(f"{where}: expected {name}, got none: copy or export the bundle again") from error
    if got != expected:
        part.unlink()
        raise BundleError(
            f"{where}/{name} is damaged: expected sha256 {expected[:12]}…, got {got[:12]}…: copy or export it again"
        )
    part.replace(path)
    return path.stat().st_size


def _small(read: Open, name: str, limit_bytes: int, where: str) -> bytes:
    def act() -> bytes:
        with read(name) as stream:
            return stream.read(limit_bytes + 1)

    data = persistent(act, f"fetch {where}/{name}")
    if len(data) > limit_bytes:
        raise BundleError(f"{where}/{name}: expected at most {limit_bytes} bytes, got more: this is no bundle")
    return data


def _opener(source: str) -> Open:
    if source.startswith(("http://", "https://")):
        return lambda name: _open_url(source, name)
    if "://" in source:
        fs, root = filesystem(source)
        return lambda name: fs.open(f"{root}/{name}", "rb")
    folder = find_version(Path(source))
    return lambda name: inside(folder, name).open("rb")


def _open_url(source: str, name: str) -> AbstractContextManager[IO[bytes]]:
    """A query is kept: it may be what allows the access."""
    parts = urlsplit(source)
    url = parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}", fragment="").geturl()
    try:
        return urlopen(url, timeout=TIMEOUT_S)  # type: ignore[no-any-return]
    except HTTPError as error:
        error.close()
        said = f"{error.code} {error.reason}"
        if error.code in (404, 410):
            raise FileNotFoundError(errno.ENOENT, said, shown(url)) from None
        if error.code in (401, 403):
            raise PermissionError(errno.EACCES, f"the server refuses it ({said})", shown(url)) from None
        raise ConnectionError(said) from None


def _staging(models: Path, digest: str) -> Path:
    """Where this bundle is gathered; what is left of others goes."""
    staging = models / f"{STAGING}{digest[:16]}"
    for other in models.glob(f"{STAGING}*/"):
        if other != staging:
            shutil.rmtree(other)
    staging.mkdir(exist_ok=True)
    return staging


@contextmanager
def _alone(models: Path) -> Iterator[None]:
    """Others who fetch into the same folder wait."""
    with (models / ".fetch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(file: FileIO, piece: bytes, path: Path) -> None:
    left = memoryview(piece)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # trying again is in vain
            raise BundleError(f"no room for {path}: give its volume more; what has come is kept") from error
        raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
