"""Label maps as rows of a Parquet file, for tables of millions that pandas, DuckDB, Spark or Ray Data read.

    image       string          name of the image file
    height      int32
    width       int32
    mask        binary          PNG, pixel = mask value, IGNORE included (weakseg.masks.png)
    classes     list<string>    names of the classes in it, by mask value
    confidence  list<double>    of each of these, null where it is not known
    rles        list<struct<value: int32, counts: binary>>   COCO's compressed run lengths of each, and of IGNORE

The file's metadata names all classes. The same images give the same bytes wherever zlib, zstd and pyarrow are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import BACKGROUND, ClassTable, ignore_value
from weakseg.errors import DataError
from weakseg.image import MAX_PIXELS, check_pixels
from weakseg.image_header import parse_header
from weakseg.masks.coco_rle import rles_from_labels
from weakseg.masks.labelled import LabelledImage
from weakseg.masks.png import labels_from_png, png_from_labels
from weakseg.masks.shapes import labels_shown

CLASSES = b"weakseg.classes"  # key of the metadata, a JSON list
# What is in memory at a time: a group of rows, whichever is full first.
GROUP_ROWS = 1000
GROUP_BYTES = 2**25
READ_ROWS = 16
VERSION = "2.6"  # of the format; the writer's default moves with its releases


def write_parquet(file: IO[bytes], images: Iterable[LabelledImage], classes: ClassTable) -> None:
    """A row for each image, in their order; a group of rows is in memory at a time, of label maps one.

    Raises:
        UnknownClassError: a mask value outside the table.
    """
    import pyarrow
    from pyarrow import parquet

    schema = _schema(classes)
    # Masks and names do not repeat, so that a dictionary of them would be written for nothing.
    options = {"compression": "zstd", "version": VERSION, "use_dictionary": ["classes.list.element"]}
    with parquet.ParquetWriter(file, schema, **options) as writer:
        for group in _groups(_row(image, classes) for image in images):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))


def read_parquet(file: IO[bytes] | str) -> Iterator[LabelledImage]:
    """The images of a file of `write_parquet`, one at a time.

    Raises:
        DataError: not Parquet, without these columns, or a mask that is damaged or has more than MAX_PIXELS pixels.
    """
    import pyarrow
    from pyarrow import parquet

    columns = ["image", "mask", "confidence"]
    try:
        table = parquet.ParquetFile(file)
        found, expected = table.schema_arrow, _schema(ClassTable(("any",)))
        if wrong := [name for name in columns if found.field(name) != expected.field(name)]:
            raise DataError(f"expected a Parquet file of masks as weakseg writes it, got other {', '.join(wrong)}")
        for batch in table.iter_batches(batch_size=READ_ROWS, columns=columns):
            for row in batch.to_pylist():
                yield _image(row["image"], row["mask"], row["confidence"])
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise DataError(f"expected a Parquet file of masks as weakseg writes it, got: {error}") from error


def _schema(classes: ClassTable) -> Any:
    import pyarrow

    rle = pyarrow.struct([("value", pyarrow.int32()), ("counts", pyarrow.binary())])
    columns = {
        "image": pyarrow.string(),
        "height": pyarrow.int32(),
        "width": pyarrow.int32(),
        "mask": pyarrow.binary(),
        "classes": pyarrow.list_(pyarrow.string()),
        "confidence": pyarrow.list_(pyarrow.float64()),
        "rles": pyarrow.list_(rle),
    }
    fields = [pyarrow.field(name, kind, nullable=False) for name, kind in columns.items()]
    return pyarrow.schema(fields, metadata={CLASSES: json.dumps(list(classes.names)).encode()})


def _row(image: LabelledImage, classes: ClassTable) -> dict[str, Any]:
    labels = image.labels
    shown = _present(labels_shown(labels, classes))
    return {
        "image": image.name,
        "height": labels.shape[0],
        "width": labels.shape[1],
        "mask": png_from_labels(labels),
        "classes": [classes.names[value - 1] for value in shown],
        "confidence": [image.confidence.get(value) for value in shown],
        "rles": [{"value": value, "counts": counts} for value, counts in rles_from_labels(labels).items()],
    }


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    n_bytes = 0
    for row in rows:
        group.append(row)
        n_bytes += len(row["mask"]) + sum(len(rle["counts"]) for rle in row["rles"])
        if len(group) >= GROUP_ROWS or n_bytes >= GROUP_BYTES:
            yield group
            group, n_bytes = [], 0
    if group:
        yield group


def _image(name: str, mask: bytes, confidence: list[float | None]) -> LabelledImage:
    check_pixels(parse_header(mask, "PNG"), MAX_PIXELS)
    labels = labels_from_png(mask)
    shown = _present(labels)
    if len(confidence) != len(shown):
        raise DataError(
            f"{name}: expected a confidence or null for each of {len(shown)} classes, got {len(confidence)}"
        )
    known = {value: one for value, one in zip(shown, confidence, strict=True) if one is not None}
    return LabelledImage(name, labels, known)


def _present(labels: NDArray[Any]) -> list[int]:
    """Mask values of the classes in a label map, in order."""
    return [value for value in np.unique(labels).tolist() if value not in (BACKGROUND, ignore_value(labels))]
