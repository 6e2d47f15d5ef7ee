"""Label maps in Parquet: there and back, always the same bytes, and what other readers see."""

import io

import numpy as np
import pytest

from weakseg.classes import ClassTable
from weakseg.errors import DataError
from weakseg.masks import parquet
from weakseg.masks.coco_rle import mask_from_rle
from weakseg.masks.labelled import LabelledImage
from weakseg.masks.parquet import read_parquet, write_parquet

pyarrow_parquet = pytest.importorskip("pyarrow.parquet")
CLASSES = ClassTable(("cat", "dog", "sheep"))


def images(n, seed=0, n_classes=3, dtype=np.uint8):
    rng = np.random.default_rng(seed)
    ignore = np.iinfo(dtype).max
    for i in range(n):
        height, width = rng.integers(1, 40, size=2)
        values = np.array([0, *range(1, n_classes + 1), ignore], dtype)
        yield LabelledImage(f"sub/{i:05d}.jpg", values[rng.integers(0, len(values), (height, width))])


def written(some, classes=CLASSES):
    file = io.BytesIO()
    write_parquet(file, some, classes)
    return file.getvalue()


def test_there_and_back(monkeypatch):
    monkeypatch.setattr(parquet, "GROUP_ROWS", 16)
    data = written(images(500))
    back = list(read_parquet(io.BytesIO(data)))
    for one, other in zip(images(500), back, strict=True):
        assert one.name == other.name and one.labels.dtype == other.labels.dtype
        np.testing.assert_array_equal(one.labels, other.labels)
    assert pyarrow_parquet.ParquetFile(io.BytesIO(data)).num_row_groups == 32


def test_many_classes():
    classes = ClassTable(tuple(f"c{i}" for i in range(300)))
    data = written(images(5, n_classes=300, dtype=np.uint16), classes)
    for one, other in zip(images(5, n_classes=300, dtype=np.uint16), read_parquet(io.BytesIO(data)), strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)


def test_the_same_images_give_the_same_bytes():
    assert written(images(50)) == written(images(50)) != written(images(50, seed=1))


def test_what_other_readers_see():
    labels = np.array([[0, 1, 1], [3, 255, 0]], np.uint8)
    (row,) = pyarrow_parquet.read_table(io.BytesIO(written([LabelledImage("a.jpg", labels)]))).to_pylist()
    assert (row["image"], row["height"], row["width"], row["classes"]) == ("a.jpg", 2, 3, ["cat", "sheep"])
    assert [one["value"] for one in row["rles"]] == [1, 3, 255]
    for one in row["rles"]:
        np.testing.assert_array_equal(mask_from_rle(one["counts"], 2, 3), labels == one["value"])


def test_nothing_and_what_is_no_table():
    assert list(read_parquet(io.BytesIO(written([])))) == []
    with pytest.raises(DataError, match="expected a Parquet file of masks as weakseg writes it"):
        list(read_parquet(io.BytesIO(b"no table")))
    import pyarrow

    other = io.BytesIO()
    pyarrow_parquet.write_table(pyarrow.table({"x": [1]}), other)
    with pytest.raises(DataError, match="expected a Parquet file of masks"):
        list(read_parquet(other))
