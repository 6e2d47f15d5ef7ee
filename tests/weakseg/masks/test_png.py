import io

import cv2
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from weakseg.classes import voc_palette
from weakseg.errors import DataError
from weakseg.masks.png import labels_from_png, png_from_labels, provenance_of, provenance_text, text_of

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


keys = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=79).filter(
    lambda key: key == key.strip()
)
values = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=60)


@given(label_maps, st.dictionaries(keys, values, max_size=3))
def test_text_travels_with_the_labels(labels, text):
    data = png_from_labels(labels, text=text)
    np.testing.assert_array_equal(labels_from_png(data), labels)
    assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED).shape[:2] == labels.shape
    assert text_of(data) == text
    with Image.open(io.BytesIO(data)) as image:
        assert {key: image.info[key] for key in text} == text, "known before the pixels are decoded"
        assert image.text == text


def test_the_same_labels_and_text_give_the_same_bytes():
    labels = np.zeros((3, 4), np.uint8)
    one = png_from_labels(labels, text={"a": "1", "b": "ü"})
    assert one == png_from_labels(labels, text={"b": "ü", "a": "1"})
    assert png_from_labels(labels, text={}) == png_from_labels(labels)
    assert len(one) == len(png_from_labels(labels)) + (12 + 3) + (12 + 6 + 2)


def test_ascii_is_text_and_the_rest_international_text():
    labels = np.zeros((1, 1), np.uint8)
    assert b"tEXtkey\0line 1\nline 2" in png_from_labels(labels, text={"key": "line 1\nline 2"})
    assert b"iTXtkey\0\0\0\0\0\xe2\x89\xa4" in png_from_labels(labels, text={"key": "≤"})


@pytest.mark.parametrize("text", [{"": "x"}, {"k" * 80: "x"}, {" k": "x"}, {"ü": "x"}, {"a\nb": "x"}, {"k": "a\0b"}])
def test_text_that_a_png_cannot_hold(text):
    with pytest.raises(DataError, match="1 to 79 printable"):
        png_from_labels(np.zeros((1, 1), np.uint8), text=text)


def test_text_of_other_files():
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    assert text_of(buffer.getvalue()) == {} == provenance_of(buffer.getvalue())
    with pytest.raises(DataError, match="whole PNG"):
        text_of(b"GIF89a")


def test_provenance_round_trip():
    labels = np.zeros((2, 2), np.uint8)
    fields = {"t": 0.35, "rule": "otsu", "provenance": "größer als alle", "crf": None, "band": [0.1, 0.2]}
    assert provenance_of(png_from_labels(labels, text=provenance_text(fields))) == fields
    for strange in ("[1]", "{", "", "[" * 100_000):
        assert provenance_of(png_from_labels(labels, text={"weakseg": strange})) == {}
