"""Label Studio's run lengths. Its own decoder and encoder: test_label_studio_slow.py."""

import contextlib
import tracemalloc

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from tests.weakseg.masks.label_maps import SEEDS, random_map
from weakseg.errors import DataError
from weakseg.masks.label_studio_rle import mask_from_rle, rle_from_mask

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40))


def packed(n_values, *tokens, sizes=(3, 4, 8, 16), value_bits=8):
    """Tokens are (repeated?, which size, the values), written bit by bit."""
    bits = f"{n_values:032b}{value_bits - 1:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    for repeated, which, values in tokens:
        bits += f"{repeated:b}{which:02b}{len(values) - 1:0{sizes[which]}b}"
        bits += "".join(f"{value:08b}" for value in (values[:1] if repeated else values))
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


@given(masks)
def test_there_and_back(mask):
    before = mask.copy()
    np.testing.assert_array_equal(mask_from_rle(rle_from_mask(mask), *mask.shape), mask)
    np.testing.assert_array_equal(mask, before)


def test_500_masks():
    for seed in SEEDS:
        mask = random_map(seed, 4) > 1
        np.testing.assert_array_equal(mask_from_rle(rle_from_mask(mask), *mask.shape), mask)


def test_by_hand():
    assert rle_from_mask(np.ones((1, 1), bool)) == packed(4, (1, 0, [255] * 4))
    mask = np.array([[1, 0, 0], [0, 0, 1]], bool)
    assert rle_from_mask(mask) == packed(24, (1, 0, [255] * 4), (1, 1, [0] * 16), (1, 0, [255] * 4))


@pytest.mark.parametrize(("n", "which"), [(2, 0), (3, 1), (4, 1), (5, 2), (64, 2), (65, 3), (16384, 3)])
def test_runs_take_the_smallest_size_that_holds_them(n, which):
    assert rle_from_mask(np.ones((1, n), bool)) == packed(4 * n, (1, which, [255] * 4 * n))


def test_runs_that_are_longer_than_a_length_can_say():
    rle = rle_from_mask(np.zeros((1, 16384 * 2 + 1), bool))
    assert rle == packed(131076, (1, 3, [0] * 65536), (1, 3, [0] * 65536), (1, 0, [0] * 4))
    mask = np.zeros((400, 300), bool)
    mask[100:350] = True
    np.testing.assert_array_equal(mask_from_rle(rle_from_mask(mask), 400, 300), mask)


def test_soft_edges_as_label_studio_writes_them():
    """Pixels (0, 0, 0, 0) x 3, (10, 20, 30, 40), (64, 64, 64, 64), (1, 2, 3, 200), (255, 255, 255, 255) x 9, written by
    @thi.ng/rle-pack 3.2.12, `encode(Uint8Array.from(values), 60)`."""
    rle = [0, 0, 0, 60, 57, 27, 253, 176, 0, 194, 133, 7, 138, 35, 64, 12, 4, 8, 15, 35, 17, 255, 128]
    expected = [[False] * 5 + [True] * 10]
    np.testing.assert_array_equal(mask_from_rle(rle, 1, 15), expected)


@given(masks, st.data())
def test_any_mixture_of_tokens_means_the_same(mask, data):
    """Runs in any parts and of any sizes, listed or repeated."""
    sizes = data.draw(st.tuples(*[st.integers(1, 16)] * 4))
    values, tokens = np.repeat(mask.reshape(-1) * 255, 4).tolist(), []
    while values:
        which, repeated = data.draw(st.integers(0, 3)), data.draw(st.booleans())
        n = 1
        while n < min(len(values), 2 ** sizes[which]) and (not repeated or values[n] == values[0]):
            n += 1
        tokens.append((repeated, which, values[:n]))
        values = values[n:]
    np.testing.assert_array_equal(mask_from_rle(packed(4 * mask.size, *tokens, sizes=sizes), *mask.shape), mask)


@given(masks, st.lists(st.integers(0, 255), max_size=20))
def test_what_comes_after_the_last_pixel_does_not_count(mask, more):
    np.testing.assert_array_equal(mask_from_rle(rle_from_mask(mask) + more, *mask.shape), mask)


@given(masks)
def test_every_byte_counts(mask):
    rle = rle_from_mask(mask)
    for n in range(len(rle)):
        with pytest.raises(DataError, match="cut off"):
            mask_from_rle(rle[:n], *mask.shape)


RLE = rle_from_mask(np.eye(3, dtype=bool))


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ([], "cut off"),
        (packed(36), "cut off"),
        (packed(36, (0, 3, [1] * 36))[:20], "cut off"),
        ([*RLE[:3], RLE[3] + 4, *RLE[4:]], "expected run lengths of 3 x 3 pixels in four channels of 8 bits, got 40"),
        ([255] * 4 + RLE[4:], "expected run lengths of 3 x 3 pixels .* got 4294967295 values"),
        (packed(36, (1, 3, [0] * 36), value_bits=4), "36 values of 4 bits"),
        ([300, *RLE], "run lengths as bytes"),
        ([-1, *RLE], "run lengths as bytes"),
        ([0.5, *RLE], "run lengths as bytes"),
        ([[0], *RLE], "run lengths as bytes"),
        ("text", "run lengths as bytes, got: str"),
        (10**10, "run lengths as bytes, got: int"),
        (None, "run lengths as bytes"),
    ],
)
def test_damaged_run_lengths(rle, message):
    with pytest.raises(DataError, match=message):
        mask_from_rle(rle, 3, 3)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tail):
    head = bytes(packed(36))[:6]
    with contextlib.suppress(DataError):
        assert mask_from_rle(head + tail, 3, 3).shape == (3, 3)


def test_a_header_that_promises_gigabytes_costs_nothing():
    rle = packed(4 * 30_000**2, (1, 3, [255] * 65536))
    tracemalloc.start()
    try:
        for size in ((3, 3), (30_000, 30_000)):
            with pytest.raises(DataError):
                mask_from_rle(rle, *size)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_the_mask():
    rle = rle_from_mask(np.ones((4000, 4000), bool))
    tracemalloc.start()
    try:
        assert mask_from_rle(rle, 4000, 4000).all()
        assert tracemalloc.get_traced_memory()[1] < 2 * 4000**2
    finally:
        tracemalloc.stop()
