import hashlib
import json
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weakseg.classes import BACKGROUND
from weakseg.datasets import read
from weakseg.datasets.synthetic import CLASS_NAMES, make_synthetic, synthetic_scene
from weakseg.datasets.synthetic.noise import fractal_noise
from weakseg.datasets.synthetic.solids import Cone, Light, Material, draw, placed
from weakseg.datasets.truth import open_truth, trusted
from weakseg.errors import ConfigError, DatasetError
from weakseg.image import read_image
from weakseg.recipe import DataConfig

SIZE = 48  # small pictures, quick tests


def digests(root: Path) -> dict[str, str]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic") / "set"
    assert make_synthetic(root, 24, 6, n_tune=4, size_px=SIZE, seed=3)
    return root


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 2)):
        make_synthetic(tmp_path / name, 2, 1, size_px=SIZE, seed=3, workers=workers)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") != {}


def test_an_image_does_not_depend_on_the_others(root: Path, tmp_path: Path) -> None:
    make_synthetic(tmp_path / "set", 2, 1, size_px=SIZE, seed=3)
    smaller, bigger = digests(tmp_path / "set" / "JPEGImages"), digests(root / "JPEGImages")
    assert smaller.items() <= bigger.items()


def test_another_seed_gives_other_pictures() -> None:
    a, b = (synthetic_scene(seed, "train_00000", SIZE) for seed in (0, 1))
    assert a.image.shape != b.image.shape or not np.array_equal(a.image, b.image)


def test_layout_reads_as_voc(root: Path) -> None:
    config = DataConfig(root=str(root), tune="tune")
    train, val, tune = (read(config, split) for split in ("train", "val", "tune"))
    assert (len(train), len(val), len(tune)) == (24, 6, 4)
    assert train.classes.names == CLASS_NAMES == tuple((root / "classes.txt").read_text().split())
    assert {sample.id for sample in tune} <= {sample.id for sample in train}


def test_masks_fit_images_and_show_exactly_the_tags(root: Path) -> None:
    config = DataConfig(root=str(root))
    train = read(config, "train")
    with trusted("scorer", __name__):
        truth = open_truth(config, "train", opener="scorer")
    for sample in train:
        labels = truth.mask(sample.id, size=read_image(sample.image).shape[:2])
        assert set(np.unique(labels)) - {BACKGROUND} == {c + 1 for c in sample.tags}


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_scene_has_what_its_names_say(seed: int) -> None:
    scene = synthetic_scene(seed, "x", SIZE)
    assert scene.image.dtype == np.uint8 and scene.image.shape == (*scene.labels.shape, 3)
    assert SIZE <= max(scene.labels.shape) <= round(1.2 * SIZE)
    assert 1 <= len(scene.names) <= 3 and list(scene.names) == sorted(scene.names)
    assert {CLASS_NAMES[v - 1] for v in np.unique(scene.labels) if v} == set(scene.names)
    assert scene.image.std() > 5


def test_nothing_is_done_twice(root: Path) -> None:
    before = (root / "labels.json").stat().st_mtime_ns
    assert not make_synthetic(root, 24, 6, n_tune=4, size_px=SIZE, seed=3)
    assert (root / "labels.json").stat().st_mtime_ns == before


def test_another_set_or_other_files_are_not_overwritten(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"got a synthetic set made with .*: remove it or choose another"):
        make_synthetic(root, 25, 6, size_px=SIZE)
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(DatasetError, match="got other files"):
        make_synthetic(tmp_path, 1, 1, size_px=SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("numbers", [{"n_train": 0}, {"n_val": 0}, {"n_tune": 3}, {"size_px": 8}, {"seed": -1}])
def test_impossible_numbers(tmp_path: Path, numbers: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected n_train"):
        make_synthetic(tmp_path / "set", **{"n_train": 2, "n_val": 1, **numbers})
    assert not (tmp_path / "set").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """No file may grow beyond 100 bytes: what a full disk does to the first picture."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(DatasetError, match="expected to write a dataset, got: File too large"):
            make_synthetic(tmp_path / "set", 1, 1, size_px=SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_tags_are_those_of_the_generator(root: Path) -> None:
    labels = json.loads((root / "labels.json").read_text())
    for sample_id in ("train_00005", "val_00002"):
        assert tuple(labels["images"][sample_id]["labels"]) == synthetic_scene(3, sample_id, SIZE).names


@given(seed=st.integers(0, 99), height=st.integers(1, 40), width=st.integers(1, 40), cell=st.floats(0.5, 60))
@settings(max_examples=30, deadline=None)
def test_noise_has_the_shape_and_range_asked_for(seed: int, height: int, width: int, cell: float) -> None:
    noise = fractal_noise(np.random.default_rng(seed), (height, width), (cell, 2 * cell))
    assert noise.shape == (height, width) and noise.dtype == np.float32
    assert np.abs(noise).max() < 4


def test_a_disc_has_the_area_of_a_disc() -> None:
    sprite = draw(np.random.default_rng(0), [Cone(30, 30, 20, 30, 30, 20, "m")], {"m": plain()}, 40.0, light())
    assert sprite.alpha.sum() == pytest.approx(np.pi * 20**2, rel=0.01)


def test_the_nearer_cone_is_seen() -> None:
    red, blue = np.array([1, 0, 0], np.float32), np.array([0, 0, 1], np.float32)
    cones = [Cone(20, 20, 8, 20, 20, 8, "red", z=5), Cone(20, 20, 10, 20, 20, 10, "blue", z=0)]
    for order in (cones, cones[::-1]):
        sprite = draw(np.random.default_rng(0), order, {"red": plain(red), "blue": plain(blue)}, 20.0, light())
        r, g, b = sprite.rgb[20 - sprite.top, 20 - sprite.left]
        assert r > 0.3 > b and g < 0.1


@given(flip=st.booleans(), tilt=st.floats(-1, 1), scale=st.floats(1, 50))
def test_placing_keeps_lengths(flip: bool, tilt: float, scale: float) -> None:
    (cone,) = placed([Cone(1, 2, 0.5, 4, 6, 0.25, "m")], scale, 7, 9, flip, tilt)
    assert np.hypot(cone.x1 - cone.x0, cone.y1 - cone.y0) == pytest.approx(5 * scale)
    assert (cone.r0, cone.r1) == (0.5 * scale, 0.25 * scale)


def plain(base: np.ndarray | None = None) -> Material:
    grey = np.full(3, 0.5, np.float32)
    return Material(grey if base is None else base, grey if base is None else base, bump=0.0, fuzz=0.0)


def light() -> Light:
    return Light(np.array([0, -0.6, 0.8], np.float32), np.full(3, 0.8, np.float32), np.full(3, 0.4, np.float32))
