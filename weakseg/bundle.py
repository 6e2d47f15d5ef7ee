"""The model bundle on disk: <models>/<name>/<version>/manifest.json and the graphs it lists.

A bundle is opened only whole: every file has the hash that the manifest says, nothing points out of the folder, and the
graphs use standard operators and hold their own weights. Where a public key is given, its owner has signed it.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BufferedReader
from pathlib import Path, PurePosixPath

from weakseg import model_card, signature
from weakseg.errors import BundleError, ConfigError
from weakseg.files import atomic_folder
from weakseg.manifest import (
    INPUT,
    PRECISIONS,
    Manifest,
    Precision,
    check_manifest,
    manifest_from_bytes,
    manifest_to_bytes,
)
from weakseg.onnx_wire import WireError, read_content

MANIFEST, SIGNATURE, CARD = "manifest.json", "manifest.sig", "README.md"
LIMIT_MANIFEST_BYTES = 8 * 2**20  # a thousand classes and thirty evaluations are 5 MiB
LIMIT_BYTES = 8 * 2**30  # of all files: some seconds of hashing
STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
GRAPH_SUFFIXES = frozenset({".onnx", ".ort", ".plan", ".engine"})
Order = tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    sha256: of manifest.json, which holds the hashes of all other files.
    signed_by: fingerprint of the public key that was found to have signed it; None = no key was asked for.
    """

    folder: Path
    manifest: Manifest
    sha256: str
    signed_by: str | None = None

    def graph_paths(self, precision: Precision = "fp32") -> dict[str, Path]:
        """{graph: its file in that precision, or in fp32 where it has no such form}.

        Raises:
            ConfigError: no graph of the bundle has that precision.
        """
        graphs = self.manifest.graphs
        has = [p for p in PRECISIONS if any(p in graph.files() for graph in graphs.values())]
        if precision not in has:
            raise ConfigError(f"{self.folder}: expected a precision of {', '.join(has)}, got {precision!r}")
        return {name: self.folder / graph.files().get(precision, graph.file) for name, graph in graphs.items()}


def open_bundle(path: str | Path, *, public_key: str | Path | None = None) -> Bundle:
    """Find, read and verify a bundle.

    Args:
        path: the folder of a version; or of a model: its latest version; or a folder that holds exactly one model.
        public_key: PEM file of the keys of which one must have signed it.
    Raises:
        BundleError: nothing or too much there, or a bundle that is damaged or refused.
        ConfigError: the public key cannot be used.
    """
    folder = find_version(Path(path))
    manifest, sha256, signed_by = open_manifest(folder, public_key)
    graphs = {file: graph.outputs for graph in manifest.graphs.values() for file in graph.files().values()}
    left = LIMIT_BYTES
    for name, digest in manifest.files.items():
        left -= _check_file(inside(folder, name), digest, graphs.get(name), left)
    _refuse_unlisted(folder, manifest)
    return Bundle(folder, manifest, sha256, signed_by)


def open_manifest(folder: Path, public_key: str | Path | None = None) -> tuple[Manifest, str, str | None]:
    """The manifest of a version's folder, its SHA-256, and the key that signed it, if one was asked for.

    The signature is checked before anything is parsed; the files that it lists are not looked at.
    """
    data = read_manifest(folder)
    signed_by = None if public_key is None else _check_signature(folder, data, Path(public_key))
    return manifest_from_bytes(data, str(folder / MANIFEST)), hashlib.sha256(data).hexdigest(), signed_by


def read_manifest(folder: Path) -> bytes:
    """The manifest of a version's folder as it lies there, unchecked.

    Raises:
        BundleError: it cannot be read, or is larger than any manifest.
    """
    return _read(folder, MANIFEST, LIMIT_MANIFEST_BYTES)


def read_signature(folder: Path) -> bytes | None:
    """The signature of a version's folder, unchecked; None where there is none."""
    return _read(folder, SIGNATURE, signature.LIMIT_BYTES) if (folder / SIGNATURE).exists() else None


def write(models: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Write <models>/<name>/<version>/ whole or not at all; an older bundle of that version is replaced.

    Args:
        manifest: its `files` are filled in here.
        files: {relative path: content}; the model card, README.md, is made from the manifest and added.
    Raises:
        BundleError: the bundle would be refused on opening, or cannot be written.
    """
    if not {MANIFEST, SIGNATURE}.isdisjoint(files):
        raise BundleError(f"{MANIFEST} and {SIGNATURE} are not files of a bundle but about them: leave them out")
    files = {**files, CARD: model_card.card(manifest).encode()}
    manifest = replace(manifest, files={name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())})
    check_manifest(manifest)
    target = models / manifest.name / manifest.version
    try:
        with atomic_folder(target) as folder:
            for name, data in files.items():
                path = inside(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            (folder / MANIFEST).write_bytes(manifest_to_bytes(manifest))
            bundle = open_bundle(folder)
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "choose a folder that you may write to"
        raise BundleError(f"cannot write the bundle {target}: {error.strerror or error}: {hint}") from error
    return replace(bundle, folder=target)


def find_version(path: Path) -> Path:
    """The version folder that a path means; see `open_bundle`."""
    if (path / MANIFEST).is_file():
        return path
    if path.is_file():
        raise BundleError(
            f"expected the folder of a model bundle, got the file {path}: unpack it first if it is packed"
        )
    if not path.is_dir():
        raise BundleError(f"expected a model bundle at {path}, got no such folder: run `weakseg export` first")
    versions = _versions(path)
    if versions:
        return versions[-1]
    models = [folder for folder in _folders(path) if _versions(folder)]
    if len(models) == 1:
        return _versions(models[0])[-1]
    if models:
        names = ", ".join(folder.name for folder in models)
        raise BundleError(f"expected one model in {path}, got {len(models)} ({names}): name one of them")
    raise BundleError(f"expected {MANIFEST} in {path}, got none: is this the folder of a model bundle?")


@lru_cache(maxsize=1024)  # asked about every model for every request
def natural_order(text: str) -> Order:
    """Sort key under which 9 < 10 and v2 < v10."""
    parts = re.findall(r"\d+|\D+", text)
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts)


def check_graph(data: bytes | mmap.mmap, outputs: tuple[str, ...], where: str) -> None:
    """Refuse an ONNX file that reaches outside itself, unfolds on loading, or is another graph than the manifest says.

    Raises:
        BundleError: not an ONNX model, external data, custom operators, functions, sparse tensors, other inputs or
            outputs.
    """
    try:
        content = read_content(data)
    except WireError as error:
        raise BundleError(f"{where}: expected an ONNX model, got other or damaged data: {error}") from error
    if content.external:
        raise BundleError(
            f"{where}: the weights of {content.external[0]!r} are in another file, which is refused: "
            "save the graph with its weights inside"
        )
    custom = sorted({f"{domain}::{name}" for domain, name in content.operators if domain not in STANDARD_DOMAINS})
    if custom:
        raise BundleError(f"{where}: custom operators are refused, got {', '.join(custom[:5])}: use standard ones")
    if content.functions or content.n_sparse:  # a few hundred bytes of either can become gigabytes in a runtime
        what = f"the function {content.functions[0]}" if content.functions else "a sparse tensor"
        raise BundleError(f"{where}: functions and sparse tensors are refused, got {what}: inline it, make it dense")
    if content.inputs != [INPUT] or tuple(content.outputs) != outputs:
        raise BundleError(
            f"{where}: expected the input {INPUT} and the outputs {', '.join(outputs)}, "
            f"got {', '.join(content.inputs)} and {', '.join(content.outputs)}: the manifest is of another graph"
        )


def inside(folder: Path, name: str) -> Path:
    """The path of a listed file; refused unless it is a plain path below the folder, links followed."""
    pure = PurePosixPath(name)
    plain = bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and str(pure) == name
    if not plain or "\\" in name or ":" in name or "\0" in name:
        raise BundleError(f"{folder}: expected paths inside the bundle, got {name!r}: this bundle is not to be trusted")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{folder}: {name} is a link out of the bundle, which is refused: copy the file itself")
    return path


def _refuse_unlisted(folder: Path, manifest: Manifest) -> None:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in GRAPH_SUFFIXES and name not in manifest.files:
            raise BundleError(f"{folder}: {name} is a graph that the manifest does not list: remove it or export again")


def _check_signature(folder: Path, manifest: bytes, public_key: Path) -> str:
    made = read_signature(folder)
    if made is None:
        raise BundleError(
            f"{folder}: expected {SIGNATURE} by a key in {public_key}, got none: sign it with "
            "`weakseg bundle sign`, if you trust it"
        )
    return signature.check(manifest, made, public_key, str(folder / SIGNATURE))


def _check_file(path: Path, digest: str, outputs: tuple[str, ...] | None, limit_bytes: int) -> int:
    """Bytes of a listed file, once it has its hash and, as a graph with these outputs, passes `check_graph`."""
    with _opened(path, limit_bytes) as (file, n_bytes):
        got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != digest:
            raise BundleError(
                f"{path} is damaged: expected sha256 {digest[:12]}…, got {got[:12]}…: copy or export it again"
            )
        if outputs is not None:  # an empty file cannot be mapped
            graph = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if n_bytes else b""
            check_graph(graph, outputs, str(path))
    return n_bytes


def _read(folder: Path, name: str, limit_bytes: int) -> bytes:
    with _opened(inside(folder, name), limit_bytes) as (file, n_bytes):
        return file.read(n_bytes)


@contextmanager
def _opened(path: Path, limit_bytes: int) -> Iterator[tuple[BufferedReader, int]]:
    """A file of a bundle and its size; refused before a byte is read where that is no file or too much of it."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            raise BundleError(f"{path}: expected a file, got a folder, pipe or device: copy or export the bundle again")
        if status.st_size > limit_bytes:
            raise BundleError(
                f"{path}: expected at most {limit_bytes} bytes, got {status.st_size}: this is no file of a model bundle"
            )
        with path.open("rb") as file:
            yield file, status.st_size
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}: copy or export the bundle again") from error


def _versions(model: Path) -> list[Path]:
    """Version folders of a model, oldest first."""
    found = [folder for folder in _folders(model) if (folder / MANIFEST).is_file()]
    return sorted(found, key=lambda folder: natural_order(folder.name))


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
