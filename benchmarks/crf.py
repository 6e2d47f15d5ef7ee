"""Our dense CRF against pydensecrf2: `python -m benchmarks.crf runs/demo` (`make bench-crf RUN=runs/demo`).

Photographs, maps and CRF settings are those of a finished run. Ours and the peer take turns on every image, one core
each; a ratio compares CPU seconds, except where threads are measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.crf_sparse import sparse_marginals
from benchmarks.line import line
from training.evaluate import score_split
from weakseg import crf
from weakseg.cam import background_from_alpha
from weakseg.cam_file import read_cam
from weakseg.datasets import read
from weakseg.datasets.truth import has_truth
from weakseg.image import read_image
from weakseg.progress import Progress
from weakseg.recipe import CrfConfig, Recipe
from weakseg.report import recipe_of
from weakseg.run_folder import cam_path, read_json
from weakseg.threshold import Threshold

N_IMAGES = 100
ALPHAS = (4.0, 24.0)  # low and high, Ahn & Kwak 2018
SIDE, N_LABELS = 321, 21
ROUNDS = 5
Job = tuple[NDArray[np.uint8], NDArray[np.float32]]

FIRST_CALL = """
import numpy as np
from weakseg.recipe import CrfConfig
image, probabilities = np.zeros((240, 320, 3), np.uint8), np.ones((2, 3, 240, 320), np.float32)
import time
began = time.perf_counter()
from weakseg import crf
crf.refine(image, probabilities, CrfConfig())
print(time.perf_counter() - began)
"""


def main(folder: Path) -> None:
    crf.check_available("pydensecrf")
    cv2.setNumThreads(1)
    recipe = recipe_of(folder)
    ours = replace(recipe.pseudo_label.crf or CrfConfig(), backend="lattice")
    peer = replace(ours, backend="pydensecrf")
    jobs = low_and_high(recipe, folder)
    crf.warm_up()

    many = [many_labels(image, seed) for seed, (image, _) in enumerate(jobs[:10])]
    seconds = took_turns(many, partial(refined, config=ours), partial(refined, config=peer), sparse_marginals(ours))
    line("crf.21class", seconds[0] / len(many), seconds[1] / len(many), unit="s", cost=True, goal=2)
    line("crf.21class_sparse", seconds[2] / len(many), seconds[1] / len(many), unit="s", cost=True)

    results: list[tuple[Any, Any]] = []
    few = [(image, sets) for image, sets in jobs if sets.shape[1] <= 4]
    seconds = took_turns(few, partial(refined, config=ours), partial(one_by_one, config=peer), keep=results)
    line("crf.la_ha", seconds[0] / len(few), seconds[1] / len(few), unit="s", cost=True, goal=5)
    agreement = [np.mean(a.argmax(axis=1) == b.argmax(axis=1)) for a, b in results]
    line("crf.label_agreement", float(np.mean(agreement)), unit="share of pixels", goal=0.995)
    difference = [np.abs(a - b).mean() for a, b in results]
    line("crf.marginal_difference", float(np.mean(difference)), unit="probability", cost=True, goal=5e-3)

    quicker = {"half_resolution": replace(ours, resolution="half"), "early_stop": replace(ours, early_stop=True)}
    for name, config in quicker.items():
        results.clear()
        seconds = took_turns(few, partial(refined, config=config), partial(refined, config=ours), keep=results)
        line(f"crf.{name}", seconds[0] / len(few), seconds[1] / len(few), unit="s", cost=True)
        agreement = [np.mean(a.argmax(axis=1) == b.argmax(axis=1)) for a, b in results]
        line(f"crf.{name}_agreement", float(np.mean(agreement)), unit="share of pixels")
    if has_truth(recipe.data):
        whole = miou_of(recipe, folder, ours)
        for name, config in quicker.items():
            line(f"crf.{name}_miou", miou_of(recipe, folder, config), whole, unit="mIoU of CAM + CRF")

    work = partial(refined, config=ours)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(2) as two:
        two_at_once("crf.two_threads", few, work, one, two, goal=1.8)
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as one, ProcessPoolExecutor(2, spawn) as two:
        # Nothing shared but the machine: what two threads could reach at most.
        two_at_once("crf.two_processes", few, partial(shape_of_refined, config=ours), one, two)

    line("crf.first_call_s", median(first_call() for _ in range(ROUNDS)), unit="s", cost=True, goal=1)
    with tempfile.TemporaryDirectory() as cache:
        line("crf.first_call_cold_s", first_call(NUMBA_CACHE_DIR=cache), unit="s", cost=True, goal=15)


def low_and_high(recipe: Recipe, folder: Path) -> list[Job]:
    """Photographs with probabilities (2, K, H, W): background of a low and a high alpha, and the present classes."""
    jobs = []
    split = recipe.evaluate.splits[-1]
    tagged = [sample for sample in read(recipe.data, split).samples if sample.tags]
    for sample in tagged[:N_IMAGES]:
        cam01 = read_cam(cam_path(folder, split, sample.id)).cam01(recipe.cam.normalisation)
        sets = np.stack([np.concatenate([background_from_alpha(cam01, alpha)[None], cam01]) for alpha in ALPHAS])
        jobs.append((read_image(sample.image), sets))
    return jobs


def miou_of(recipe: Recipe, folder: Path, config: CrfConfig) -> float:
    """Of the CAMs after this CRF, at the run's threshold, on the scored split."""
    changed = replace(recipe, pseudo_label=replace(recipe.pseudo_label, crf=config))
    threshold = Threshold.from_dict(read_json(folder / "pseudo_label" / "threshold.json"))
    dataset = read(recipe.data, recipe.evaluate.splits[-1])
    records = score_split(changed, folder, dataset, (), threshold, Progress("silent"))
    return float(records["cam_crf"]["miou"])


def many_labels(image: NDArray[np.uint8], seed: int) -> Job:
    """What a segmentation network of 21 classes says: smooth, and sure of little."""
    noise = np.random.default_rng(seed).normal(size=(N_LABELS, 21, 21)).astype(np.float32)
    logits = np.stack([cv2.resize(plane, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for plane in 2 * noise])
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=0)
    return np.asarray(cv2.resize(image, (SIDE, SIDE)), dtype=np.uint8), probabilities[None]


def refined(job: Job, config: CrfConfig) -> NDArray[np.float32]:
    return crf.refine(*job, config)


def shape_of_refined(job: Job, config: CrfConfig) -> tuple[int, ...]:
    """The work without sending its result to another process."""
    return refined(job, config).shape


def one_by_one(job: Job, config: CrfConfig) -> NDArray[np.float32]:
    """The usual way: a call for each alpha."""
    image, sets = job
    return np.stack([crf.refine(image, one, config) for one in sets])


def took_turns(
    jobs: Sequence[Job], *ways: Callable[[Job], Any], keep: list[tuple[Any, ...]] | None = None
) -> list[float]:
    """CPU seconds of each way over all jobs, in turns; results go to `keep`."""
    for way in ways:
        way(jobs[0])
    seconds = [0.0] * len(ways)
    for job in jobs:
        results = []
        for i, way in enumerate(ways):
            began = time.process_time()
            results.append(way(job))
            seconds[i] += time.process_time() - began
        if keep is not None:
            keep.append(tuple(results))
    return seconds


def two_at_once(
    name: str, jobs: Sequence[Job], work: Callable[[Job], Any], one: Executor, two: Executor, goal: float | None = None
) -> None:
    """Images per second of two workers against one, in turns."""
    rates: dict[Executor, list[float]] = {one: [], two: []}
    for pool in (one, two):
        list(pool.map(work, jobs[:4]))
    for _ in range(ROUNDS):
        for pool, measured in rates.items():
            began = time.perf_counter()
            list(pool.map(work, jobs))
            measured.append(len(jobs) / (time.perf_counter() - began))
    line(name, median(rates[two]), median(rates[one]), unit="images/s", goal=goal)


def first_call(**environment: str) -> float:
    """Seconds of the first CRF of a new process, its import included."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
