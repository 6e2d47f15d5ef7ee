import io

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from weakseg.classes import voc_palette
from weakseg.errors import DataError
from weakseg.masks.png import labels_from_png, png_from_labels

label_maps = st.sampled_from([np.uint8, np.uint16]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20))
)


@given(label_maps)
def test_round_trip(labels):
    out = labels_from_png(png_from_labels(labels))
    assert out.dtype == labels.dtype
    np.testing.assert_array_equal(out, labels)


def test_pillow_reads_palette_and_size():
    labels = np.array([[0, 1, 255], [20, 20, 0]], dtype=np.uint8)
    image = Image.open(io.BytesIO(png_from_labels(labels)))
    image.verify()
    image = Image.open(io.BytesIO(png_from_labels(labels)))
    assert (image.mode, image.size) == ("P", (3, 2))
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), voc_palette()[labels])


def test_pillow_reads_16_bit():
    labels = np.array([[0, 300, 65535]], dtype=np.uint16)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png_from_labels(labels)))), labels)


def test_own_palette():
    palette = np.array([[1, 2, 3], [250, 251, 252]], dtype=np.uint8)
    image = Image.open(io.BytesIO(png_from_labels(np.array([[1, 0]], dtype=np.uint8), palette)))
    assert image.convert("RGB").getpixel((0, 0)) == (250, 251, 252)


def test_one_pixel_and_one_row():
    for shape in ((1, 1), (1, 5000), (5000, 1)):
        labels = np.full(shape, 7, dtype=np.uint8)
        np.testing.assert_array_equal(labels_from_png(png_from_labels(labels)), labels)


def test_colour_png_is_refused():
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    with pytest.raises(DataError, match="class ids.*RGB"):
        labels_from_png(buffer.getvalue())


@pytest.mark.parametrize(
    "damage",
    [lambda d: b"", lambda d: d[:40], lambda d: d[:-30], lambda d: b"\xff\xd8" + d],
)
def test_damaged_png_is_refused(damage):
    data = png_from_labels(np.arange(2500, dtype=np.uint16).reshape(50, 50))
    with pytest.raises(DataError, match="whole PNG"):
        labels_from_png(damage(data))


def test_other_arrays_are_refused():
    for bad in (
        np.zeros((2, 2), np.int64),
        np.zeros((0, 2), np.uint8),
        np.zeros((2, 2, 3), np.uint8),
    ):
        with pytest.raises(DataError, match="labels must be"):
            png_from_labels(bad)
