"""Starting on COCO: `python -m benchmarks.coco_reader [n_images]`.

A file of the size of instances_train2017.json is made (120,000 images, 850,000 polygons, 450 MB, always the same) and
read for its tags in processes of their own: by ours without a cached index (cold) and with one (warm), by `json.load`,
and by pycocotools' `COCO`. CPU seconds, and the peak above the process with its imports, until every sample is there;
`ready_s` is until the data set is, whose samples are made when they are asked for. Images are empty files.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.line import line
from benchmarks.measure import resident_mib
from weakseg.datasets import Sample, read
from weakseg.recipe import DataConfig

N_IMAGES = 120_000
ANNOTATIONS_AN_IMAGE = 7.1
CATEGORIES = [n for n in range(1, 91) if n % 9]  # 80, with holes
GOAL_WARM = 10  # times faster than json.load


class Measured(NamedTuple):
    ready_s: float
    seconds: float
    mib: float
    n_tags: int


def main() -> None:
    n_images = int(sys.argv[1]) if len(sys.argv) > 1 else N_IMAGES
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root / "set", n_images)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        config = DataConfig(root=str(root / "set"), format="coco", val="train")
        peers = {"json": measured_alone(by_json, config), "pycocotools": measured_alone(by_pycocotools, config)}
        for start in ("cold", "warm"):
            ours = measured_alone(by_weakseg, config)
            for name, peer in peers.items():
                goal = GOAL_WARM if (start, name) == ("warm", "json") else None
                line(f"coco_reader.{start}_s.{name}", ours.seconds, peer.seconds, unit="s", cost=True, goal=goal)
                line(f"coco_reader.{start}_mib.{name}", ours.mib, peer.mib, unit="MiB", cost=True)
            line(f"coco_reader.{start}_ready_s", ours.ready_s, unit="s", cost=True)


def make(root: Path, n_images: int) -> None:
    """COCO's layout with one split, `train`."""
    rng = np.random.default_rng(0)
    n_annotations = int(ANNOTATIONS_AN_IMAGE * n_images)
    ids = rng.permutation(5 * n_images)[:n_images].tolist()
    images = (
        {"license": 1, "file_name": f"{n:012d}.jpg", "height": 480, "width": 640, "id": n, "flickr_url": "x" * 60}
        for n in ids
    )
    of, categories = rng.integers(0, n_images, n_annotations).tolist(), rng.choice(CATEGORIES, n_annotations).tolist()
    annotations = (
        {
            "segmentation": [np.round(640 * rng.random(2 * int(rng.integers(8, 42))), 2).tolist()],
            "area": 1234.5,
            "iscrowd": 0,
            "image_id": ids[image],
            "bbox": [1.5, 2.5, 30.25, 40.75],
            "category_id": category,
            "id": n,
        }
        for n, (image, category) in enumerate(zip(of, categories, strict=True))
    )
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    for n in ids:
        (root / "train" / f"{n:012d}.jpg").touch()
    path = root / "annotations/instances_train.json"
    with path.open("w") as file:
        for head, values in (('{"images": [', images), ('], "annotations": [', annotations)):
            file.write(head)
            _write_all(file, values)
        file.write('], "categories": ')
        json.dump([{"id": n, "name": f"class {n}", "supercategory": "x"} for n in CATEGORIES], file)
        file.write("}")
    os.utime(path, (1, 1))


def _write_all(file: io.TextIOBase, values: Iterable[object]) -> None:
    for n, value in enumerate(values):
        file.write((", " if n else "") + json.dumps(value))


def by_weakseg(config: DataConfig) -> Iterable[Sample]:
    return read(config, "train")


def by_json(config: DataConfig) -> Iterable[Sample]:
    """What one would write first."""
    with Path(config.root, "annotations/instances_train.json").open() as file:
        content = json.load(file)
    categories = sorted(category["id"] for category in content["categories"])
    index = {number: at for at, number in enumerate(categories)}
    tags = defaultdict(set)
    for annotation in content["annotations"]:
        tags[annotation["image_id"]].add(index[annotation["category_id"]])
    return _samples(config, content["images"], lambda image: tags[image["id"]])


def by_pycocotools(config: DataConfig) -> Iterable[Sample]:
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(Path(config.root, "annotations/instances_train.json")))
    index = {number: at for at, number in enumerate(sorted(coco.cats))}
    return _samples(
        config,
        coco.dataset["images"],
        lambda image: {index[annotation["category_id"]] for annotation in coco.imgToAnns[image["id"]]},
    )


def _samples(
    config: DataConfig, images: list[dict[str, str]], tags_of: Callable[[dict[str, str]], set[int]]
) -> list[Sample]:
    folder = Path(config.root) / "train"
    samples = []
    for image in images:
        path = folder / image["file_name"]
        assert path.is_file()
        samples.append(Sample(path.stem, path, tuple(sorted(tags_of(image)))))
    return samples


def measured_alone(way: Callable[[DataConfig], Iterable[Sample]], config: DataConfig) -> Measured:
    """`measure` in a process of its own."""
    with get_context("spawn").Pool(1) as alone:
        return alone.apply(measure, (way, config))


def measure(way: Callable[[DataConfig], Iterable[Sample]], config: DataConfig) -> Measured:
    if way is by_pycocotools:
        import pycocotools.coco  # noqa: F401  # its libraries are no part of what it takes
    start, began = resident_mib("VmRSS"), time.process_time()
    found = way(config)
    ready_s = time.process_time() - began
    n_tags = sum(len(sample.tags) for sample in found)
    return Measured(ready_s, time.process_time() - began, resident_mib("VmHWM") - start, n_tags)


if __name__ == "__main__":
    main()
