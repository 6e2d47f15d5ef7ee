"""What there is to label: every image once, in the order of its URI, with its tags where they are known.

    DIR, s3://bucket/prefix     every image below it
    "DIR/**/*.jpg"              what matches
    list.txt                    a path or URL a line
    data.csv, data.parquet      a column `image` with paths or URLs, perhaps a column `tags`
    "shards-{000..099}.tar"     WebDataset: key.jpg, perhaps key.json with {"tags": [names]} or key.cls with a name
    --dataset voc, coco, ...    a split of a dataset that training reads, with its tags

Relative paths of lists and tables are relative to the file. Only names, sizes and tags are read here, no image.
"""

from __future__ import annotations

import csv
import errno
import glob
import hashlib
import io
import json
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path, PurePosixPath
from typing import IO, Any

from weakseg.batch.store import filesystem, persistent
from weakseg.datasets.common import IMAGE_SUFFIXES
from weakseg.errors import DatasetError, ImageError, UsageError
from weakseg.recipe import DataConfig

MAX_FILE_BYTES = 2**29  # of one image; beyond it is no photograph
MAX_NAME_BYTES = 200  # of a part of an output's path; file systems have 255, and outputs have endings
_OUTPUT_SUFFIXES = (".png", ".npz", ".txt", ".json")  # a folder of that name would be in the way of a file
_BRACES = re.compile(r"\{([^{}]*)\}")
_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")
# A file that says this of itself will not be there at the next attempt either.
_OF_THE_FILE = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}
)


@dataclass(frozen=True, slots=True)
class Item:
    """One image.

    uri: its name in the manifest, unique. key: path of its outputs, without an ending.
    path: of the file that holds it; offset: where it begins there, with `size` bytes; None = it is the whole file.
    size: in bytes; None = not known. tags: class names; None = not known.
    problem: why it cannot be read, if that is known already.
    """

    uri: str
    key: str
    path: str
    offset: int | None = None
    size: int | None = None
    tags: tuple[str, ...] | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Question:
    """What to list. dataset: a format of weakseg.datasets, of which `split` is taken; None = by the input's name."""

    input: str
    dataset: str | None = None
    split: str = "train"
    tags_key: str = "labels"


def find_items(question: Question) -> list[Item]:
    """All images, sorted by URI.

    Raises:
        UsageError: nothing by that name, or no image in it. DatasetError: a list or table that cannot be read.
    """
    found = _listed(question)
    if not found:
        raise UsageError(f"expected images in {question.input}, got none: {', '.join(IMAGE_SUFFIXES)} count as images")
    twice = [uri for uri, n in Counter(item.uri for item in found).items() if n > 1]
    if twice:
        raise DatasetError(f"expected every image once, got {twice[0]!r} again ({len(twice)} such): remove one of them")
    return _with_own_keys(sorted(found, key=lambda item: item.uri))


def shard_of(items: Sequence[Item], index: int, n: int) -> list[Item]:
    """Those of shard `index`: a function of the URI alone, so that new images move no other one."""
    return list(items) if n == 1 else [item for item in items if _hash(item.uri) % n == index]


def read(item: Item) -> bytes:
    """The bytes of an image's file.

    Raises:
        ImageError: UNREADABLE or IMAGE_TOO_LARGE; the file's own fault, it will be so the next time.
        OSError, StorageError: a disk or network that fails, which says nothing of this image.
    """
    if item.problem is not None:
        raise ImageError(item.problem, "UNREADABLE")
    if (item.size or 0) > MAX_FILE_BYTES:
        raise ImageError(f"expected at most {MAX_FILE_BYTES} bytes, got {item.size}", "IMAGE_TOO_LARGE")
    try:
        data = _read_url(item) if _SCHEME.match(item.path) else _read_file(item)
    except (OSError, ValueError) as error:  # the latter: a NUL in its name
        url = bool(_SCHEME.match(item.path))
        if isinstance(error, OSError) and not (
            isinstance(error, FileNotFoundError) if url else error.errno in _OF_THE_FILE
        ):
            raise
        why = getattr(error, "strerror", None) or type(error).__name__
        raise ImageError(f"expected an image file, got: {why}", "UNREADABLE") from error
    if item.offset is not None and len(data) != item.size:
        raise ImageError(f"expected {item.size} bytes in the shard, got {len(data)}: it is cut off", "UNREADABLE")
    return data


def _read_file(item: Item) -> bytes:
    kind = os.stat(item.path).st_mode
    if not stat.S_ISREG(kind):  # a pipe would be waited for
        code = errno.EISDIR if stat.S_ISDIR(kind) else errno.ENXIO
        raise OSError(code, os.strerror(code))
    with open(item.path, "rb") as file:
        if item.offset is not None:
            file.seek(item.offset)
            return file.read(item.size)
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"expected at most {MAX_FILE_BYTES} bytes, got more", "IMAGE_TOO_LARGE")
    return data


def _read_url(item: Item) -> bytes:
    fs, path = filesystem(item.path)
    start = item.offset
    end = None if item.offset is None or item.size is None else item.offset + item.size
    return bytes(persistent(lambda: fs.cat_file(path, start=start, end=end), f"read {item.path}"))


def _listed(question: Question) -> list[Item]:
    name = question.input
    if question.dataset is not None:
        return _from_dataset(question)
    paths = list(_expanded(name))
    if len(paths) > 1 or name.endswith((".tar",)):
        return [item for path in paths for item in _from_path(path, with_name=len(paths) > 1)]
    return list(_from_path(paths[0]))


def _from_path(path: str, with_name: bool = False) -> Iterable[Item]:
    """with_name: it is one of several, so that its images' names alone may clash."""
    readers: dict[str, Callable[[str], Iterable[Item]]] = {
        ".txt": _from_list,
        ".csv": _from_csv,
        ".parquet": _from_parquet,
        ".tar": _from_tar,
    }
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in readers and not _is_folder(path):
        return readers[suffix](path)
    if glob.has_magic(path) and not _is_folder(path):
        return _from_glob(path)
    if suffix in IMAGE_SUFFIXES and not _is_folder(path):
        return [Item(_shown(path), _shown(path), path, size=_size(path))]
    return _from_folder(path, with_name)


def _from_folder(path: str, with_name: bool) -> Iterator[Item]:
    before = f"{_shown(path.rstrip('/'))}/" if with_name else ""
    if _SCHEME.match(path):
        fs, root = filesystem(path)
        found = persistent(lambda: fs.find(root, detail=True), f"list {path}")
        for name, entry in found.items():
            inside = name.removeprefix(root).lstrip("/")
            if _is_image(inside):
                yield Item(before + inside, before + inside, fs.unstrip_protocol(name), size=entry.get("size"))
        return
    if not os.path.isdir(path):
        raise UsageError(
            f"{path}: expected a folder, an image, a list, a table or a tar file, got nothing by that name"
        )
    seen: set[tuple[int, int]] = set()
    for folder, below, names in os.walk(path, followlinks=True, onerror=_raise):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link upwards
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in names:
            inside = os.path.relpath(os.path.join(folder, name), path)
            if _is_image(inside):
                shown = before + _printable(inside.replace(os.sep, "/"))
                yield Item(shown, shown, os.path.join(folder, name), size=_size(os.path.join(folder, name)))


def _from_glob(pattern: str) -> Iterator[Item]:
    if _SCHEME.match(pattern):
        fs, path = filesystem(pattern)
        found = persistent(lambda: fs.glob(path, detail=True), f"list {pattern}")
        fixed = path[: path.index("*")].rpartition("/")[0] if "*" in path else path
        for name, entry in found.items():
            if entry["type"] == "file" and _is_image(name):
                shown = name.removeprefix(fixed).lstrip("/")
                yield Item(shown, shown, fs.unstrip_protocol(name), size=entry.get("size"))
        return
    parts = Path(pattern).parts
    fixed = str(Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))]))
    for name in glob.iglob(pattern, recursive=True):
        if os.path.isfile(name) and _is_image(name):
            shown = _printable(os.path.relpath(name, fixed).replace(os.sep, "/"))
            yield Item(shown, shown, name, size=_size(name))


def _from_list(path: str) -> Iterator[Item]:
    for line in _text(path).splitlines():
        if line.strip() and not line.startswith("#"):
            yield _named(line.strip(), path)


def _from_csv(path: str) -> Iterator[Item]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        if "image" not in columns:
            raise DatasetError(f"{path}:1: expected a column `image`, got {','.join(columns) or 'an empty file'}")
        for row in reader:
            if not (row["image"] or "").strip():
                raise DatasetError(f"{path}:{reader.line_num}: expected an image path, got an empty one")
            tags = None
            if "tags" in columns:
                tags = tuple(name.strip() for name in (row["tags"] or "").split(";") if name.strip())
            yield _named(row["image"].strip(), path, tags)
    except csv.Error as error:
        raise DatasetError(f"{path}:{reader.line_num}: expected CSV, got: {error}") from error


def _from_parquet(path: str) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _opened(path) as file:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if "image" not in names or not pyarrow.types.is_string(table.schema_arrow.field("image").type):
                raise DatasetError(f"{path}: expected a column `image` of paths as text, got {', '.join(names)}")
            for batch in table.iter_batches(columns=[name for name in ("image", "tags") if name in names]):
                for row in batch.to_pylist():
                    tags = row.get("tags")
                    if isinstance(tags, str):
                        tags = [name.strip() for name in tags.split(";") if name.strip()]
                    yield _named(row["image"], path, None if tags is None else tuple(tags))
    except pyarrow.ArrowException as error:
        raise DatasetError(f"{path}: expected a Parquet file, got: {error}") from error


def _from_tar(path: str) -> Iterator[Item]:
    """Members of one key are one sample. What comes after a damaged header is lost, and named as such."""
    shard = _shown(path).removesuffix(".tar")
    images: list[Item] = []
    tags: dict[str, tuple[str, ...]] = {}
    with _opened(path) as file:
        problem = None
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    stem, suffix = _split_key(member.name)
                    if suffix in IMAGE_SUFFIXES:
                        uri = f"{shard}.tar#{_printable(member.name)}"
                        cut = member.offset_data + member.size > size
                        why = f"the shard is cut off: it ends at byte {size}" if cut else None
                        place = (member.offset_data, member.size)
                        images.append(Item(uri, f"{shard}/{_printable(member.name)}", path, *place, problem=why))
                    elif suffix in (".json", ".cls") and member.size < 2**20:
                        extracted = archive.extractfile(member)
                        if extracted is not None and (said := _tags_of_member(suffix, extracted.read())) is not None:
                            tags[stem] = said
                # tarfile takes a damaged header for the end of the archive, which is a block of zeros, or nothing.
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    problem = f"the shard is damaged at byte {archive.offset}: members after this place are lost"
        except (tarfile.TarError, EOFError) as error:
            problem = f"the shard is damaged, members after this place are lost: {error}"
    stems = {item.uri: _split_key(item.uri.partition("#")[2])[0] for item in images}
    yield from (replace(item, tags=tags.get(stems[item.uri])) for item in images)
    if problem is not None:
        yield Item(f"{shard}.tar#", f"{shard}/damaged", path, problem=problem)


def _from_dataset(question: Question) -> list[Item]:
    """`read` seals the true masks of the dataset, if it has some, in this process."""
    from weakseg.datasets import read as read_dataset

    config = DataConfig(
        root=question.input,
        format=question.dataset,  # type: ignore[arg-type]  # checked by the command line
        train=question.split,
        val=question.split,
        tags_key=question.tags_key,
    )
    dataset = read_dataset(config, question.split)
    names = dataset.classes.names
    items = []
    for sample in dataset:
        path = str(sample.image)
        uri = _printable(os.path.relpath(path, dataset.root).replace(os.sep, "/"))
        items.append(Item(uri, sample.id, path, size=_size(path), tags=tuple(names[c] for c in sample.tags)))
    return items


def _named(name: str, source: str, tags: tuple[str, ...] | None = None) -> Item:
    """An image that a list or table names."""
    if _SCHEME.match(name) or os.path.isabs(name):
        path = name
    else:
        path = f"{source.rpartition('/')[0]}/{name}" if "/" in source else name
    return Item(name, name, path, size=None if _SCHEME.match(path) else _size(path), tags=tags)


def _with_own_keys(items: list[Item]) -> list[Item]:
    """Keys that are safe relative paths without the image's ending; with it where two would else be one."""
    safe = [_safe(item.key) for item in items]
    short = [str(PurePosixPath(key).with_suffix("")) if _is_image(key) else key for key in safe]
    n_of = Counter(map(str.casefold, short))  # case does not count on every file system
    keys = [long if n_of[key.casefold()] > 1 else key for long, key in zip(safe, short, strict=True)]
    taken = Counter(map(str.casefold, keys))
    return [
        replace(item, key=f"{key}-{_hash(item.uri):016x}" if taken[key.casefold()] > 1 else key)
        for item, key in zip(items, keys, strict=True)
    ]


def _safe(key: str) -> str:
    """A relative path below the output: no root, no `..`, no part longer than file systems take."""
    parts = [part for part in _SCHEME.sub("", key).replace("\\", "/").split("/") if part not in ("", ".", "..")]
    folders = [f"{part}_" if part.lower().endswith(_OUTPUT_SUFFIXES) else part for part in parts[:-1]]
    return "/".join(map(_short, [*folders, *parts[-1:]])) or "image"


def _short(part: str) -> str:
    if len(part.encode()) <= MAX_NAME_BYTES:
        return part
    suffix = PurePosixPath(part).suffix[:10]
    return f"{part.encode()[: MAX_NAME_BYTES - 40].decode(errors='ignore')}-{_hash(part):016x}{suffix}"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _expanded(pattern: str) -> Iterator[str]:
    """`{a,b}` and `{000..099}`, as shells write them."""
    choices = []
    for inside in _BRACES.findall(pattern):
        first, dots, last = inside.partition("..")
        if dots and first.isdigit() and last.isdigit():
            choices.append([str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)])
        else:
            choices.append(inside.split(","))
    fixed = _BRACES.split(pattern)[::2]
    for chosen in product(*choices):
        yield "".join(part for pair in zip(fixed, [*chosen, ""], strict=True) for part in pair)


def _tags_of_member(suffix: str, data: bytes) -> tuple[str, ...] | None:
    text = data.decode("utf-8", "replace").strip()
    if suffix == ".cls":
        return (text,) if text else None
    try:
        said = json.loads(text)
    except ValueError:
        return None
    tags = said.get("tags") if isinstance(said, dict) else None
    return tuple(_printable(str(tag)) for tag in tags) if isinstance(tags, list) else None


def _split_key(name: str) -> tuple[str, str]:
    """WebDataset's: the key ends at the first dot of the last part of the path."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()


def _is_image(name: str) -> bool:
    file = name.replace("\\", "/").rpartition("/")[2]
    return PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES and not file.startswith(".")


def _is_folder(path: str) -> bool:
    if not _SCHEME.match(path):
        return os.path.isdir(path)
    fs, inside = filesystem(path)
    return bool(persistent(lambda: fs.isdir(inside), f"look at {path}"))


def _opened(path: str) -> IO[Any]:
    try:
        if not _SCHEME.match(path):
            return open(path, "rb")
        fs, inside = filesystem(path)
        file: IO[Any] = persistent(lambda: fs.open(inside, "rb"), f"open {path}")
        return file
    except OSError as error:
        raise DatasetError(f"{path}: expected a file, got: {error.strerror or type(error).__name__}") from error


def _text(path: str) -> str:
    with _opened(path) as file:
        data = file.read()
    try:
        return str(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: expected UTF-8 text, got byte {data[error.start]:#04x}") from error


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return None  # whoever reads it finds out why


def _shown(path: str) -> str:
    """A file's own name, which is what it has in common wherever it lies."""
    return _printable(path.rstrip("/").rpartition("/")[2] or path)


def _printable(name: str) -> str:
    """Text that any file can hold: names of files need not be UTF-8."""
    try:
        data = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # of JSON, which may hold any half of a pair
        data = name.encode("utf-8", "surrogatepass")
    return data.decode("utf-8", "backslashreplace")


def _raise(error: OSError) -> None:
    """Of os.walk: a folder that cannot be listed must not look like an empty one."""
    raise error
