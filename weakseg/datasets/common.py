"""What the readers share: how a problem is told, text files with line numbers, ids, class lists.

A reader tells every problem to `complain` and then goes on without the thing that was wrong. `stop` raises at the first
one (reading for use); weakseg.datasets.check collects them all in one pass.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Protocol

from weakseg.classes import ClassTable
from weakseg.datasets.sample import Sample
from weakseg.errors import DataError, DatasetError, UnknownClassError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
BACKGROUND_NAMES = frozenset({"background", "_background_", "__background__"})


class Complain(Protocol):
    """Takes one problem: where it is (a file, with its line if it has one) and what was expected and found."""

    def __call__(self, where: str, message: str, error: type[DataError] = DatasetError, /) -> None: ...


def stop(where: str, message: str, error: type[DataError] = DatasetError) -> None:
    """The Complain of plain reading: the first problem ends it."""
    raise error(f"{where}: {message}")


def read_lines(path: Path) -> list[tuple[str, str]]:
    """("file:line", text) of every line that is not blank, stripped.

    Raises:
        DatasetError: the file cannot be read or is not UTF-8 text.
    """
    lines = enumerate(read_text(path).splitlines(), start=1)
    return [(f"{path}:{number}", line.strip()) for number, line in lines if line.strip()]


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, byte order mark dropped; DatasetError where that is not possible."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x}") from error
    except OSError as error:
        raise DatasetError(f"{path}: expected a text file, got: {error.strerror or error}") from error


def read_class_list(path: Path) -> tuple[str, ...]:
    """Class names, one a line, in the order of the mask values; a leading `background` is dropped."""
    names = [line for _, line in read_lines(path)]
    if names and names[0] in BACKGROUND_NAMES:
        names = names[1:]
    return tuple(names)


def class_table(names: tuple[str, ...], where: str | Path) -> ClassTable:
    """The table of these names; a DatasetError says where they come from."""
    try:
        return ClassTable(names)
    except DatasetError as error:
        raise DatasetError(f"{where}: {error}") from error


def tag_indices(names: list[str], classes: ClassTable, where: str, complain: Complain) -> tuple[int, ...]:
    """Sorted class indices of names, repeats merged; an unknown name is complained about and left out."""
    indices = set()
    for name in names:
        try:
            indices.add(classes.index(name))
        except UnknownClassError as error:
            complain(where, str(error), UnknownClassError)
    return tuple(sorted(indices))


def is_safe_id(sample_id: str) -> bool:
    """Whether an id can name files below a folder: relative, no empty, `.` or `..` part, no backslash or NUL."""
    parts = PurePosixPath(sample_id).parts
    plain = bool(parts) and not sample_id.startswith("/") and "/".join(parts) == sample_id
    return plain and ".." not in parts and not any(mark in sample_id for mark in ("\\", "\0"))


def unique(samples: list[tuple[str, Sample]], complain: Complain) -> tuple[Sample, ...]:
    """The samples of (where, sample) pairs without those whose id is unsafe or came before."""
    kept: dict[str, Sample] = {}
    for where, sample in samples:
        if not is_safe_id(sample.id):
            complain(where, f"expected an id that can be a file name, got {sample.id!r}: no '..', no leading '/'")
        elif sample.id in kept:
            complain(where, f"expected every id once, got {sample.id!r} again: remove one of the two")
        else:
            kept[sample.id] = sample
    return tuple(kept.values())
