"""Everything that is wrong with a dataset, in one pass, without changing it.

True masks are opened here for two questions only: has each the size of its image, and does each hold known values. They
are not compared with the tags.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from weakseg.datasets.formats import load
from weakseg.datasets.sample import Dataset, Sample
from weakseg.datasets.truth import Truth, has_truth, open_truth, seal
from weakseg.errors import DataError, DatasetError
from weakseg.image import read_image
from weakseg.parallel import map_processes
from weakseg.progress import Progress
from weakseg.recipe import DataConfig

CHUNK = 64  # images per task of a worker


@dataclass(frozen=True)
class Finding:
    """One problem. where: a file (with its line), an image or a class; it may already stand in the message."""

    level: Literal["error", "warning"]
    where: str
    message: str


def check(config: DataConfig, *, workers: int = 1, progress: Progress | None = None) -> list[Finding]:
    """All findings of the splits train, val and (if set) tune; errors first, each group in the order it was met.

    Errors: a file that is missing or unreadable, a list or label that makes no sense, an unknown class or mask value, a
    mask of another size than its image, a missing mask outside train, an empty split.
    Warnings: an image without tags, a class without training images, the same file twice, an image in both train and
    val, a training image without a mask (if others have one).
    """
    seal(config)
    findings: list[Finding] = []
    datasets = {split: _load(config, split, findings) for split in _splits(config)}
    found = {split: dataset for split, dataset in datasets.items() if dataset is not None}
    findings += chain.from_iterable(_split_findings(config, dataset) for dataset in found.values())
    findings += _files(config, found, workers, progress or Progress("silent"))
    findings += _shared_images(config, found)
    unique = dict.fromkeys(findings)  # a class list that is wrong is wrong for every split
    return sorted(unique, key=lambda finding: finding.level != "error")


def _splits(config: DataConfig) -> list[str]:
    return list(dict.fromkeys(split for split in (config.train, config.val, config.tune) if split))


def _load(config: DataConfig, split: str, findings: list[Finding]) -> Dataset | None:
    def note(where: str, message: str, _error: type[DataError] = DatasetError) -> None:
        findings.append(Finding("error", where, message))

    try:
        return load(config, split, note)
    except DataError as error:
        findings.append(Finding("error", config.root, str(error)))
        return None


def _split_findings(config: DataConfig, dataset: Dataset) -> Iterator[Finding]:
    if not dataset.samples:
        yield Finding("error", f"split {dataset.split}", "expected images, got an empty split: add some to its list")
    for sample in dataset:
        if not sample.tags:
            yield Finding("warning", str(sample.image), "has no tags: all of it counts as background")
    if dataset.split == config.train:
        used = {index for sample in dataset for index in sample.tags}
        for index, name in enumerate(dataset.classes.names):
            if index not in used:
                yield Finding("warning", f"class {name}", "has no training image: the model cannot learn it")


@dataclass(frozen=True)
class _Job:
    """An image to look at; needs_mask: a missing one is an error."""

    sample: Sample
    truth: Truth | None
    needs_mask: bool


def _files(config: DataConfig, datasets: dict[str, Dataset], workers: int, progress: Progress) -> Iterator[Finding]:
    """Decode every image and its mask once, however many splits name it."""
    jobs: dict[str, _Job] = {}
    for split, dataset in datasets.items():
        truth = open_truth(config, split, opener="data_check") if has_truth(config) else None
        for sample in dataset:
            before = jobs.get(sample.id)
            needs_mask = split != config.train or (before is not None and before.needs_mask)
            jobs[sample.id] = _Job(sample, truth, needs_mask)
    first: dict[str, str] = {}
    parts = map_processes(_look_at, _chunks([*jobs.values()]), workers)
    for findings, path, digest in progress.each(chain.from_iterable(parts), "check", len(jobs)):
        yield from findings
        if digest and first.setdefault(digest, path) != path:
            yield Finding("warning", path, f"is the same file as {first[digest]}: keep one of the two")


def _chunks(jobs: list[_Job]) -> Iterator[list[_Job]]:
    """Several at a time: a Truth, which goes to the worker with them, knows all ids of its split."""
    return (jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK))


def _look_at(jobs: list[_Job]) -> list[tuple[list[Finding], str, str]]:
    return [_look(job) for job in jobs]


def _look(job: _Job) -> tuple[list[Finding], str, str]:
    """Findings of one image and its mask, its path, and the hash of its content ("" if it cannot be read)."""
    sample, path = job.sample, str(job.sample.image)
    findings, digest, size = [], "", None
    try:
        data = sample.image.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        size = read_image(data).shape[:2]
    except OSError as error:
        findings.append(Finding("error", path, f"expected an image file, got: {error.strerror or error}"))
    except DataError as error:
        findings.append(Finding("error", path, str(error)))
    if job.truth is not None and not job.truth.has(sample.id):
        level: Literal["error", "warning"] = "error" if job.needs_mask else "warning"
        findings.append(
            Finding(level, path, f"expected a mask in {job.truth.where(sample.id)}, got none: it cannot be scored")
        )
    elif job.truth is not None:
        try:
            job.truth.mask(sample.id, size)
        except DataError as error:
            findings.append(Finding("error", path, str(error)))
    return findings, path, digest


def _shared_images(config: DataConfig, datasets: dict[str, Dataset]) -> Iterator[Finding]:
    """Pictures that are scored and were learnt from."""
    if config.val not in datasets:
        return
    scored = {sample.image.resolve() for sample in datasets[config.val]}
    for split, dataset in datasets.items():
        shared = scored & {sample.image.resolve() for sample in dataset}
        if split != config.val and shared:
            message = f"holds {len(shared)} images of {config.val} too: its figures would be too good"
            yield Finding("warning", f"split {split}", message)
