"""A run folder as the stages would leave it, made from true masks with errors added. For tests of the report."""

import json
from dataclasses import asdict

import cv2
import numpy as np
import pytest

from weakseg.cam_file import CamFile
from weakseg.classes import IGNORE
from weakseg.files import write_bytes_atomic, write_json_atomic
from weakseg.masks.png import png_from_labels
from weakseg.refinement import REFINERS, Change, refiner_record
from weakseg.scoring import Confusion, Sweep

STAGES = {"train": 61.0, "cam": 24.5, "pseudo_label": 33.0, "train_seg": 88.0, "train_seg_full": 90.0, "evaluate": 41.0}


@pytest.fixture
def fill_run():
    return write_run


def write_run(folder, recipe, classes, truth, *, scores=True):
    """truth: {split: {id: (tags, (H, W) label map)}}."""
    rng = np.random.default_rng(0)
    write_json_atomic(folder / "config.json", asdict(recipe))
    machine = {"cpu": "Test CPU & Co", "cpus": 2, "memory_gib": 8.0, "gpus": [], "platform": "test"}
    environment = {"commit": "0123456789abcdef", "seed": 0, "started": "2030-01-01T10:00:00+00:00", "machine": machine}
    write_json_atomic(folder / "environment.json", environment)
    threshold = {"t": 0.3, "rule": "fixed", "provenance": "set in the recipe"}
    write_json_atomic(folder / "pseudo_label/threshold.json", threshold)
    for stage, seconds in STAGES.items():
        done = {"key": "k", "seconds": seconds, "cpu_seconds": 1.8 * seconds, "n_images": 200}
        write_json_atomic(folder / stage / "done.json", done | {"images_per_s": 200 / seconds, "summary": {}})
    for stage in ("train", "train_seg"):
        rows = [
            {"step": s, "epoch": s // 100, "seconds": 1.0, "images_per_s": 40.0 + s % 7, "lr": 0.01 * (1 - s / 500)}
            | {"loss": 0.7 * np.exp(-s / 120) + 0.1 + 0.02 * rng.random()}
            for s in range(9, 500, 10)
        ]
        lines = "".join(json.dumps(row | {"loss/segmentation": row["loss"]}) + "\n" for row in rows)
        write_bytes_atomic(folder / stage / "metrics.jsonl", lines.encode())
    for split, images in truth.items():
        sweep, confusions, change = Sweep(len(classes)), {}, Change(len(classes))
        for sample_id, (tags, labels) in images.items():
            maps = _one_image(folder, split, sample_id, tags, labels, classes, rng, sweep)
            for what, prediction in maps.items():
                confusions.setdefault(what, Confusion(len(classes))).add(labels, prediction)
            change.add(maps["cam"], maps["cam_crf"], tags)
        miou = {}
        if scores:
            _write_scores(folder, recipe, split, classes, confusions, sweep, threshold)
            miou = {what: confusion.scores().miou for what, confusion in confusions.items()}
        record = refiner_record(REFINERS[0], split, change, classes, miou)
        write_json_atomic(folder / "evaluate" / f"refiner-crf-{split}.json", record)


def _one_image(folder, split, sample_id, tags, labels, classes, rng, sweep):
    """Heatmaps are blurred true masks, label maps are true masks through a wobbly lens."""
    cams = []
    for c in tags:
        soft = cv2.GaussianBlur((labels == c + 1).astype(np.float32), (0, 0), max(labels.shape) / 25)
        soft += 0.15 * cv2.resize(rng.random((6, 6), np.float32), labels.shape[::-1])
        cams.append(cv2.resize(soft, tuple(-(-side // 4) for side in labels.shape[::-1]), interpolation=cv2.INTER_AREA))
    cam = np.array(cams, np.float16).reshape(len(tags), -(-labels.shape[0] // 4), -(-labels.shape[1] // 4))
    file = CamFile(np.array(tags, np.int32), cam, *labels.shape, rng.random(len(classes)).astype(np.float32))
    file.save(folder / "cam" / split / f"{sample_id}.npz")
    if len(tags):
        sweep.add(labels, file.cam01(), file.classes)
    pseudo = _wobble(labels, rng, 6)
    pseudo[cv2.Canny((pseudo > 0).astype(np.uint8) * 255, 50, 100) > 0] = IGNORE
    pseudo[cv2.dilate((pseudo == IGNORE).astype(np.uint8), np.ones((5, 5))) > 0] = IGNORE
    prediction = _wobble(labels, rng, rng.choice([3, 6, 25]))
    write_bytes_atomic(folder / "pseudo_label" / split / f"{sample_id}.png", png_from_labels(pseudo))
    path = folder / "evaluate" / "segmentation" / split / f"{sample_id}.png"
    write_bytes_atomic(path, png_from_labels(prediction))
    crf = _wobble(labels, rng, 8)
    cam_labels = _wobble(labels, rng, 12)
    pseudo_scored = np.where(pseudo == IGNORE, 0, pseudo).astype(np.uint8)
    full = _wobble(labels, rng, 3)
    return {
        "cam": cam_labels,
        "cam_crf": crf,
        "pseudo_mask": pseudo_scored,
        "segmentation": prediction,
        "segmentation_full": full,
    }


def _wobble(labels, rng, strength):
    height, width = labels.shape
    shift = cv2.resize(rng.normal(size=(5, 5, 2)).astype(np.float32) * np.float32(strength), (width, height))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    out = cv2.remap(labels, x + shift[..., 0], y + shift[..., 1], cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    out[out == IGNORE] = 0
    return out


def _write_scores(folder, recipe, split, classes, confusions, sweep, threshold):
    names = recipe.data.scored_classes
    scored = None if names is None else [classes.index(name) for name in names]
    for what, confusion in confusions.items():
        if what.startswith("segmentation") and split == recipe.data.train:
            continue
        weak = not what.startswith("segmentation")
        best = sweep.best(scored)
        record = {
            "what": what,
            "split": split,
            "tags": "given" if weak else "none",
            "threshold": threshold if weak else None,
            "crf": {"iterations": 10} if what in ("cam_crf", "pseudo_mask") else None,
            "scales": [0.5, 1.0, 1.5, 2.0],
            "flip": True,
            "n_images": confusion.n_images,
            "seed": 0,
            "boundary_f": 0.5,
            "curve": sweep.curve(scored) if what == "cam" else None,
            "oracle": {"t": best[0], "miou": best[1]} if what == "cam" else None,
        }
        scores = confusion.scores(scored).to_dict(classes)
        write_json_atomic(folder / "evaluate" / f"{what}-{split}.json", record | scores)
