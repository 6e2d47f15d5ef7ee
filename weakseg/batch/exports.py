"""The finished masks of a shard in the formats of other tools. Made of the masks and rows alone, so that a format can
be asked for later without computing a mask again; rewritten whole whenever a row has changed.

    png           masks/*.png, always there: palette PNG, pixel = class id; classes.txt names 1, 2, ...
    coco          coco/instances-<shard>.json, run lengths; coco-polygons: polygons where a class has no hole
    yolo          yolo/labels/*.txt and yolo/dataset.yaml
    label-studio  label_studio/tasks-<shard>.json with brush predictions, config.xml for the project
    cvat          cvat/annotations-<shard>.xml, "CVAT for images 1.1"
    labelme       labelme/*.json
    parquet       parquet/masks-<shard>.parquet
    fiftyone      fiftyone.json: the class of every pixel value
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from weakseg.batch.journal import Journal
from weakseg.batch.manifest import FOLDER, Row
from weakseg.batch.store import Store
from weakseg.classes import ClassTable
from weakseg.errors import DataError
from weakseg.masks.labelled import LabelledImage
from weakseg.masks.png import labels_from_png

Format = Literal["png", "coco", "coco-polygons", "yolo", "label-studio", "cvat", "labelme", "parquet", "fiftyone"]


@dataclass(frozen=True)
class Finished:
    """The finished images of a shard: iterated as often as a format likes, one mask in memory at a time."""

    store: Store
    journal: Journal
    classes: ClassTable
    palette: NDArray[np.uint8]  # of the masks, see Result.palette
    model: str
    shard: str  # its name in files
    threads: int = 2

    def __iter__(self) -> Iterator[LabelledImage]:
        return (labelled for _, labelled in self.with_rows())

    def with_rows(self, rows: Iterable[Row] | None = None) -> Iterator[tuple[Row, LabelledImage]]:
        """Images that succeeded, in the order of their URIs or of `rows`; the next ones are read meanwhile."""
        ok = (row for row in (self.journal.rows() if rows is None else rows) if row["status"] == "ok")
        with ThreadPoolExecutor(self.threads) as pool:
            ahead: deque[tuple[Row, Future[LabelledImage]]] = deque()
            for row in islice(ok, 4 * self.threads):
                ahead.append((row, pool.submit(self._labelled, row)))
            while ahead:
                row, reading = ahead.popleft()
                for following in islice(ok, 1):
                    ahead.append((following, pool.submit(self._labelled, following)))
                yield row, reading.result()

    def _labelled(self, row: Row) -> LabelledImage:
        path = row["outputs"]["mask"]["path"]
        data = self.store.read(path)
        if data is None:
            raise DataError(
                f"{self.store.url}/{path}: the manifest names this mask, it is gone: --force does all again"
            )
        confidence = {one["value"]: one["confidence"] for one in row["classes"] if one["confidence"] is not None}
        return LabelledImage(row["uri"], labels_from_png(data), confidence)


Export: TypeAlias = Callable[[Finished], None]


def write_exports(finished: Finished, exports: Iterable[tuple[str, str, Export]]) -> list[str]:
    """Write each that was not made of just the same, and note it; returns the names of what was written.

    Args:
        exports: (name, what it is made of: a hash of the shard's part of the manifest and settings, what writes it).
    """
    note = f"{FOLDER}/exports-{finished.shard}.json"
    made: dict[str, str] = json.loads(finished.store.read(note) or b"{}")
    written = []
    for name, made_of, write in exports:
        if made.get(name) != made_of:
            write(finished)
            made[name] = made_of
            finished.store.write(note, (json.dumps(made, indent=2, sort_keys=True) + "\n").encode())
            written.append(name)
    return written


def _png(finished: Finished) -> None:
    finished.store.write("classes.txt", "".join(f"{name}\n" for name in finished.classes.names).encode())


def _coco(finished: Finished, kind: Literal["rle", "polygon"], folder: str) -> None:
    from weakseg.masks.coco import instances_json

    _stream(
        finished, f"{folder}/instances-{finished.shard}.json", instances_json(finished, finished.classes, kind=kind)
    )


def _yolo(finished: Finished) -> None:
    from weakseg.masks.yolo import dataset_yaml, txt_from_labels

    for row, image in finished.with_rows():
        finished.store.write(f"yolo/labels/{row['key']}.txt", txt_from_labels(image.labels, finished.classes).encode())
    finished.store.write("yolo/dataset.yaml", dataset_yaml(finished.classes).encode())


def _label_studio(finished: Finished) -> None:
    from weakseg.masks.label_studio import label_config, tasks_json

    chunks = tasks_json(finished, finished.classes, model_version=finished.model)
    _stream(finished, f"label_studio/tasks-{finished.shard}.json", chunks)
    finished.store.write("label_studio/config.xml", label_config(finished.classes, "brush").encode())


def _cvat(finished: Finished) -> None:
    from weakseg.masks.cvat import annotations_xml

    _stream(finished, f"cvat/annotations-{finished.shard}.xml", annotations_xml(finished, finished.classes))


def _labelme(finished: Finished) -> None:
    from weakseg.masks.labelme import json_from_labels

    for row, image in finished.with_rows():
        finished.store.write(f"labelme/{row['key']}.json", json_from_labels(image, finished.classes))


def _parquet(finished: Finished) -> None:
    from weakseg.masks.parquet import write_parquet

    with finished.store.writing(f"parquet/masks-{finished.shard}.parquet") as file:
        write_parquet(file, finished, finished.classes)


def _fiftyone(finished: Finished) -> None:
    from weakseg.masks.fiftyone import mask_targets

    finished.store.write(
        "fiftyone.json", (json.dumps(mask_targets(finished.classes, finished.palette), indent=2) + "\n").encode()
    )


def _stream(finished: Finished, path: str, chunks: Iterable[bytes]) -> None:
    with finished.store.writing(path) as file:
        for chunk in chunks:
            file.write(chunk)


EXPORTS: Mapping[Format, Export] = {
    "png": _png,
    "coco": lambda finished: _coco(finished, "rle", "coco"),
    "coco-polygons": lambda finished: _coco(finished, "polygon", "coco-polygons"),
    "yolo": _yolo,
    "label-studio": _label_studio,
    "cvat": _cvat,
    "labelme": _labelme,
    "parquet": _parquet,
    "fiftyone": _fiftyone,
}
