"""Brute force is the truth up to the lattice's error; pydensecrf computes on the same lattice up to rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from training import crf_torch
from weakseg import crf
from weakseg.errors import ConfigError, DataError
from weakseg.recipe import CrfConfig
from weakseg.tolerance import BATCH_ATOL

WSSS_MINI = Path("../shared/data/wsss-mini")
CONFIGS = [
    CrfConfig(),
    CrfConfig(bilateral_sxy=80, bilateral_srgb=13),
    CrfConfig(gaussian_sxy=0.25, bilateral_sxy=6.67, bilateral_srgb=13),
    CrfConfig(bilateral_weight=0),
    CrfConfig(gaussian_weight=0, bilateral_sxy=121, bilateral_weight=4, iterations=3),
]


def smooth(rng: np.random.Generator, n: int, size: tuple[int, int], cell: int) -> np.ndarray:
    """(n, H, W) float32 noise with structure of `cell` pixels."""
    height, width = size
    coarse = rng.normal(size=(n, height // cell + 2, width // cell + 2)).astype(np.float32)
    planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in coarse]
    return np.stack([np.asarray(plane) for plane in planes])


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=0))
    return (e / e.sum(axis=0)).astype(np.float32)


def picture(size: tuple[int, int], n: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Shading, two edges and noise, (H, W, 3) uint8; smooth probabilities that know little of it, (n, H, W)."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(size)
    image = 25 * smooth(rng, 3, size, 16).transpose(1, 2, 0) + [60, 120, 90]
    image[(x - size[1] / 2) ** 2 + (y - size[0] / 2) ** 2 < (min(size) / 3) ** 2] += [120, -40, -30]
    image[x > 0.8 * size[1]] *= 0.5
    image = (image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)
    return image, softmax(2 * smooth(rng, n, size, 12))


def refine(image: np.ndarray, probabilities: np.ndarray, config: CrfConfig) -> np.ndarray:
    """One image through the batched CRF."""
    return crf_torch.refine(torch.from_numpy(image)[None], torch.from_numpy(probabilities)[None], config)[0].numpy()


def softmax_of_unary(probabilities: Tensor) -> Tensor:
    clipped = probabilities.clamp(1e-5, 1)
    return clipped / clipped.sum(dim=-3, keepdim=True)


def batch(size: tuple[int, int], n_images: int) -> tuple[Tensor, Tensor]:
    pictures = [picture(size, seed=seed) for seed in range(n_images)]
    images, probabilities = (torch.from_numpy(np.stack(part)) for part in zip(*pictures, strict=True))
    return images, probabilities


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "config",
    [
        CrfConfig(iterations=1),  # ten of these kernels push pixels that are undecided to either side
        CrfConfig(bilateral_sxy=12, bilateral_srgb=13, bilateral_weight=4),
        CrfConfig(bilateral_weight=0),
    ],
)
def test_it_is_near_brute_force(seed: int, config: CrfConfig) -> None:
    image, probabilities = picture((28, 32), seed=seed)
    exact = crf.refine(image, probabilities, replace(config, backend="brute_force"))
    fast = refine(image, probabilities, config)
    assert np.abs(exact - fast).mean() < 1.2e-2
    assert (exact.argmax(axis=0) == fast.argmax(axis=0)).mean() > 0.98


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 300), (37, 61), (64, 48)])
@pytest.mark.parametrize("config", CONFIGS)
def test_it_is_the_lattice_of_numba(size: tuple[int, int], config: CrfConfig) -> None:
    image, probabilities = picture(size)
    np.testing.assert_allclose(
        refine(image, probabilities, config), crf.refine(image, probabilities, config), atol=2e-5
    )


@settings(max_examples=20, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 2**16),
    sxy=st.integers(1, 90),
    srgb=st.integers(2, 40),
)
def test_it_is_the_lattice_of_numba_on_noise(size: tuple[int, int], seed: int, sxy: int, srgb: int) -> None:
    """Whole widths put many features on the very face of a simplex: both must round them to the same side."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    probabilities = rng.random((3, *size), dtype=np.float32)
    config = CrfConfig(bilateral_sxy=sxy, bilateral_srgb=srgb, iterations=3)
    np.testing.assert_allclose(
        refine(image, probabilities, config), crf.refine(image, probabilities, config), atol=2e-4
    )


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 300), (37, 61), (64, 48)])
@pytest.mark.parametrize("config", CONFIGS)
def test_it_is_pydensecrf(size: tuple[int, int], config: CrfConfig) -> None:
    pytest.importorskip("pydensecrf")
    image, probabilities = picture(size)
    expected = crf.refine(image, probabilities, replace(config, backend="pydensecrf"))
    np.testing.assert_allclose(refine(image, probabilities, config), expected, atol=1e-4)


@pytest.mark.skipif(not WSSS_MINI.is_dir(), reason="needs ../shared/data/wsss-mini")
@pytest.mark.parametrize(("sample_id", "config"), [("2007_000063", CONFIGS[0]), ("2007_000332", CONFIGS[1])])
def test_it_is_pydensecrf_on_photographs(sample_id: str, config: CrfConfig) -> None:
    pytest.importorskip("pydensecrf")
    image = np.array(Image.open(WSSS_MINI / f"JPEGImages/{sample_id}.jpg").convert("RGB"))
    probabilities = softmax(2 * smooth(np.random.default_rng(0), 3, image.shape[:2], 32))
    expected = crf.refine(image, probabilities, replace(config, backend="pydensecrf"))
    got = refine(image, probabilities, config)
    assert np.abs(got - expected).mean() < 1e-5
    assert (got.argmax(axis=0) == expected.argmax(axis=0)).mean() > 0.9999


def test_a_batch_is_its_images() -> None:
    images, probabilities = batch((24, 40), n_images=3)
    together = crf_torch.refine(images, probabilities, CrfConfig())
    alone = torch.cat([crf_torch.refine(images[i : i + 1], probabilities[i : i + 1], CrfConfig()) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=BATCH_ATOL, rtol=0)


def test_equal_images_do_not_mix() -> None:
    images, probabilities = batch((16, 20), n_images=2)
    images[1] = images[0]
    together = crf_torch.refine(images, probabilities, CrfConfig())
    alone = crf_torch.refine(images[:1], probabilities[:1], CrfConfig())
    torch.testing.assert_close(together[:1], alone, atol=BATCH_ATOL, rtol=0)


@pytest.mark.parametrize("reference_px", [None, 60])
def test_padding_takes_no_part(reference_px: int | None) -> None:
    config = CrfConfig(reference_px=reference_px)
    images, probabilities = batch((32, 40), n_images=3)
    sizes = [(32, 30), (20, 40), (9, 7)]
    mask = torch.zeros(images.shape[:3], dtype=torch.bool)
    for i, (height, width) in enumerate(sizes):
        mask[i, :height, :width] = True
    padded = crf_torch.refine(images, probabilities, config, mask)
    for i, (height, width) in enumerate(sizes):
        image, p = images[i, :height, :width], probabilities[i, :, :height, :width]
        alone = crf_torch.refine(image[None], p[None], config)[0]
        torch.testing.assert_close(padded[i, :, :height, :width], alone, atol=BATCH_ATOL, rtol=0)
    expected = softmax_of_unary(probabilities)
    hidden = ~mask[:, None].expand_as(padded)
    torch.testing.assert_close(padded[hidden], expected[hidden], atol=1e-6, rtol=0)


def test_widths_scale_with_the_image() -> None:
    image, probabilities = picture((20, 30))
    config = CrfConfig(reference_px=60)
    np.testing.assert_array_equal(
        refine(image, probabilities, config), refine(image, probabilities, crf.scaled(config, 20, 30))
    )


def test_sets_are_separate_calls() -> None:
    images, probabilities = batch((24, 28), n_images=2)
    sets = torch.stack([probabilities, probabilities.flip(1) ** 2, probabilities / 2], dim=1)  # (B, S, K, H, W)
    together = crf_torch.refine(images, sets, CrfConfig())
    assert together.shape == sets.shape
    for i in range(3):
        alone = crf_torch.refine(images, sets[:, i], CrfConfig())
        torch.testing.assert_close(together[:, i], alone, atol=BATCH_ATOL, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_marginals_sum_to_one(dtype: torch.dtype) -> None:
    images, probabilities = batch((17, 23), n_images=2)
    before = images.clone(), probabilities.clone()
    out = crf_torch.refine(images, probabilities.to(dtype), CrfConfig())
    assert out.dtype == torch.float32 and out.is_contiguous()
    torch.testing.assert_close(out.sum(dim=1), torch.ones(2, 17, 23))
    torch.testing.assert_close((images, probabilities), before, atol=0, rtol=0)


@pytest.mark.parametrize("config", [CrfConfig(gaussian_weight=0, bilateral_weight=0), CrfConfig(iterations=0)])
def test_without_kernels_it_is_the_softmax_of_the_unary(config: CrfConfig) -> None:
    images, probabilities = batch((8, 9), n_images=2)
    probabilities = probabilities * 3  # above 1 is clipped
    got = crf_torch.refine(images, probabilities, config)
    torch.testing.assert_close(got, softmax_of_unary(probabilities), atol=1e-6, rtol=0)


def test_a_constant_image_gives_no_edges() -> None:
    """Everything a bilateral kernel sees is the place, so wide kernels of both kinds make one label of two halves."""
    image = np.full((12, 16, 3), 200, np.uint8)
    probabilities = np.full((2, 12, 16), 0.45, np.float32)
    probabilities[0, :, :9] = probabilities[1, :, 9:] = 0.55
    out = refine(image, probabilities, CrfConfig(gaussian_sxy=50))
    assert (out.argmax(axis=0) == 0).all()


def test_one_label_is_certain() -> None:
    images, probabilities = batch((6, 7), n_images=2)
    assert (crf_torch.refine(images, probabilities[:, :1], CrfConfig()) == 1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_cuda_is_the_cpu(config: CrfConfig) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images, probabilities = batch((96, 128), n_images=3)
    mask = torch.ones(images.shape[:3], dtype=torch.bool)
    mask[1, 80:], mask[2, :, 99:] = False, False
    expected = crf_torch.refine(images, probabilities, config, mask)
    got = crf_torch.refine(images.cuda(), probabilities.cuda(), config, mask.cuda())
    assert got.is_cuda
    difference = (got.cpu() - expected).abs()
    assert difference.mean() < 1e-5 and (got.cpu().argmax(1) == expected.argmax(1)).float().mean() > 0.999


def bad(**changes: Tensor) -> dict[str, Tensor]:
    images, probabilities = batch((4, 5), n_images=2)
    return {"images": images, "probabilities": probabilities} | changes


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (bad(images=torch.zeros(2, 4, 5, 3)), "images must be (B, H, W, 3) uint8"),
        (bad(images=torch.zeros(2, 3, 4, 5, dtype=torch.uint8)), "images must be (B, H, W, 3) uint8"),
        (bad(images=torch.zeros(2, 4, 0, 3, dtype=torch.uint8)), "images must be (B, H, W, 3) uint8"),
        (bad(probabilities=torch.ones(2, 3, 5, 4)), "probabilities must be (2, K, 4, 5)"),
        (bad(probabilities=torch.ones(1, 3, 4, 5)), "probabilities must be (2, K, 4, 5)"),
        (bad(probabilities=torch.ones(2, 0, 4, 5)), "probabilities must be (2, K, 4, 5)"),
        (bad(probabilities=torch.ones(2, 4, 5)), "probabilities must be (2, K, 4, 5)"),
        (bad(probabilities=torch.full((2, 3, 4, 5), torch.nan)), "finite and >= 0"),
        (bad(probabilities=torch.full((2, 3, 4, 5), torch.inf)), "finite and >= 0"),
        (bad(probabilities=torch.full((2, 3, 4, 5), -1e-3)), "finite and >= 0"),
        (bad(probabilities=torch.ones(2, 3, 4, 5, device="meta")), "on one device, got cpu, meta"),
        (bad(mask=torch.ones(2, 4, 5)), "mask must be (2, 4, 5) bool"),
        (bad(mask=torch.ones(2, 5, 4, dtype=torch.bool)), "mask must be (2, 4, 5) bool"),
        (bad(mask=torch.tensor([True, False])[:, None, None].expand(2, 4, 5)), "every image needs a real pixel"),
    ],
)
def test_bad_tensors_are_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(DataError) as raised:
        crf_torch.refine(**tensors, config=CrfConfig())
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "config",
    [
        CrfConfig(gaussian_sxy=0),
        CrfConfig(bilateral_srgb=-1),
        CrfConfig(bilateral_weight=-1),
        CrfConfig(iterations=-1),
        CrfConfig(reference_px=0),
    ],
)
def test_impossible_configs_are_refused(config: CrfConfig) -> None:
    with pytest.raises(ConfigError):
        crf_torch.refine(**bad(), config=config)


@pytest.mark.parametrize(
    "config",
    [
        CrfConfig(bilateral_sxy=0.01, bilateral_srgb=0.01),  # too many keys
        CrfConfig(bilateral_srgb=1e-4),  # too far for float32
        CrfConfig(gaussian_sxy=1e-40),  # infinite
    ],
)
def test_widths_that_no_lattice_holds_are_refused(config: CrfConfig) -> None:
    with pytest.raises(DataError, match="larger widths"):
        crf_torch.refine(**bad(), config=config)
