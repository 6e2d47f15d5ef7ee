"""What an instances file of COCO says of its images, without its masks.

A file of COCO's size (450 MB) takes many seconds to parse, and GB as Python objects. So it is read once, element by
element, and what is kept of it goes to a file in the user's cache folder, for the next start: of each image its name,
size and categories, and at which bytes of the file its annotations lie, so that weakseg.datasets.truth finds them; of
masks, boxes and areas nothing. But for truth this is the only place where the file, which is sealed, is opened.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count
from pathlib import Path
from posixpath import splitext

import numpy as np
from numpy.typing import NDArray

from weakseg.datasets.common import is_safe_id
from weakseg.datasets.json_arrays import Element, arrays
from weakseg.datasets.sealed import open_sealed
from weakseg.errors import DatasetError
from weakseg.files import write_bytes_atomic

SCHEMA = 1  # raise it when an index holds something else: those in caches are then made again
MAX_PROBLEMS = 100
# A file younger than this may change again within a tick of its clock, so it is neither kept nor cached.
SETTLED_NS = 2 * 10**9


@dataclass(frozen=True, eq=False)
class Index:
    """n images in the order of the file, m pairs of an image and a category that it shows, k annotations.

    names: n file names; the id of each (`image_id`) is safe and unlike the others'.
    sizes: (n, 2) int32 H, W; 0 where the file does not say.
    categories: {id: name} in the order of the ids.
    tag_starts, tags: (n + 1,) and (m,) int64; image i shows those of `categories` that are at the positions
        tags[tag_starts[i] : tag_starts[i + 1]].
    span_starts, spans: (n + 1,) and (k, 2) int64; likewise the bytes [begin, end) of its annotations, in their order.
    has_mask: (n,) bool, whether every annotation of an image has a segmentation; False if no image of the file has one.
    sha256: of the file.
    problems: (where, message), at most MAX_PROBLEMS; what they speak of is left out.
    """

    names: tuple[str, ...]
    sizes: NDArray[np.int32]
    categories: Mapping[int, str]
    tag_starts: NDArray[np.int64]
    tags: NDArray[np.int64]
    span_starts: NDArray[np.int64]
    spans: NDArray[np.int64]
    has_mask: NDArray[np.bool_]
    sha256: str
    problems: tuple[tuple[str, str], ...]

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """{id: number of the image}"""
        return {image_id(name): row for row, name in enumerate(self.names)}


_ARRAYS = ("sizes", "tag_starts", "tags", "span_starts", "spans", "has_mask")


def image_id(name: str) -> str:
    """`photos/a.jpg` -> `photos/a`."""
    return splitext(name)[0]


def index(path: Path) -> Index:
    """The index of an instances file, from this process's memory, from the cache, or made.

    Raises:
        DatasetError: not JSON, not of this kind, or it changed while it was read.
    """
    path = Path(os.path.realpath(path))
    try:
        stat = path.stat()
    except OSError as error:
        raise DatasetError(f"{path}: expected COCO annotations, got: {error.strerror or error}") from error
    key = (stat.st_size, stat.st_mtime_ns)
    return _kept(path, key) if abs(time.time_ns() - stat.st_mtime_ns) > SETTLED_NS else _made(path, key)


def cache_path(path: Path, env: Mapping[str, str] = os.environ) -> Path:
    """Where the index of a file lies: weakseg/coco in the user's cache folder."""
    folder = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weakseg" / "coco"
    return folder / f"{path.stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.npz"


@lru_cache(maxsize=8)
def _kept(path: Path, key: tuple[int, int]) -> Index:
    try:
        where = cache_path(path)
    except RuntimeError:  # this user has no home
        return _made(path, key)
    found = _cached(where, key)
    if found is None:
        found = _made(path, key)
        _keep(where, key, found)
    return found


def _cached(where: Path, key: tuple[int, int]) -> Index | None:
    """The index that was written for this state of the file; None where there is none that can be read."""
    try:
        with where.open("rb") as file, np.load(file) as content:
            said = json.loads(content["said"].tobytes())
            if said["of"] != [SCHEMA, *key]:
                return None
            categories = {int(number): name for number, name in said["categories"]}
            problems = tuple((place, message) for place, message in said["problems"])
            kept = {name: content[name] for name in _ARRAYS}
            return Index(tuple(said["names"]), categories=categories, sha256=said["sha256"], problems=problems, **kept)
    except Exception:  # of a damaged file zip and NumPy raise whatever they met
        return None


def _keep(where: Path, key: tuple[int, int], made: Index) -> None:
    """Write the cache; where that is not possible the next start takes longer."""
    said = {
        "of": [SCHEMA, *key],
        "names": made.names,
        "categories": list(made.categories.items()),
        "sha256": made.sha256,
        "problems": made.problems,
    }
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(said).encode(), dtype=np.uint8)
    np.savez(buffer, said=text, **{name: getattr(made, name) for name in _ARRAYS})
    with suppress(OSError):
        write_bytes_atomic(where, buffer.getvalue())


def _made(path: Path, key: tuple[int, int]) -> Index:
    with open_sealed(path) as file:
        reading = _Reading(str(path))
        sha256 = hashlib.sha256()

        def read(n_bytes: int) -> bytes:
            data = file.read(n_bytes)
            sha256.update(data)
            return data

        try:
            reading.take_all(arrays(read))
        except DatasetError as error:
            raise DatasetError(f"{path}: {error}") from error
        stat = os.fstat(file.fileno())
    if (stat.st_size, stat.st_mtime_ns) != key:
        raise DatasetError(f"{path} changed while it was read: wait until it is written")
    return reading.index(sha256.hexdigest())


class _Reading:
    """What has been read so far. Annotations may come before images, so they are joined at the end."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.problems: list[tuple[str, str]] = []
        self.seen: set[str] = set()  # arrays
        self.positions: dict[int, int] = {}  # image id -> number of the image
        self.names: dict[str, str] = {}  # id that a sample gets -> file name
        self.sizes = array("i")
        self.categories: dict[int, str] = {}
        # Of each annotation: image id, category id, the bytes where it lies, and whether it has a mask.
        self.annotations = tuple(array("q") for _ in range(5))

    def take_all(self, found: Iterator[tuple[str, Iterator[Element]]]) -> None:
        takers: dict[str, Callable[[Element], str | None]] = {
            "images": self._image,
            "categories": self._category,
            "annotations": self._annotation,
        }
        for key, elements in found:
            if key not in takers:
                continue
            self.seen.add(key)
            for number, element in zip(count(), elements):
                wrong = takers[key](element) if isinstance(element.value, dict) else "expected an object"
                if wrong is not None:
                    self._complain(f"{self.where}: {key}[{number}]", wrong)
        missing = ", ".join(sorted(takers.keys() - self.seen))
        if missing:
            raise DatasetError(f"expected COCO's lists images, annotations and categories, got no list of {missing}")

    def _complain(self, where: str, message: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append((where, message))

    def _image(self, element: Element) -> str | None:
        """Note an image; returns what is wrong with it."""
        number, name = element.value.get("id"), element.value.get("file_name")
        if not _is_id(number) or number in self.positions:
            return f"expected an id that is a whole number of its own, got {number!r}"
        if not isinstance(name, str) or not is_safe_id(name) or not _is_text(name):
            return f"expected a file_name below the folder of the images, got {name!r}: no '..', no leading '/'"
        if (sample_id := image_id(name)) in self.names:
            return f"expected every image once, got {name!r} beside {self.names[sample_id]!r}: remove one of the two"
        self.positions[number] = len(self.names)
        self.names[sample_id] = name
        sides = [element.value.get(side) for side in ("height", "width")]
        self.sizes.extend(side if type(side) is int and 0 < side < 2**31 else 0 for side in sides)
        return None

    def _category(self, element: Element) -> str | None:
        number, name = element.value.get("id"), element.value.get("name")
        if not _is_id(number) or number in self.categories:
            return f"expected an id that is a whole number of its own, got {number!r}"
        if not isinstance(name, str) or not name.strip():
            return f"expected a name, got {name!r}"
        self.categories[number] = name.strip()
        return None

    def _annotation(self, element: Element) -> str | None:
        image, category = element.value.get("image_id"), element.value.get("category_id")
        if not _is_id(image) or not _is_id(category):
            return f"expected whole numbers image_id and category_id, got {image!r} and {category!r}"
        has_mask = bool(element.value.get("segmentation"))
        for column, value in zip(
            self.annotations, (image, category, element.begin, element.end, has_mask), strict=True
        ):
            column.append(value)
        return None

    def index(self, sha256: str) -> Index:
        images, categories, begins, ends, masks = (np.array(column, dtype=np.int64) for column in self.annotations)
        numbers = (self.positions.get(image, -1) for image in self.annotations[0])
        rows = np.fromiter(numbers, dtype=np.int64, count=len(images))
        ids = np.array(sorted(self.categories), dtype=np.int64)
        columns = np.searchsorted(ids, categories)
        known = np.isin(categories, ids)
        for at in np.flatnonzero((rows < 0) | ~known)[:MAX_PROBLEMS].tolist():
            what, number = ("an image", images[at]) if rows[at] < 0 else ("a category", categories[at])
            place = f"{self.where}: the annotation at byte {begins[at]}"
            self._complain(place, f"expected the id of {what} of this file, got {number}")
        kept = np.flatnonzero((rows >= 0) & known)
        kept = kept[np.argsort(rows[kept], kind="stable")]
        rows, columns = rows[kept], columns[kept]
        n = len(self.names)
        # Each pair of image and category once, in this order.
        tagged, tags = np.divmod(np.unique(rows * max(1, len(ids)) + columns), max(1, len(ids)))
        has_mask = np.full(n, masks.any())
        has_mask[rows[masks[kept] == 0]] = False
        return Index(
            names=tuple(self.names.values()),
            sizes=np.array(self.sizes, dtype=np.int32).reshape(n, 2),
            categories=dict(sorted(self.categories.items())),
            tag_starts=np.searchsorted(tagged, np.arange(n + 1)),
            tags=tags,
            span_starts=np.searchsorted(rows, np.arange(n + 1)),
            spans=np.stack([begins[kept], ends[kept]], axis=1),
            has_mask=has_mask,
            sha256=sha256,
            problems=tuple(self.problems),
        )


def _is_id(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_text(name: str) -> bool:
    """JSON can hold halves of a surrogate pair, file systems cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in name)
