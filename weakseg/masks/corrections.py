"""Masks that people have corrected, for training: read in any format, and found their image in a split.

Label Studio's JSON export, CVAT's XML ("CVAT for images"), COCO instances JSON, or a folder of index PNGs
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import ClassTable
from weakseg.datasets.common import IMAGE_SUFFIXES
from weakseg.datasets.sample import Dataset, Sample
from weakseg.datasets.truth import label_map_from_png
from weakseg.errors import ConfigError, DataError, DatasetError, ImageError
from weakseg.image import probe
from weakseg.masks.labelled import LabelledImage

SHOWN = 5  # names in a message
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, eq=False)
class Correction:
    """labels: (H, W) mask values of the image, at its upright size. beyond_tags: class indices that its tags lack."""

    sample: Sample
    labels: NDArray[Any]
    beyond_tags: tuple[int, ...]


def read_corrections(path: Path, classes: ClassTable) -> Iterator[LabelledImage]:
    """The masks of a file or folder, one at a time; what it is its first character says.

    Raises:
        ConfigError: no such file.
        DataError: none of the formats, or damaged; the message names the file.
        UnknownClassError: a class outside the table.
    """
    if path.is_dir():
        yield from _from_folder(path, classes)
        return
    data = _content(path)
    try:
        yield from _from_file(data, classes)
    except DataError as error:
        raise type(error)(f"{path}: {error}") from error


def corrections_of(path: Path, dataset: Dataset) -> Iterator[Correction]:
    """The corrections of a split's images, each once.

    A name leads to the sample whose path or id ends with most of its parts, suffixes aside: `b/a.png` to `x/b/a.jpg`
    rather than to `x/c/a.jpg`. The file name alone is enough where it is unique.

    Raises:
        DatasetError: a name that leads to no image, or to several; two masks of one image; a mask of another size than
            its image. Names are looked at to the end, so that the message can say how many lead somewhere.
        And what `read_corrections` raises.
    """
    images = _Images(dataset)
    first: dict[str, str] = {}
    unknown: list[str] = []
    for image in read_corrections(path, dataset.classes):
        found = images.named(image.name)
        if len(found) > 1:
            shown = ", ".join(str(sample.image) for sample in found[:SHOWN])
            raise DatasetError(f"{path}: expected a name that leads to one image, got {image.name!r} for {shown}")
        if not found:
            unknown.append(image.name)
            continue
        sample = found[0]
        if sample.id in first:
            raise DatasetError(
                f"{path}: expected every image once, got {first[sample.id]!r} and {image.name!r} for {sample.image}"
            )
        first[sample.id] = image.name
        _check_size(path, image, sample)
        present = {value - 1 for value in np.unique(image.labels).tolist() if 0 < value <= len(dataset.classes)}
        yield Correction(sample, image.labels, tuple(sorted(present - {*sample.tags})))
    if unknown:
        shown = ", ".join(map(repr, unknown[:SHOWN])) + (", …" if len(unknown) > SHOWN else "")
        raise DatasetError(
            f"{path}: expected names of images of split {dataset.split!r}, such as {dataset.samples[0].image}, got "
            f"{shown}: {len(first)} of {len(first) + len(unknown)} lead to an image; take the others out or rename them"
        )
    if not first:
        raise DatasetError(f"{path}: expected corrected masks, got none")


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of the paths and contents of the PNGs in a folder. Raises ConfigError: no such file."""
    if not path.is_dir():
        return hashlib.sha256(_content(path)).hexdigest()
    whole = hashlib.sha256()
    for file in _pngs(path):
        name = file.relative_to(path).as_posix()
        whole.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"expected corrected masks in {path}, got: {error.strerror or error}") from error


def _from_file(data: bytes, classes: ClassTable) -> Iterator[LabelledImage]:
    first = data.removeprefix(_MARK).lstrip()[:1]
    if first == b"[":
        from weakseg.masks import label_studio

        yield from label_studio.read_export(data, classes)
    elif first == b"{":
        from weakseg.masks import coco

        yield from coco.read_instances(data, classes)
    elif first == b"<":
        from weakseg.masks import cvat

        yield from cvat.read_xml(data, classes)
    else:
        raise DataError(
            "expected JSON of Label Studio or COCO, XML of CVAT, or a folder of index PNGs, got a file that begins "
            f"with {first!r}"
        )


def _from_folder(path: Path, classes: ClassTable) -> Iterator[LabelledImage]:
    for file in _pngs(path):
        labels = label_map_from_png(file.read_bytes(), len(classes), file)
        yield LabelledImage(file.relative_to(path).as_posix(), labels)


def _pngs(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.suffix.lower() == ".png" and not file.name.startswith("."))


def _check_size(path: Path, image: LabelledImage, sample: Sample) -> None:
    try:
        size = probe(sample.image.read_bytes()).oriented_size
    except OSError as error:
        raise ImageError(f"{sample.image}: expected an image file, got: {error.strerror or error}") from error
    except ImageError as error:
        raise ImageError(f"{sample.image}: {error}", error.reason) from error
    if image.labels.shape != size:
        raise DatasetError(
            f"{path}: expected the mask of {image.name!r} to have the size of {sample.image}, {size[1]}x{size[0]}, "
            f"got {image.labels.shape[1]}x{image.labels.shape[0]}"
        )


# Names ----------------------------------------------------------------------------------------------------------------


class _Name(NamedTuple):
    """Of an image: the parts of its path, the last without its suffix."""

    parts: tuple[str, ...]
    suffix: str


class _Images:
    """The samples of a split by the last part of their paths and ids."""

    def __init__(self, dataset: Dataset) -> None:
        self._by_stem: dict[str, list[tuple[_Name, Sample]]] = defaultdict(list)
        for sample in dataset:
            for name in {_name(sample.image.as_posix()), _name(sample.id)}:
                self._by_stem[name.parts[-1]].append((name, sample))

    def named(self, text: str) -> Sequence[Sample]:
        """Those with the longest common tail, of equal ones those with the same suffix."""
        name = _name(text)
        if not name.parts:
            return ()
        likely = [
            ((_n_common(name, other), name.suffix == other.suffix), sample)
            for other, sample in self._by_stem.get(name.parts[-1], ())
        ]
        best = max((score for score, _ in likely), default=None)
        return list({sample.id: sample for score, sample in likely if score == best}.values())


def _name(text: str) -> _Name:
    """Of a path, or of a URI: without its scheme, host and query."""
    if "://" in text:
        text = unquote(urlsplit(text).path)
    path = PurePosixPath(text.replace("\\", "/"))
    suffix = path.suffix if path.suffix.lower() in IMAGE_SUFFIXES else ""
    parts = [part for part in path.parts if part not in ("/", "..")]
    if parts and suffix:
        parts[-1] = parts[-1].removesuffix(suffix)
    return _Name(tuple(parts), suffix.lower())


def _n_common(one: _Name, other: _Name) -> int:
    """How many parts are the same, counted from the last."""
    same = [a == b for a, b in zip(reversed(one.parts), reversed(other.parts), strict=False)]
    return same.index(False) if False in same else len(same)
