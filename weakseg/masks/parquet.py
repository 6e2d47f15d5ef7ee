"""Label maps as rows of a Parquet file, for tables of millions that pandas, DuckDB, Spark or Ray Data read.

    image       string          name of the image file
    height      int32
    width       int32
    mask        binary          palette PNG, pixel = mask value (weakseg.masks.png)
    classes     list<string>    names of the classes in it, by mask value
    rles        list<struct<value: int32, counts: binary>>   COCO's compressed run lengths of each, IGNORE included

The file's metadata names all classes. The same images give the same bytes wherever zlib, zstd and pyarrow are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import IO, Any

import numpy as np

from weakseg.classes import BACKGROUND, ClassTable, ignore_value
from weakseg.errors import DataError
from weakseg.masks.coco_rle import rles_from_labels
from weakseg.masks.labelled import LabelledImage
from weakseg.masks.png import labels_from_png, png_from_labels

CLASSES = b"weakseg.classes"  # key of the metadata, a JSON list
GROUP_ROWS = 1000  # images that are in memory at a time
VERSION = "2.6"  # of the format; the writer's default moves with its releases


def write_parquet(file: IO[bytes], images: Iterable[LabelledImage], classes: ClassTable) -> None:
    """A row for each image, in their order, GROUP_ROWS in memory at a time."""
    import pyarrow
    from pyarrow import parquet

    schema = _schema(classes)
    with parquet.ParquetWriter(file, schema, compression="zstd", version=VERSION) as writer:
        remaining = iter(images)
        while group := list(islice(remaining, GROUP_ROWS)):
            rows = [_row(image, classes) for image in group]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def read_parquet(file: IO[bytes] | str) -> Iterator[LabelledImage]:
    """The images of a file of `write_parquet`.

    Raises:
        DataError: not Parquet, without these columns, or a damaged mask.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        for batch in table.iter_batches(batch_size=GROUP_ROWS, columns=["image", "mask"]):
            for row in batch.to_pylist():
                yield LabelledImage(row["image"], labels_from_png(row["mask"]))
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise DataError(f"expected a Parquet file of masks as weakseg writes it, got: {error}") from error


def _schema(classes: ClassTable) -> Any:
    import pyarrow

    rle = pyarrow.struct([("value", pyarrow.int32()), ("counts", pyarrow.binary())])
    columns = [
        ("image", pyarrow.string()),
        ("height", pyarrow.int32()),
        ("width", pyarrow.int32()),
        ("mask", pyarrow.binary()),
        ("classes", pyarrow.list_(pyarrow.string())),
        ("rles", pyarrow.list_(rle)),
    ]
    return pyarrow.schema(columns, metadata={CLASSES: json.dumps(list(classes.names)).encode()})


def _row(image: LabelledImage, classes: ClassTable) -> dict[str, Any]:
    labels = image.labels
    shown = [int(v) for v in np.unique(labels) if v not in (BACKGROUND, ignore_value(labels))]
    return {
        "image": image.name,
        "height": labels.shape[0],
        "width": labels.shape[1],
        "mask": png_from_labels(labels),
        "classes": [classes.names[value - 1] for value in shown],
        "rles": [{"value": value, "counts": counts} for value, counts in rles_from_labels(labels).items()],
    }
