"""The batch job beside the field's way: `make bench-pseudo-label RUN=runs/wsss_mini` (`make oracle` first).

End to end, from image files and tags to masks and maps on disk, start of the model included, in turns on the same
images. Both have all cores. Then one worker against two, Ray against threads (start-up apart), and memory over 5,000
images.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median

from benchmarks.line import line
from benchmarks.pseudo_label_peer import label_images
from weakseg.batch.commands import Arguments, label
from weakseg.batch.inputs import Item, Question, find_items
from weakseg.batch.job import Engine, Plan, Shard, Stopping, run
from weakseg.batch.labeller import Ask, Assignment, Backend, Labeller, Outcome
from weakseg.batch.local import run_local
from weakseg.batch.ray_engine import ray_engine
from weakseg.cpu import usable_cpus
from weakseg.datasets import Dataset, Sample, read
from weakseg.report import recipe_of

ROUNDS, N_IMAGES = 3, 40
N_RAY, N_MEMORY = 2000, 5000
UNIT = "images/s"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run folder: its classifier, its bundle, its images")
    parser.add_argument("--only", nargs="+", choices=("peer", "workers", "ray", "memory"))
    args = parser.parse_args(argv)
    chosen = args.only or ("peer", "workers", "ray", "memory")
    recipe = recipe_of(args.run)
    bundle = args.run / "bundle" / recipe.export.name / recipe.export.version
    dataset = read(recipe.data, recipe.evaluate.splits[-1])
    with tempfile.TemporaryDirectory(prefix="weakseg-bench-") as scratch:
        folder = Path(scratch)
        if "peer" in chosen:
            against_peer(args.run / "train" / "classifier.pt", bundle, dataset, folder / "peer")
        if "workers" in chosen:
            two_workers(bundle, dataset, folder / "workers")
        if "ray" in chosen:
            against_ray(bundle, copies(dataset, N_RAY, folder / "images"), folder / "ray")
        if "memory" in chosen:
            memory(bundle, copies(dataset, N_MEMORY, folder / "many"), folder / "memory")


def against_peer(classifier: Path, bundle: Path, dataset: Dataset, folder: Path) -> None:
    tagged = [sample for sample in dataset if sample.tags]
    ours: list[float] = []
    peers: list[float] = []
    for i in range(ROUNDS + 1):  # the first warms up
        samples = tagged[i * N_IMAGES : (i + 1) * N_IMAGES]
        began = time.perf_counter()
        label_images(classifier, [(sample.image, list(sample.tags)) for sample in samples], folder / f"peer-{i}")
        peers.append(len(samples) / (time.perf_counter() - began))
        table = table_of(samples, dataset, folder / f"{i}.csv")
        began = time.perf_counter()
        done = label(Arguments(str(table), str(folder / f"ours-{i}"), bundle=bundle, cams=True, json=True))
        ours.append(done.ok / (time.perf_counter() - began))
    line("pseudo_label.vs_peer", median(ours[1:]), median(peers[1:]), unit=UNIT, goal=4)
    sizes = [mib_of(folder / f"{who}-1") / N_IMAGES * 1000 for who in ("ours", "peer")]
    line("pseudo_label.disk", *sizes, unit="MiB / 1000 images", cost=True, goal=3)


def two_workers(bundle: Path, dataset: Dataset, folder: Path) -> None:
    table = table_of(dataset.samples[: 2 * N_IMAGES], dataset, folder / "images.csv")
    rates: dict[int, list[float]] = {1: [], 2: []}
    for i in range(ROUNDS):
        for n in rates:
            done = label(Arguments(str(table), str(folder / f"{n}-{i}"), bundle=bundle, workers=n, json=True))
            rates[n].append(done.images_per_s)
    line("pseudo_label.two_workers", median(rates[2]), median(rates[1]), unit=UNIT, goal=1.8)


def against_ray(bundle: Path, images: Path, folder: Path) -> None:
    """From the first finished image of each engine to its last."""

    def rate(name: str, engine: Engine, assignment: Assignment) -> float:
        clock = Clock(engine)
        labeller = Labeller(assignment)
        try:
            run(labeller, Shard(0, 1, find_items(Question(str(images)))), clock, Plan(silent=True))
        finally:
            labeller.close()
        print(f"{name}: first image after {clock.first - clock.began:.1f} s", file=sys.stderr)
        return (clock.n - 1) / (clock.last - clock.first)

    workers = usable_cpus()
    tasks = [Assignment(Backend(bundle.resolve()), Ask(), str(folder / name), "bench") for name in ("ray", "local")]
    ours = rate("ray", ray_engine(tasks[0], None, workers), tasks[0])
    peer = rate("local", lambda items, one, stopping: run_local(items, one, workers, stopping), tasks[1])
    line("pseudo_label.ray_vs_local", ours, peer, unit=UNIT, goal=0.85)


class Clock:
    """An engine that is timed: when it began, and when its first and its last outcome came."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.n, self.began, self.first, self.last = 0, 0.0, 0.0, 0.0

    def __call__(self, items: Iterable[Item], labeller: Labeller, stopping: Stopping) -> Iterator[Outcome]:
        self.began = time.perf_counter()
        for outcome in self._engine(items, labeller, stopping):
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self.n += 1
            yield outcome


def memory(bundle: Path, images: Path, folder: Path) -> None:
    """Resident memory of a process of its own after a fifth of the images, and at the end."""
    command = [sys.executable, "-m", "weakseg", "pseudo-label", "--input", str(images), "--output", str(folder)]
    child = subprocess.Popen([*command, "--bundle", str(bundle), "--json"], stdout=subprocess.DEVNULL)
    resident = []
    while child.poll() is None:
        time.sleep(1)
        done = sum(1 for _ in (folder / "masks").glob("*.png")) if (folder / "masks").is_dir() else 0
        status = Path(f"/proc/{child.pid}/status")
        if done >= N_MEMORY / 5 and status.is_file():
            rows = [row for row in status.read_text().splitlines() if row.startswith("VmRSS")]
            resident += [int(row.split()[1]) / 1024 for row in rows]
    n = max(1, len(resident) // 10)
    line("pseudo_label.rss_mib", median(resident[-n:]), unit="MiB", cost=True)
    line("pseudo_label.rss_growth_mib", median(resident[-n:]) - median(resident[:n]), unit="MiB", cost=True, goal=32)


def table_of(samples: Sequence[Sample], dataset: Dataset, path: Path) -> Path:
    """A CSV of images and their tags."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "tags"])
        for sample in samples:
            writer.writerow([sample.image.resolve(), ";".join(dataset.classes.names[c] for c in sample.tags)])
    return path


def copies(dataset: Dataset, n: int, folder: Path) -> Path:
    """n images, those of the dataset over and over."""
    folder.mkdir(parents=True)
    for i in range(n):
        image = dataset.samples[i % len(dataset)].image.resolve()
        (folder / f"{i:05d}{image.suffix}").symlink_to(image)
    return folder


def mib_of(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


if __name__ == "__main__":
    main()
