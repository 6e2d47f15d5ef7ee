import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weakseg.cam import labels_from_cam, threshold_from_alpha
from weakseg.classes import BACKGROUND, IGNORE, IGNORE_U16
from weakseg.errors import ConfigError, DataError
from weakseg.pseudo_mask import Walk, band_around, pseudo_mask, refined_labels
from weakseg.recipe import CrfConfig, PseudoLabelConfig, WalkConfig

NO_CRF = PseudoLabelConfig(crf=None, band=0.5)
IDLE_CRF = CrfConfig(gaussian_weight=0, bilateral_weight=0)


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, dtype=np.uint8)


@pytest.mark.parametrize("crf", [None, IDLE_CRF])
def test_scores_within_the_band_are_ignored(crf: CrfConfig | None) -> None:
    cam01 = np.array([[[0.1, 0.3, 0.59, 0.61, 0.9]], [[0.0, 0.0, 0.0, 0.0, 0.95]]], dtype=np.float32)
    made = pseudo_mask(grey(1, 5), cam01, np.array([2, 0]), 3, 0.4, PseudoLabelConfig(crf=crf, band=0.5))
    assert made.labels.tolist() == [[BACKGROUND, IGNORE, IGNORE, 3, 1]]
    assert made.band == pytest.approx((0.2, 0.6))


def test_the_two_alphas_of_a_paper_are_a_band() -> None:
    """SEAM: alpha 24 is background for sure, alpha 4 object for sure, 6 between them for the walk."""
    t = threshold_from_alpha(6)
    below, above = (threshold_from_alpha(alpha) / t - 1 for alpha in (24, 4))
    assert band_around(t, -below, above) == pytest.approx((threshold_from_alpha(24), threshold_from_alpha(4)))


def test_without_a_band_nothing_is_ignored() -> None:
    cam01 = np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 3, 4)
    config = PseudoLabelConfig(crf=CrfConfig(), band=0)
    made = pseudo_mask(grey(3, 4), cam01, np.array([0]), 1, 0.3, config)
    np.testing.assert_array_equal(
        made.labels, refined_labels(grey(3, 4), cam01, np.array([0]), 1, [0.3], config.crf)[0]
    )


@given(st.floats(0.02, 0.9), st.floats(0, 0.9), st.integers(0, 99))
def test_an_idle_crf_is_the_constant_threshold(t: float, band: float, seed: int) -> None:
    cam01 = np.random.default_rng(seed).random((2, 5, 5), dtype=np.float32)
    classes = np.array([1, 3])
    idle = pseudo_mask(grey(5, 5), cam01, classes, 4, t, PseudoLabelConfig(crf=IDLE_CRF, band=band))
    plain = pseudo_mask(grey(5, 5), cam01, classes, 4, t, PseudoLabelConfig(crf=None, band=band))
    # Not decided alike only where rounding puts a score on the other side of its own threshold.
    near = np.min([np.abs(cam01.max(axis=0) - edge) for edge in plain.band], axis=0) < 1e-4
    assert ((idle.labels == plain.labels) | near).all()


@given(st.floats(0.02, 0.9), st.floats(0, 0.9), st.integers(0, 99))
def test_what_is_decided_is_what_the_threshold_says(t: float, band: float, seed: int) -> None:
    cam01 = np.random.default_rng(seed).random((2, 5, 5), dtype=np.float32)
    labels = pseudo_mask(grey(5, 5), cam01, np.array([1, 3]), 4, t, PseudoLabelConfig(crf=None, band=band)).labels
    decided = labels != IGNORE
    np.testing.assert_array_equal(labels[decided], labels_from_cam(cam01, np.array([1, 3]), t, 4)[decided])


@pytest.mark.parametrize("crf", [None, CrfConfig()])
def test_an_image_without_tags_is_all_background(crf: CrfConfig | None) -> None:
    config = PseudoLabelConfig(crf=crf)
    made = pseudo_mask(grey(3, 4), np.zeros((0, 3, 4), dtype=np.float32), np.array([], dtype=int), 5, 0.3, config)
    assert made.labels.shape == (3, 4)
    assert (made.labels == BACKGROUND).all()


def test_the_mask_grows_to_the_object() -> None:
    image = grey(24, 24)
    image[6:18, 4:20] = (220, 60, 40)
    cam01 = np.zeros((1, 24, 24), dtype=np.float32)
    cam01[0, 6:18, 4:20] = 0.25
    cam01[0, 8:16, 4:12] = 0.9  # the map knows only the head
    raw = labels_from_cam(cam01, np.array([0]), 0.3, 1)
    (refined,) = refined_labels(image, cam01, np.array([0]), 1, [0.3], CrfConfig())
    truth = image[..., 0] == 220
    assert (raw != truth).sum() > 100
    assert (refined != truth).sum() < 10


def test_many_classes_have_their_own_ignore() -> None:
    cam01 = np.full((1, 2, 2), 0.3, dtype=np.float32)
    labels = pseudo_mask(grey(2, 2), cam01, np.array([299]), 300, 0.3, NO_CRF).labels
    assert labels.dtype == np.uint16
    assert (labels == IGNORE_U16).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 5000)])
def test_thin_images(size: tuple[int, int]) -> None:
    cam01 = np.full((1, *size), 0.9, dtype=np.float32)
    assert (pseudo_mask(grey(*size), cam01, np.array([0]), 1, 0.3, PseudoLabelConfig()).labels == 1).all()


def test_bad_input_is_refused() -> None:
    cam01 = np.zeros((1, 2, 2), dtype=np.float32)
    with pytest.raises(DataError, match=r"\(K, 3, 2\)"):
        pseudo_mask(grey(3, 2), cam01, np.array([0]), 1, 0.3, NO_CRF)
    with pytest.raises(ConfigError, match="band"):
        pseudo_mask(grey(2, 2), cam01, np.array([0]), 1, 0.3, PseudoLabelConfig(band=1.0))


def standing(size: tuple[int, int], share: np.ndarray | None = None, **settings: object) -> Walk:
    """A walk of one cell a pixel in which nothing moves; share: of each cell's scores that sets out."""
    affinities = np.zeros((34, *size), dtype=np.float32)
    if share is not None:
        affinities = np.concatenate([affinities, share[None].astype(np.float32)])
    return Walk(affinities, 1, WalkConfig(**({"steps": 2, "background": 0.25, "band": 0.2} | settings)))  # type: ignore[arg-type]


def test_classes_that_walked_alone_meet_a_constant() -> None:
    """The largest value of the image becomes 1, of whichever class it is; 0.25 (1 +- 0.2) is the band."""
    cam01 = np.array([[[0.8, 0.15, 0.17, 0.2, 0.25]], [[0.0, 0.3, 0.0, 0.1, 0.0]]], dtype=np.float32)
    made = pseudo_mask(grey(1, 5), cam01, np.array([2, 0]), 3, 0.25, PseudoLabelConfig(), standing((1, 5)))
    assert made.labels.tolist() == [[3, 1, IGNORE, IGNORE, 3]]
    assert made.band == pytest.approx((0.2, 0.3))


def test_what_does_not_set_out_is_background() -> None:
    cam01 = np.array([[[0.5, 0.5, 0.4, 0.1]]], dtype=np.float32)
    walk = standing((1, 4), np.array([[1.0, 0.0, 0.5, 1.0]]), band=0.0)
    made = pseudo_mask(grey(1, 4), cam01, np.array([0]), 1, 0.25, PseudoLabelConfig(), walk)
    assert made.labels.tolist() == [[1, BACKGROUND, 1, BACKGROUND]]


def test_constants_share_a_walk() -> None:
    cam01 = np.random.default_rng(0).random((2, 6, 7), dtype=np.float32)
    maps = refined_labels(grey(6, 7), cam01, np.array([0, 1]), 2, [0.2, 0.4, 0.6], None, standing((6, 7)))
    scores = cam01 / cam01.max()
    for labels, t in zip(maps, (0.2, 0.4, 0.6), strict=True):
        np.testing.assert_array_equal(labels, np.where(scores.max(axis=0) > t, scores.argmax(axis=0) + 1, BACKGROUND))


def test_a_crf_after_a_walk_against_a_constant() -> None:
    cam01 = np.random.default_rng(0).random((2, 6, 7), dtype=np.float32)
    given = (grey(6, 7), cam01, np.array([0, 1]), 2, [0.4], None)
    np.testing.assert_array_equal(
        refined_labels(*given, standing((6, 7), crf=IDLE_CRF)), refined_labels(*given, standing((6, 7)))
    )


@pytest.mark.parametrize("tags", [0, 1])
def test_no_score_after_a_walk_is_background(tags: int) -> None:
    cam01 = np.zeros((tags, 3, 4), dtype=np.float32)
    made = pseudo_mask(grey(3, 4), cam01, np.arange(tags), 5, 0.25, PseudoLabelConfig(), standing((3, 4)))
    assert (made.labels == BACKGROUND).all()


@pytest.mark.parametrize("background", [0.0, 1.0, -0.1, float("nan")])
def test_a_background_of_a_walk_is_a_share(background: float) -> None:
    with pytest.raises(ConfigError, match=r"background of a walk must lie in \(0, 1\), got .*: IRN has 0.25"):
        WalkConfig(background=background)


@pytest.mark.parametrize("crf", [None, IDLE_CRF])
def test_shares_are_the_scores_over_their_sum(crf: CrfConfig | None) -> None:
    """At alpha = 1, t = 0.5, the background is 1 - max: 0.75 + 0.25 + 0.25."""
    cam01 = np.array([[[0.25, 1.0]], [[0.25, 0.0]]], dtype=np.float32)
    config = PseudoLabelConfig(crf=crf, band=0.0)
    made = pseudo_mask(grey(1, 2), cam01, np.array([2, 0]), 3, 0.5, config, with_shares=True)
    assert made.shares is not None
    np.testing.assert_allclose(made.shares[:, 0], [[0.6, 0], [0.2, 1], [0.2, 0]], atol=2e-5)


def test_shares_of_the_two_thresholds_are_averaged() -> None:
    """A background of 0.2 and one of 0.6 beside a class of 0.6."""
    cam01 = np.array([[[0.6, 1.0]]], dtype=np.float32)
    walk = standing((1, 2), background=0.4, band=0.5)
    made = pseudo_mask(grey(1, 2), cam01, np.array([0]), 1, 0.4, PseudoLabelConfig(), walk, with_shares=True)
    assert made.shares is not None
    np.testing.assert_allclose(made.shares[1, 0], [(0.75 + 0.5) / 2, (1 / 1.2 + 1 / 1.6) / 2], atol=1e-5)


def test_where_nothing_scores_all_shares_are_alike() -> None:
    walk = standing((1, 2), np.array([[0.0, 1.0]]), background=None)
    cam01 = np.array([[[0.5, 1.0]]], dtype=np.float32)
    made = pseudo_mask(grey(1, 2), cam01, np.array([0]), 1, 0.4, PseudoLabelConfig(), walk, with_shares=True)
    assert made.shares is not None
    np.testing.assert_allclose(made.shares[:, 0], [[0.5, 0], [0.5, 1]], atol=1e-5)


@pytest.mark.parametrize("refiner", ["none", "crf", "walk", "walk and crf"])
@given(seed=st.integers(0, 99), tags=st.integers(0, 3))
def test_shares_change_no_label_and_the_label_has_the_largest(refiner: str, seed: int, tags: int) -> None:
    cam01 = np.random.default_rng(seed).random((tags, 5, 6), dtype=np.float32)
    config = PseudoLabelConfig(crf=IDLE_CRF if refiner == "crf" else None)
    walk = standing((5, 6), crf=IDLE_CRF if "crf" in refiner else None) if "walk" in refiner else None
    given_ = (grey(5, 6), cam01, np.arange(tags), 3, 0.3, config, walk)
    made = pseudo_mask(*given_, with_shares=True)
    np.testing.assert_array_equal(made.labels, pseudo_mask(*given_).labels)
    assert (made.shares is None) == (tags == 0)
    if made.shares is not None:
        np.testing.assert_allclose(made.shares.sum(axis=0), 1, atol=1e-5)
        decided = made.labels != IGNORE
        np.testing.assert_array_equal(made.labels[decided], made.shares.argmax(axis=0)[decided])
