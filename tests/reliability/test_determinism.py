"""R15: what comes of an image depends neither on its batch, nor on threads, nor on how it was sent."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import weakseg
from weakseg.client import AsyncClient, Client
from weakseg.tolerance import BATCH_ATOL

N = 4
OPTIONS = {"outputs": ("segmentation", "pseudo_mask", "cam"), "refine": "crf", "heatmap_encoding": "f32"}


@pytest.fixture(scope="module")
def images():
    """N images of one size that differ in every pixel."""
    return list(np.random.default_rng(7).integers(0, 256, (N, 40, 56, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def expected(model, images):
    """Each alone, without a server, on one thread."""
    options = {name: value for name, value in OPTIONS.items() if name != "heatmap_encoding"}
    return [model.segment(image, **options) for image in images]


def from_threads(target, images):
    with Client(target) as client, ThreadPoolExecutor(N) as pool:
        return list(pool.map(lambda image: client.segment(image, **OPTIONS), images))


def from_stream(target, images):
    with Client(target) as client:
        return list(client.segment_many(images, **OPTIONS))


def without_order(target, images):
    with Client(target) as client:
        return [result for _, result in sorted(client.segment_unordered(images, **OPTIONS), key=lambda pair: pair[0])]


def from_tasks(target, images):
    async def ask():
        async with AsyncClient(target) as client:
            return await asyncio.gather(*(client.segment(image, **OPTIONS) for image in images))

    return asyncio.run(ask())


def from_async_stream(target, images):
    async def ask():
        async with AsyncClient(target) as client:
            return [result async for result in client.segment_many(images, **OPTIONS)]

    return asyncio.run(ask())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("max_batch", [1, N])
def test_r15_masks_are_identical_and_heatmaps_within_1e5(serving, images, expected, threads, max_batch):
    """A batch starts when it is full: nothing else ends the wait in this test."""
    running = serving(
        load=lambda path: weakseg.load(path, threads=threads), threads=threads, max_batch=max_batch, max_delay_ms=60_000
    )
    ways = (from_threads, from_stream, without_order, from_tasks, from_async_stream)
    for way in ways:
        results = way(running.target, images)
        assert len(results) == N
        for result, alone in zip(results, expected, strict=True):
            np.testing.assert_array_equal(result.segmentation, alone.segmentation)
            np.testing.assert_array_equal(result.pseudo_mask, alone.pseudo_mask)
            assert result.heatmaps.keys() == alone.heatmaps.keys() and result.present == alone.present
            for name, heatmap in alone.heatmaps.items():
                np.testing.assert_allclose(result.heatmaps[name], heatmap, rtol=0, atol=BATCH_ATOL)
    labels = {"model": "toy", "version": "1"}
    n_images, n_executions = (running.sample(f"weakseg_{n}_total", **labels) for n in ("images", "executions"))
    assert n_images == 2 * N * len(ways) and n_executions == n_images / max_batch
