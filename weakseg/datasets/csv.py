"""A CSV file with a header line: `image,tags`, optionally `id` and `split`.

    image     path of the image, relative to the CSV file
    tags      class names with `;` between them; empty = only background
    id        default: the image path without its suffix
    split     rows of other splits are skipped; without this column every row is in every split

Class names are those of a classes.txt beside the CSV file, else the sorted union of all tags of all splits.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path, PurePosixPath

from weakseg.datasets.common import Complain, class_table, read_class_list, read_text, stop, tag_indices, unique
from weakseg.datasets.sample import Dataset, Sample
from weakseg.errors import DatasetError
from weakseg.recipe import DataConfig

COLUMNS = ("image", "tags", "id", "split")


def load(config: DataConfig, split: str, complain: Complain = stop) -> Dataset:
    """The rows of one split, in the order of the file."""
    path = Path(config.root)
    rows = _rows(path, complain)
    classes = class_table(_class_names(path, [row for _, row in rows]), path)
    samples = []
    for where, row in rows:
        if row.get("split", split) != split:
            continue
        image = path.parent / row["image"]
        tags = tag_indices(_names(row), classes, where, complain)
        if image.is_file():
            samples.append((where, Sample(row.get("id") or _id_from_path(row["image"]), image, tags)))
        else:
            complain(where, f"expected the image {image}, got no such file")
    return Dataset(classes, unique(samples, complain), split, path.parent)


def _rows(path: Path, complain: Complain) -> list[tuple[str, dict[str, str]]]:
    """("file:line", {column: stripped value}) of every row that names an image."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        if not {"image", "tags"} <= set(columns) or not set(columns) <= set(COLUMNS):
            got = ",".join(columns) or "an empty file"
            raise DatasetError(f"{path}:1: expected the columns image,tags and optionally id,split, got {got}")
        rows = []
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                complain(where, f"expected {len(columns)} values, got another number: quote values that hold a comma")
            elif not row["image"].strip():
                complain(where, "expected an image path, got an empty one")
            else:
                rows.append((where, {name: value.strip() for name, value in row.items()}))
    except csv.Error as error:
        raise DatasetError(f"{path}:{reader.line_num}: expected CSV, got: {error}") from error
    return rows


def _names(row: dict[str, str]) -> list[str]:
    return [name.strip() for name in row["tags"].split(";") if name.strip()]


def _class_names(path: Path, rows: list[dict[str, str]]) -> tuple[str, ...]:
    listed = path.parent / "classes.txt"
    if listed.is_file():
        return read_class_list(listed)
    return tuple(sorted({name for row in rows for name in _names(row)}))


def _id_from_path(image: str) -> str:
    """`photos/a.jpg` -> `photos/a`; `..` and the root of a path outside the folder are left out."""
    path = PurePosixPath(image.replace("\\", "/"))
    return "/".join(part for part in path.with_suffix("").parts if part not in ("/", ".."))
