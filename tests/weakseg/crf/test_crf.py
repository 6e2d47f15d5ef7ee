import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weakseg import crf
from weakseg.crf import permutohedral
from weakseg.errors import ConfigError, DataError, WeaksegError
from weakseg.recipe import CrfConfig
from weakseg.stopping import StoppedError

needs_pydensecrf = pytest.mark.skipif(find_spec("pydensecrf") is None, reason="needs the extra `crf`: make oracle")
BACKENDS = ["lattice", pytest.param("pydensecrf", marks=needs_pydensecrf), "brute_force"]


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
    np.testing.assert_allclose(
        crf.refine(image, probabilities, replace(config, backend="brute_force")), expected, atol=1e-6
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("config", [CrfConfig(), CrfConfig(bilateral_sxy=12, bilateral_srgb=13, bilateral_weight=4)])
def test_the_lattice_is_near_brute_force(seed: int, config: CrfConfig) -> None:
    image, probabilities = scene(24, 3, seed)
    exact = crf.refine(image, probabilities, replace(config, backend="brute_force"))
    fast = crf.refine(image, probabilities, config)
    assert np.abs(exact - fast).mean() < 2e-2
    assert (exact.argmax(axis=0) == fast.argmax(axis=0)).mean() > 0.97


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    n=st.integers(2, 12),
    seed=st.integers(0, 2**16),
    sxy=st.floats(1, 90),
    srgb=st.floats(2, 40),
    iterations=st.integers(0, 10),
)
def test_the_lattice_is_that_of_pydensecrf(
    size: tuple[int, int], n: int, seed: int, sxy: float, srgb: float, iterations: int
) -> None:
    pytest.importorskip("pydensecrf")
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    probabilities = rng.random((n, *size), dtype=np.float32)
    config = CrfConfig(bilateral_sxy=sxy, bilateral_srgb=srgb, iterations=iterations)
    ours = crf.refine(image, probabilities, config)
    theirs = crf.refine(image, probabilities, replace(config, backend="pydensecrf"))
    # Of noise, many features lie on the face of a simplex, and the compiler decides to which side they round.
    assert np.abs(ours - theirs).mean() < 5e-3


@pytest.mark.parametrize("n", [2, 3, 5, 9, 21])
def test_sets_are_refined_as_if_alone(n: int) -> None:
    image, probabilities = scene(20, n, 0)
    sets = np.stack([probabilities, probabilities**2, probabilities[::-1]])
    together = crf.refine(image, sets, CrfConfig())
    for one, alone in zip(together, sets, strict=True):
        np.testing.assert_allclose(one, crf.refine(image, alone, CrfConfig()), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sets_in_every_backend(backend: str) -> None:
    image, probabilities = scene(12, 3, 0)
    config = CrfConfig(iterations=2, backend=backend)
    together = crf.refine(image, np.stack([probabilities, probabilities**2]), config)
    assert together.shape == (2, 3, 12, 12)
    np.testing.assert_allclose(together[0], crf.refine(image, probabilities, config), atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 9), seed=st.integers(0, 2**16))
def test_the_order_of_labels_does_not_matter(n: int, seed: int) -> None:
    """The first label is computed in another way than the rest: it must not show."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (9, 14, 3), dtype=np.uint8)
    probabilities, order = rng.random((n, 9, 14)), rng.permutation(n)
    straight = crf.refine(image, probabilities, CrfConfig(iterations=3))
    np.testing.assert_allclose(
        crf.refine(image, probabilities[order], CrfConfig(iterations=3)), straight[order], atol=1e-4
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_follows_the_edges_of_the_image(backend: str) -> None:
    image, probabilities = scene(24, 2, 0)
    labels = crf.refine(image, probabilities, CrfConfig(bilateral_srgb=13, backend=backend)).argmax(axis=0)
    disc = image[..., 0] > 130
    assert (labels == disc).mean() > 0.95 > (probabilities.argmax(axis=0) == disc).mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", [CrfConfig(gaussian_weight=0, bilateral_weight=0), CrfConfig(iterations=0)])
def test_without_messages_it_is_the_softmax_of_the_unary(backend: str, config: CrfConfig) -> None:
    image, probabilities = scene(8, 3, 0)
    expected = softmax(np.log(np.clip(probabilities, 1e-5, 1)))
    np.testing.assert_allclose(crf.refine(image, probabilities, replace(config, backend=backend)), expected, atol=1e-5)


@pytest.mark.parametrize("config", [CrfConfig(gaussian_weight=0), CrfConfig(bilateral_weight=0)])
def test_one_kernel_alone(config: CrfConfig) -> None:
    image, probabilities = scene(24, 2, 0)
    exact = crf.refine(image, probabilities, replace(config, backend="brute_force"))
    assert np.abs(exact - crf.refine(image, probabilities, config)).mean() < 2e-2


def test_on_a_constant_image_the_bilateral_kernel_is_a_gaussian() -> None:
    image, probabilities = np.full((8, 8, 3), 90, dtype=np.uint8), scene(8, 3, 0)[1]
    bilateral = CrfConfig(gaussian_weight=0, bilateral_sxy=3, bilateral_weight=4, backend="brute_force")
    gaussian = CrfConfig(gaussian_weight=4, gaussian_sxy=3, bilateral_weight=0, backend="brute_force")
    np.testing.assert_allclose(
        crf.refine(image, probabilities, bilateral), crf.refine(image, probabilities, gaussian), atol=1e-6
    )


def test_large_weights_do_not_overflow() -> None:
    image, probabilities = scene(16, 4, 0)
    out = crf.refine(image, probabilities, CrfConfig(gaussian_weight=1000, bilateral_weight=1000))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out.sum(axis=0), np.ones((16, 16)), atol=1e-4)


@pytest.mark.parametrize("resolution", ["full", "half"])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("constant", [False, True])
def test_thin_and_constant_images_give_probabilities(size: tuple[int, int], constant: bool, resolution: str) -> None:
    rng = np.random.default_rng(0)
    image = np.full((*size, 3), 7, np.uint8) if constant else rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    out = crf.refine(image, rng.random((3, *size)), CrfConfig(iterations=2, resolution=resolution))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out.sum(axis=0), np.ones(size), atol=1e-4)


def test_inputs_may_be_views_or_constant_and_are_left_alone() -> None:
    image, probabilities = scene(12, 2, 0)
    turned, turned_p = image[:, ::-1], probabilities[:, :, ::-1]
    before = image.copy(), probabilities.copy()
    expected = crf.refine(turned.copy(), turned_p.copy(), CrfConfig())
    np.testing.assert_array_equal(crf.refine(turned, turned_p, CrfConfig()), expected)
    constant = np.frombuffer(turned.tobytes(), dtype=np.uint8).reshape(turned.shape)
    np.testing.assert_array_equal(crf.refine(constant, turned_p, CrfConfig()), expected)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(probabilities, before[1])


def test_threads_agree() -> None:
    scenes = [scene(24, 2 + i % 4, i) for i in range(8)]
    alone = [crf.refine(*one, CrfConfig()) for one in scenes]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: crf.refine(*one, CrfConfig()), scenes))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_can_stop_when_labels_settle() -> None:
    image, probabilities = scene(24, 3, 0)
    many = CrfConfig(iterations=200)
    stopped = crf.refine(image, probabilities, replace(many, early_stop=True))
    assert (stopped.argmax(axis=0) == crf.refine(image, probabilities, many).argmax(axis=0)).mean() > 0.99
    # It did stop: the marginals of few iterations, not those of many.
    few = [crf.refine(image, probabilities, CrfConfig(iterations=i)) for i in range(2, 30)]
    assert any(np.array_equal(stopped, one) for one in few)


@pytest.mark.parametrize("resolution", ["full", "half"])
@pytest.mark.parametrize("backend", ["lattice", "brute_force"])
def test_a_check_is_asked_before_each_iteration_and_may_end_the_work(backend: str, resolution: str) -> None:
    image, probabilities = scene(24, 3, 0)
    config = CrfConfig(iterations=3, backend=backend, resolution=resolution)
    asked = []

    def check() -> None:
        asked.append(len(asked))
        if len(asked) > 3:
            raise StoppedError

    expected = crf.refine(image, probabilities, config)
    np.testing.assert_array_equal(crf.refine(image, probabilities, config, check), expected)
    assert len(asked) == 3
    with pytest.raises(StoppedError):
        crf.refine(image, probabilities, replace(config, iterations=10**12), check)


def test_half_resolution_is_near_full() -> None:
    image, probabilities = scene(64, 3, 0)
    half = crf.refine(image, probabilities, CrfConfig(bilateral_srgb=13, resolution="half"))
    full = crf.refine(image, probabilities, CrfConfig(bilateral_srgb=13))
    assert half.shape == full.shape
    assert half.dtype == np.float32
    assert (half.argmax(axis=0) == full.argmax(axis=0)).mean() > 0.95


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
        ((4, 4, 3), np.full((2, 4, 4), np.inf), "finite"),
        ((4, 4, 3), np.full((2, 4, 4), -0.1), "finite and >= 0"),
        ((4, 4, 3), np.ones((2, 4, 5)), r"\(K, 4, 4\)"),
        ((4, 4, 3), np.ones((0, 4, 4)), "K >= 1"),
        ((4, 4, 3), np.ones((0, 2, 4, 4)), "K >= 1"),
        ((4, 4), np.ones((2, 4, 4)), r"\(H, W, 3\) uint8"),
        ((4, 0, 3), np.ones((2, 4, 0)), r"\(H, W, 3\) uint8"),
    ],
)
def test_unusable_arrays_are_refused(image_shape: tuple[int, ...], probabilities: np.ndarray, match: str) -> None:
    with pytest.raises(DataError, match=match):
        crf.refine(np.zeros(image_shape, dtype=np.uint8), probabilities, CrfConfig())


def test_images_beyond_the_memory_limit_are_refused() -> None:
    image = np.broadcast_to(np.uint8(9), (5000, 6000, 3))
    with pytest.raises(DataError, match=r"30\.0 megapixels would need more than 2048 MiB: use resolution 'half'"):
        crf.refine(image, np.broadcast_to(np.float32(0.5), (2, 5000, 6000)), CrfConfig())


def test_lattices_beyond_the_memory_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise has six vertices a pixel: known only while the lattice is built."""
    image = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    monkeypatch.setattr(permutohedral, "MEMORY_LIMIT", 200 * 200 * 300)
    with pytest.raises(DataError, match="megapixels would need more than"):
        crf.refine(image, np.ones((2, 200, 200)), CrfConfig(bilateral_srgb=0.5))
    crf.refine(image // 128, np.ones((2, 200, 200)), CrfConfig())


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (CrfConfig(bilateral_sxy=0), "must be positive"),
        (CrfConfig(gaussian_weight=-1), "must not be negative"),
        (CrfConfig(iterations=-1), "must not be negative"),
        (CrfConfig(reference_px=0), "must be positive"),
        (CrfConfig(backend="gpu"), "lattice, pydensecrf, brute_force"),
        (CrfConfig(resolution="quarter"), "full or half"),
        (CrfConfig(bilateral_srgb=1e-4), "too small for this image"),
    ],
)
def test_impossible_configs_are_refused(config: CrfConfig, match: str) -> None:
    image, probabilities = scene(4, 2, 0)
    with pytest.raises(ConfigError, match=match):
        crf.refine(image, probabilities, config)


@pytest.mark.parametrize(
    ("backend", "package", "advice"),
    [("lattice", "numba", r"weakseg\[refine\]"), ("pydensecrf", "pydensecrf", r"weakseg\[crf\]")],
)
def test_a_missing_backend_says_how_to_install_it(
    backend: str, package: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, probabilities = scene(4, 2, 0)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(WeaksegError, match=advice):
        crf.refine(image, probabilities, CrfConfig(backend=backend))


def test_warming_up_says_whether_there_is_a_crf(monkeypatch: pytest.MonkeyPatch) -> None:
    assert crf.warm_up()
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not crf.warm_up()


def test_brute_force_refuses_large_images() -> None:
    with pytest.raises(DataError, match="at most 1024 pixels"):
        crf.refine(np.zeros((33, 32, 3), dtype=np.uint8), np.ones((2, 33, 32)), CrfConfig(backend="brute_force"))


def test_it_works_where_nothing_can_be_kept_on_disk(tmp_path: Path) -> None:
    """A container with a read-only file system: kernels are compiled for the process."""
    script = """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []  # no place accepts a cache
import numpy as np
from weakseg import crf
from weakseg.recipe import CrfConfig
from weakseg.stopping import StoppedError
image = np.zeros((4, 5, 3), np.uint8)
print(crf.refine(image, np.ones((2, 4, 5)), CrfConfig(iterations=1)).sum())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert float(done.stdout) == pytest.approx(20)
