"""What tests of the batch job share: photographs, outputs as they lie on disk, an object store that fails."""

import errno
import json
from pathlib import Path

import numpy as np
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

SHADES = {"red": (255, 0, 0), "green": (10, 230, 20), "blue": (30, 30, 220)}


def paint(path, *names, size=(40, 56), **options):
    """Grey, with a band of each colour."""
    image = np.full((*size, 3), 128, np.uint8)
    for i, name in enumerate(names):
        image[:, i * size[1] // 3 : (i + 1) * size[1] // 3] = SHADES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def tree(folder):
    """{path: bytes} of everything in it."""
    folder = Path(folder)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(folder):
    """Rows of the manifest of all shards, by URI."""
    parts = sorted((Path(folder) / "manifest").glob("part-*.jsonl"))
    found = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    return {row["uri"]: row for row in found}


class FaultyFileSystem(MemoryFileSystem):
    """In memory; `faults` is how many of the next calls fail as an overloaded object store does."""

    protocol = "faulty"
    faults = 0
    store = {}  # noqa: RUF012  # of the class, as its parent's is
    pseudo_dirs = [""]  # noqa: RUF012

    def _may_fail(self):
        if type(self).faults > 0:
            type(self).faults -= 1
            raise OSError(errno.EIO, "503 Slow Down")

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._may_fail()
        return super().cat_file(path, start, end, **kwargs)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._may_fail()
        return super().pipe_file(path, value, mode, **kwargs)

    def ls(self, path, detail=True, **kwargs):
        self._may_fail()
        return super().ls(path, detail, **kwargs)
