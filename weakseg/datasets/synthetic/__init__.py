"""The embedded default dataset: generated photographs of six invented animals, in VOC layout.

It has the difficulties of weak supervision built in: three classes share one body and three another, so only the small
head tells the class (a CAM covers heads, not bodies); two classes are mostly seen in front of one background (a CAM may
light up water or snow); things without a class wear the coat of a body or the colour of a head.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from weakseg.classes import voc_palette
from weakseg.datasets.synthetic.creatures import CLASS_NAMES
from weakseg.datasets.synthetic.scene import Scene, make_scene
from weakseg.errors import ConfigError, DatasetError
from weakseg.files import atomic_folder
from weakseg.parallel import map_processes
from weakseg.progress import Progress

__all__ = ["CLASS_NAMES", "Scene", "make_synthetic", "synthetic_scene"]

VERSION = 2  # raised when the pictures change
DESCRIPTION = "synthetic.json"  # what the set was made with; same content = nothing to do
MIN_SIZE_PX = 32


def make_synthetic(
    root: str | Path,
    n_train: int = 500,
    n_val: int = 150,
    *,
    n_tune: int = 0,
    size_px: int = 160,
    seed: int = 0,
    workers: int = 1,
    progress: Progress | None = None,
) -> bool:
    """Write JPEGImages, SegmentationClass, labels.json, classes.txt and the lists train, val and tune.

    A picture depends on seed, size and its id alone: more images, or other workers, change none of the others. Tags are
    the animals that were put in; they are not read off the mask.

    Args:
        n_tune: the first so many training ids also form the list `tune`.
        size_px: the long side is 1 to 1.2 times this.
    Returns:
        False if `root` already holds exactly this set.
    Raises:
        ConfigError: impossible numbers.
        DatasetError: `root` holds something else, or cannot be written. Nothing half-written stays.
    """
    if min(n_train, n_val) < 1 or not 0 <= n_tune <= n_train or size_px < MIN_SIZE_PX or seed < 0:
        raise ConfigError(
            f"expected n_train, n_val >= 1, 0 <= n_tune <= n_train, size_px >= {MIN_SIZE_PX} and seed >= 0, "
            f"got {n_train}, {n_val}, {n_tune}, {size_px}, {seed}"
        )
    root = Path(root)
    made_with = {
        "version": VERSION,
        "n_train": n_train,
        "n_val": n_val,
        "n_tune": n_tune,
        "size_px": size_px,
        "seed": seed,
    }
    if _is_made(root, made_with):
        return False
    splits = {"train": _ids("train", n_train), "val": _ids("val", n_val), "tune": _ids("train", n_tune)}
    try:
        with atomic_folder(root) as folder:
            _write(folder, splits, size_px, seed, workers, progress or Progress("silent"))
            (folder / DESCRIPTION).write_text(json.dumps(made_with) + "\n")
    except OSError as error:
        raise DatasetError(f"{root}: expected to write a dataset, got: {error.strerror or error}") from error
    return True


def synthetic_scene(seed: int, sample_id: str, size_px: int = 160) -> Scene:
    """The scene of one id."""
    return make_scene(_generator(seed, sample_id), size_px)


def _generator(seed: int, sample_id: str) -> np.random.Generator:
    words = np.frombuffer(hashlib.sha256(sample_id.encode()).digest(), dtype="<u4")
    return np.random.default_rng([seed, *words.tolist()])


def _ids(split: str, count: int) -> list[str]:
    return [f"{split}_{number:05d}" for number in range(count)]


def _is_made(root: Path, made_with: dict[str, int]) -> bool:
    """Whether the folder already holds this set; DatasetError where it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / DESCRIPTION).read_text())
    except (OSError, ValueError):
        found = None
    if found != made_with:
        holds = f"a synthetic set made with {found}" if found else "other files"
        raise DatasetError(f"{root}: expected no such folder or an empty one, got {holds}: remove it or choose another")
    return True


def _write(
    folder: Path, splits: dict[str, list[str]], size_px: int, seed: int, workers: int, progress: Progress
) -> None:
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    ids = [*splits["train"], *splits["val"]]
    write = partial(_write_sample, folder, size_px, seed)
    written = progress.each(map_processes(write, ids, workers), "make-synthetic", len(ids))
    images = {sample_id: {"labels": list(names)} for sample_id, names in zip(ids, written, strict=True)}
    labels = {"classes": list(CLASS_NAMES), "images": images}
    (folder / "labels.json").write_text(json.dumps(labels, indent=1) + "\n")
    (folder / "classes.txt").write_text(_lines(CLASS_NAMES))
    for split, split_ids in splits.items():
        if split_ids:
            (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(_lines(split_ids))


def _write_sample(folder: Path, size_px: int, seed: int, sample_id: str) -> tuple[str, ...]:
    """Image and mask of one id; returns its class names."""
    rng = _generator(seed, sample_id)
    scene = make_scene(rng, size_px)
    options = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(86, 96))]
    _, encoded = cv2.imencode(".jpg", np.ascontiguousarray(scene.image[..., ::-1]), options)
    (folder / "JPEGImages" / f"{sample_id}.jpg").write_bytes(encoded.tobytes())
    mask = Image.fromarray(scene.labels).convert("P")
    mask.putpalette(voc_palette().tobytes())
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    (folder / "SegmentationClass" / f"{sample_id}.png").write_bytes(buffer.getvalue())
    return scene.names


def _lines(names: Sequence[str]) -> str:
    return "".join(f"{name}\n" for name in names)
