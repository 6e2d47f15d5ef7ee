"""`weakseg pseudo-label --input ... --output ...`: masks of many images. With a recipe instead, the stage of a run."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import tyro

from weakseg import run as stages
from weakseg.batch.exports import Format
from weakseg.batch.inputs import Item, Question, find_items, shard_of
from weakseg.batch.job import Engine, Plan, Shard, Summary, max_failures, run
from weakseg.batch.labeller import Ask, Assignment, Backend, Labeller
from weakseg.cpu import usable_cpus
from weakseg.errors import UsageError
from weakseg.manifest import Precision
from weakseg.model import Refinement

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"  # of an Indexed Job of Kubernetes
IN_FLIGHT = 8  # requests to a server


@dataclass(frozen=True)
class Arguments:
    """Masks of many images: resumable, sharded, never half-written. docs/batch.md says more.

    OUTPUT/masks/*.png are palette PNGs (pixel = class id), OUTPUT/manifest/ has a row for every image. Killed and run
    again it goes on; run twice it does nothing. Exit codes: 0 all done, 3 some images failed, 42 all did, 143 ended by
    SIGTERM, 1 something else failed, 2 wrong arguments.
    """

    input: str  # a folder, a glob, list.txt, data.csv, data.parquet, shards-{0..9}.tar, or such on s3:// and the like
    output: str  # a folder, or s3://bucket/prefix and the like
    bundle: Path | None = None  # a model bundle: run it here
    endpoint: str | None = None  # host:port of a server: run it there; with the token of WEAKSEG_TOKEN, if that is set
    engine: Literal["local", "ray"] = "local"  # threads of this process, or actors of a Ray cluster
    address: str | None = (
        None  # of the Ray cluster; None = the one that RAY_ADDRESS names, or one of this machine's own
    )
    workers: int | None = None  # images side by side; None = one a core, 8 for a server
    dataset: Literal["voc", "csv", "folder", "coco"] | None = None  # INPUT is a dataset that training reads
    split: str = "train"  # of the dataset
    tags_key: str = "labels"  # of the dataset: see data.tags_key of a recipe
    mask: Literal["pseudo_mask", "segmentation"] | None = None  # None = pseudo-masks, where the model makes them
    cams: bool = False  # also OUTPUT/cams/*.npz: the maps, float16
    use_tags: bool = True  # pseudo-masks of the classes that INPUT says are there, where it says so
    threshold: float | None = None  # of the pseudo-mask's background; None = the model's own
    refine: Refinement | None = None  # of the pseudo-mask; None = as the model does it
    formats: tuple[Format, ...] = ()  # also these, made of the masks; may be asked for later
    review: int = 0  # the so many least certain masks as a task file for Label Studio and CVAT
    shard_index: int | None = None  # of num_shards; None = JOB_COMPLETION_INDEX, as Kubernetes sets it, or 0
    num_shards: int = 1  # work on one of so many parts of the input
    max_failures: str | None = None  # 12 or 1%: stop when more images fail, and exit with 0 when fewer do
    retry_failed: bool = False  # try images again that failed before
    force: bool = False  # begin anew where OUTPUT was made with other settings
    timings: Path | None = None  # append each image's seconds here; None = OUTPUT.timings.jsonl beside a folder
    metrics_file: Path | None = None  # *.prom for the textfile collector of Prometheus' node exporter
    runtime: str = "onnxruntime"  # what executes the bundle
    provider: str | None = None  # what the runtime executes on: onnxruntime's cpu, cuda, tensorrt
    precision: Precision = "fp32"  # of the graphs that have it; others stay fp32
    public_key: Path | None = None  # PEM file: one of its keys must have signed the bundle
    tls: bool = False  # speak TLS to the server, trusting gRPC's own list of authorities
    ca: Path | None = None  # PEM file: speak TLS, trusting these instead
    cert: Path | None = None  # PEM file: the certificate to show the server (mTLS)
    key: Path | None = None  # PEM file: the key of this certificate
    plaintext_token: bool = False  # send the token without TLS: where the network encrypts
    json: bool = False  # print one JSON object to stdout, nothing else

    def __post_init__(self) -> None:
        if (self.bundle is None) == (self.endpoint is None):
            raise UsageError("expected either --bundle or --endpoint: where shall the model run?")
        if self.num_shards < 1 or not 0 <= (self.shard_index or 0) < self.num_shards:
            raise UsageError(f"expected --shard-index in 0 ... {self.num_shards - 1}, got {self.shard_index}")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"expected --workers of at least 1, got {self.workers}")
        if self.review < 0:
            raise UsageError(f"expected --review of at least 0 images, got {self.review}")
        if self.address is not None and self.engine != "ray":
            raise UsageError("--address is that of a Ray cluster: add --engine ray")


def main(argv: Sequence[str]) -> int:
    """The exit code of the job; or that of a recipe's stage."""
    if argv and not argv[0].startswith("-"):
        return stages.main(["--only", "pseudo_label", *argv])
    arguments = tyro.cli(Arguments, args=list(argv), prog="weakseg pseudo-label")
    summary = label(arguments)
    _report(arguments, summary)
    return summary.exit_code


def label(arguments: Arguments) -> Summary:
    """List, take this shard, label."""
    question = Question(arguments.input, arguments.dataset, arguments.split, arguments.tags_key)
    index = _shard_index(arguments)
    if os.path.isdir(arguments.input) and "://" not in arguments.output:
        inside = os.path.realpath(arguments.output)
        if (inside + os.sep).startswith(os.path.realpath(arguments.input) + os.sep) and arguments.dataset is None:
            raise UsageError(f"--output {arguments.output} lies in the folder of images: choose one beside it")
    found = find_items(question)
    _check_apart(found, arguments.output)
    items = shard_of(found, index, arguments.num_shards)
    if not arguments.use_tags:
        items = [dataclasses.replace(item, tags=None) for item in items]
    shard = Shard(index, arguments.num_shards, items)
    allowed = None if arguments.max_failures is None else max_failures(arguments.max_failures, len(items))
    assignment = _assignment(arguments, shard)
    labeller = Labeller(assignment)
    try:
        return run(labeller, shard, _engine(arguments, assignment), _plan(arguments, allowed, index))
    finally:
        labeller.close()


def _check_apart(items: Sequence[Item], output: str) -> None:
    """Masks must not be the next run's images."""
    root = _real_folder(output).rstrip("/") + "/"
    for item in items:
        if (_real_folder(os.path.dirname(item.path)) + "/").startswith(root):
            raise UsageError(f"--output {output} holds the image {item.uri}: choose a folder that has no images in it")


@lru_cache(maxsize=1024)
def _real_folder(path: str) -> str:
    return path if "://" in path or "\0" in path else os.path.realpath(path)


def _assignment(arguments: Arguments, shard: Shard) -> Assignment:
    names = ("bundle", "runtime", "provider", "precision", "public_key", "endpoint")
    backend = Backend(**{name: getattr(arguments, name) for name in names}, access=_access(arguments))
    asked = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Ask)}
    return Assignment(backend, Ask(**asked), arguments.output, shard.name)


def _access(arguments: Arguments) -> dict[str, Any]:
    if arguments.endpoint is None:
        return {}
    from weakseg.channel import TOKEN_VARIABLE

    names = ("tls", "ca", "cert", "key", "plaintext_token")
    access = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    if token := os.environ.get(TOKEN_VARIABLE):
        access["token"] = token
    return access


def _engine(arguments: Arguments, assignment: Assignment) -> Engine:
    workers = arguments.workers or (usable_cpus() if arguments.endpoint is None else IN_FLIGHT)
    if arguments.engine == "ray":
        from weakseg.batch.ray_engine import ray_engine

        return ray_engine(assignment, arguments.address, arguments.workers)
    from weakseg.batch.local import run_local

    return lambda items, labeller, stopping: run_local(items, labeller, workers, stopping)


def _plan(arguments: Arguments, allowed: int | None, index: int) -> Plan:
    timings = arguments.timings
    if timings is None and "://" not in arguments.output:
        shard = f".{index:05d}" if arguments.num_shards > 1 else ""
        timings = Path(f"{os.path.abspath(arguments.output)}.timings{shard}.jsonl")
    return Plan(
        arguments.formats,
        arguments.review,
        allowed,
        arguments.force,
        arguments.retry_failed,
        arguments.json,
        timings,
        arguments.metrics_file,
    )


def _shard_index(arguments: Arguments) -> int:
    if arguments.shard_index is not None:
        return arguments.shard_index
    said = os.environ.get(INDEX_VARIABLE, "") if arguments.num_shards > 1 else "0"
    if not said.isdigit() or int(said) >= arguments.num_shards:
        raise UsageError(
            f"expected --shard-index, or {INDEX_VARIABLE} in 0 ... {arguments.num_shards - 1}, "
            f"got {said or 'neither'!r}"
        )
    return int(said)


def _report(arguments: Arguments, summary: Summary) -> None:
    said = {"output": arguments.output, "finished": summary.finished, **dataclasses.asdict(summary)}
    if arguments.json:
        print(json.dumps(said))
        return
    print(
        f"{arguments.output}: {summary.ok} of {summary.total} images labelled, {summary.failed} failed; "
        f"{summary.labelled} in this run" + (f", {summary.images_per_s:.1f} images/s" if summary.labelled else "")
    )
    for reason, n in sorted(summary.reasons.items()):
        print(f"  {reason}: {n}")
    if not summary.finished:
        why = "too many images failed" if summary.too_many else "it was told to stop"
        print(f"not finished, {why}: run the same command again to go on", file=sys.stderr)
