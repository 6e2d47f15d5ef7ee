import sys
from dataclasses import replace

import numpy as np
import pytest

from weakseg import crf
from weakseg.errors import ConfigError, DataError, WeaksegError
from weakseg.recipe import CrfConfig

BACKENDS = ["pydensecrf", "brute_force"]


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=0))
    return e / e.sum(axis=0)


def scene(size: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A disc on a ground, with noise, and probabilities that know half of it."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((size, size)) - size / 2
    disc = x**2 + y**2 < (size / 3) ** 2
    image = np.where(disc[..., None], [200, 80, 60], [60, 120, 90]) + rng.normal(0, 8, (size, size, 3))
    probabilities = rng.random((n, size, size)) * 0.3 + 0.1
    probabilities[1] += 0.5 * (disc & (x < 2))
    probabilities[0] += 0.3 * ~disc
    return image.clip(0, 255).astype(np.uint8), probabilities.astype(np.float32)


def slow(image: np.ndarray, probabilities: np.ndarray, config: CrfConfig) -> np.ndarray:
    """The update equations with loops over pixel pairs."""
    n, height, width = probabilities.shape
    places = [(y, x) for y in range(height) for x in range(width)]

    def normalised(kernel: np.ndarray) -> np.ndarray:
        norm = 1 / np.sqrt(kernel.sum(axis=1))
        return kernel * norm[:, None] * norm[None, :]

    gaussian, bilateral = np.empty((2, len(places), len(places)))
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            space = (y - v) ** 2 + (x - u) ** 2
            colour = ((image[y, x].astype(float) - image[v, u]) ** 2).sum()
            gaussian[i, j] = np.exp(-space / (2 * config.gaussian_sxy**2))
            bilateral[i, j] = np.exp(-space / (2 * config.bilateral_sxy**2) - colour / (2 * config.bilateral_srgb**2))
    gaussian, bilateral = normalised(gaussian), normalised(bilateral)
    score = np.log(np.clip(probabilities, 1e-5, 1)).reshape(n, -1)
    q = softmax(score)
    for _ in range(config.iterations):
        message = config.gaussian_weight * gaussian @ q.T + config.bilateral_weight * bilateral @ q.T
        q = softmax(score + message.T)
    return q.reshape(probabilities.shape)


def test_brute_force_is_the_equations() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    probabilities = rng.random((3, 4, 5))
    config = CrfConfig(iterations=3, bilateral_sxy=3, bilateral_srgb=60)
    expected = slow(image, probabilities, config)
    np.testing.assert_allclose(crf.refine(image, probabilities, config, "brute_force"), expected, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("config", [CrfConfig(), CrfConfig(bilateral_sxy=12, bilateral_srgb=13, bilateral_weight=4)])
def test_pydensecrf_is_near_brute_force(seed: int, config: CrfConfig) -> None:
    image, probabilities = scene(24, 3, seed)
    exact = crf.refine(image, probabilities, config, "brute_force")
    fast = crf.refine(image, probabilities, config)
    assert np.abs(exact - fast).mean() < 2e-2
    assert (exact.argmax(axis=0) == fast.argmax(axis=0)).mean() > 0.97


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_follows_the_edges_of_the_image(backend: str) -> None:
    image, probabilities = scene(24, 2, 0)
    labels = crf.refine(image, probabilities, CrfConfig(bilateral_srgb=13), backend).argmax(axis=0)
    disc = image[..., 0] > 130
    assert (labels == disc).mean() > 0.95 > (probabilities.argmax(axis=0) == disc).mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_weights_it_is_the_softmax_of_the_unary(backend: str) -> None:
    image, probabilities = scene(8, 3, 0)
    config = CrfConfig(gaussian_weight=0, bilateral_weight=0)
    expected = softmax(np.log(np.clip(probabilities, 1e-5, 1)))
    np.testing.assert_allclose(crf.refine(image, probabilities, config, backend), expected, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_iterations_it_is_the_softmax_of_the_unary(backend: str) -> None:
    image, probabilities = scene(8, 3, 0)
    expected = softmax(np.log(np.clip(probabilities, 1e-5, 1)))
    np.testing.assert_allclose(crf.refine(image, probabilities, CrfConfig(iterations=0), backend), expected, atol=1e-5)


def test_on_a_constant_image_the_bilateral_kernel_is_a_gaussian() -> None:
    image, probabilities = np.full((8, 8, 3), 90, dtype=np.uint8), scene(8, 3, 0)[1]
    bilateral = CrfConfig(gaussian_weight=0, bilateral_sxy=3, bilateral_weight=4)
    gaussian = CrfConfig(gaussian_weight=4, gaussian_sxy=3, bilateral_weight=0)
    np.testing.assert_allclose(
        crf.refine(image, probabilities, bilateral, "brute_force"),
        crf.refine(image, probabilities, gaussian, "brute_force"),
        atol=1e-6,
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_thin_images_give_probabilities(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    out = crf.refine(image, rng.random((3, *size)), CrfConfig(iterations=2))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out.sum(axis=0), np.ones(size), atol=1e-4)


def test_inputs_may_be_views_and_are_left_alone() -> None:
    image, probabilities = scene(12, 2, 0)
    turned, turned_p = image[:, ::-1], probabilities[:, :, ::-1]
    before = image.copy(), probabilities.copy()
    np.testing.assert_array_equal(
        crf.refine(turned, turned_p, CrfConfig()),
        crf.refine(turned.copy(), turned_p.copy(), CrfConfig()),
    )
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(probabilities, before[1])


def test_one_label_is_certain() -> None:
    image, probabilities = scene(8, 2, 0)
    assert (crf.refine(image, probabilities[:1], CrfConfig()) == 1).all()


def test_widths_scale_with_the_image() -> None:
    config = CrfConfig(gaussian_sxy=3, bilateral_sxy=50, bilateral_srgb=5, reference_px=500)
    assert crf.scaled(config, 250, 100) == replace(config, gaussian_sxy=1.5, bilateral_sxy=25, reference_px=None)
    image, probabilities = scene(16, 2, 0)
    np.testing.assert_array_equal(
        crf.refine(image, probabilities, replace(config, reference_px=32)),
        crf.refine(image, probabilities, replace(config, gaussian_sxy=1.5, bilateral_sxy=25, reference_px=None)),
    )


@pytest.mark.parametrize(
    ("image_shape", "probabilities", "match"),
    [
        ((4, 4, 3), np.full((2, 4, 4), np.nan), "finite"),
        ((4, 4, 3), np.full((2, 4, 4), -0.1), "finite and >= 0"),
        ((4, 4, 3), np.ones((2, 4, 5)), r"\(K, 4, 4\)"),
        ((4, 4, 3), np.ones((0, 4, 4)), "K >= 1"),
        ((4, 4), np.ones((2, 4, 4)), r"\(H, W, 3\) uint8"),
        ((4, 0, 3), np.ones((2, 4, 0)), r"\(H, W, 3\) uint8"),
    ],
)
def test_unusable_arrays_are_refused(image_shape: tuple[int, ...], probabilities: np.ndarray, match: str) -> None:
    with pytest.raises(DataError, match=match):
        crf.refine(np.zeros(image_shape, dtype=np.uint8), probabilities, CrfConfig())


@pytest.mark.parametrize(
    "config",
    [CrfConfig(bilateral_sxy=0), CrfConfig(gaussian_weight=-1), CrfConfig(iterations=-1), CrfConfig(reference_px=0)],
)
def test_impossible_configs_are_refused(config: CrfConfig) -> None:
    image, probabilities = scene(4, 2, 0)
    with pytest.raises(ConfigError):
        crf.refine(image, probabilities, config)


def test_an_unknown_backend_names_the_known_ones() -> None:
    image, probabilities = scene(4, 2, 0)
    with pytest.raises(ConfigError, match="pydensecrf, brute_force"):
        crf.refine(image, probabilities, CrfConfig(), "gpu")


def test_a_missing_backend_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    image, probabilities = scene(4, 2, 0)
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(WeaksegError, match=r"pip install 'weakseg\[crf\]'"):
        crf.refine(image, probabilities, CrfConfig())


def test_brute_force_refuses_large_images() -> None:
    with pytest.raises(DataError, match="at most 1024 pixels"):
        crf.refine(np.zeros((33, 32, 3), dtype=np.uint8), np.ones((2, 33, 32)), CrfConfig(), "brute_force")
