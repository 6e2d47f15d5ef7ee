"""Label maps in Parquet: there and back, always the same bytes, and what other readers see."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given

from tests.weakseg.masks.label_maps import CLASSES, MANY, assert_same, random_images, small_maps, wide_maps
from weakseg.classes import ClassTable
from weakseg.errors import DataError, UnknownClassError
from weakseg.masks import parquet
from weakseg.masks.coco_rle import mask_from_rle
from weakseg.masks.labelled import LabelledImage
from weakseg.masks.parquet import read_parquet, write_parquet

pyarrow = pytest.importorskip("pyarrow")
pyarrow_parquet = pytest.importorskip("pyarrow.parquet")


def written(some, classes=CLASSES):
    file = io.BytesIO()
    write_parquet(file, some, classes)
    return file.getvalue()


def read(data):
    return list(read_parquet(io.BytesIO(data)))


# There and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [CLASSES, MANY], ids=["uint8", "uint16"])
def test_500_maps_come_back(classes, monkeypatch):
    monkeypatch.setattr(parquet, "GROUP_ROWS", 64)
    images = list(random_images(classes))
    data = written(iter(images), classes)
    for image, again in zip(images, read(data), strict=True):
        assert_same(again, image, ignore=True)
        assert again.confidence == image.confidence
    assert pyarrow_parquet.ParquetFile(io.BytesIO(data)).num_row_groups == 8


@given(small_maps)
def test_a_map_comes_back(labels):
    before, image = labels.copy(), LabelledImage("a/b.png", labels, {1: 0.1, 2: 0.0})
    (again,) = read(written([image]))
    np.testing.assert_array_equal(labels, before)
    assert_same(again, image, ignore=True)
    assert again.confidence == {value: one for value, one in image.confidence.items() if (labels == value).any()}


@given(wide_maps)
def test_a_map_of_16_bits_comes_back(labels):
    image = LabelledImage("s3://bucket/ü.png", labels)
    assert_same(read(written([image], MANY))[0], image, ignore=True)


# The file -------------------------------------------------------------------------------------------------------------


def test_the_same_images_give_the_same_bytes():
    images = list(random_images())
    assert written(images) == written(iter(images)) != written(images[::-1])


def test_what_other_readers_see():
    labels = np.array([[0, 1, 1], [4, 255, 0]], np.uint8)
    table = pyarrow_parquet.read_table(io.BytesIO(written([LabelledImage("a.jpg", labels, {4: 0.25})])))
    (row,) = table.to_pylist()
    assert (row["image"], row["height"], row["width"]) == ("a.jpg", 2, 3)
    assert (row["classes"], row["confidence"]) == (["cat", "Füße"], [None, 0.25])
    assert [one["value"] for one in row["rles"]] == [1, 4, 255]
    for one in row["rles"]:
        np.testing.assert_array_equal(mask_from_rle(one["counts"], 2, 3), labels == one["value"])
    assert json.loads(table.schema.metadata[b"weakseg.classes"]) == list(CLASSES.names)


def test_a_group_of_rows_is_in_memory_at_a_time(monkeypatch):
    monkeypatch.setattr(parquet, "GROUP_BYTES", 5000)
    rng = np.random.default_rng(0)
    taken, sizes = [], []

    def images():
        for i in range(20):
            taken.append(i)
            yield LabelledImage(f"{i}.jpg", rng.integers(0, 3, (60, 60), dtype=np.uint8))

    class File(io.BytesIO):
        def write(self, data):
            sizes.append(len(taken))
            return super().write(data)

    file = File()
    write_parquet(file, images(), CLASSES)
    assert set(range(5)) & set(sizes) and file.tell() > 40_000, "written as the images come"
    n_groups = pyarrow_parquet.ParquetFile(io.BytesIO(file.getvalue())).num_row_groups
    assert 5 <= n_groups <= 20


def test_values_that_cannot_be():
    with pytest.raises(UnknownClassError, match="up to 4.*got 7"):
        written([LabelledImage("a", np.array([[0, 7]], np.uint8))])


# Damaged files --------------------------------------------------------------------------------------------------------


def test_nothing_and_what_is_no_table():
    assert read(written([])) == []
    for data in (b"", b"no table", written([])[:-9]):
        with pytest.raises(DataError, match="expected a Parquet file of masks as weakseg writes it"):
            read(data)


def table_of(**columns):
    """A file as ours but for some columns."""
    one = ClassTable(("cat",))
    ours = pyarrow_parquet.read_table(io.BytesIO(written([LabelledImage("a", np.ones((1, 1), np.uint8))], one)))
    for name, array in columns.items():
        at = ours.schema.get_field_index(name)
        ours = ours.remove_column(at)
        if array is not None:
            ours = ours.add_column(at, pyarrow.field(name, array.type, nullable=False), array)
    file = io.BytesIO()
    pyarrow_parquet.write_table(ours, file)
    return file.getvalue()


def huge_png():
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_files_of_others_are_refused():
    assert read(table_of())[0].labels.tolist() == [[1]]
    for columns, message in (
        ({"mask": None}, "Parquet file of masks"),
        ({"image": pyarrow.array([b"a"])}, "got other image"),
        ({"mask": pyarrow.array([b"no png"])}, "first PNG chunk"),
        ({"mask": pyarrow.array([huge_png()])}, "got 60000x60000"),
        ({"confidence": pyarrow.array([[0.5, 0.5]], pyarrow.list_(pyarrow.float64()))}, "each of 1 classes, got 2"),
    ):
        with pytest.raises(DataError, match=message):
            read(table_of(**columns))
