"""`weakseg predict`: masks of images, by a bundle in this process or by a server."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from weakseg.datasets.common import IMAGE_SUFFIXES
from weakseg.errors import PartialError, UsageError, WeaksegError
from weakseg.files import write_bytes_atomic
from weakseg.image import read_image
from weakseg.manifest import OutputKind, Precision
from weakseg.model import load
from weakseg.progress import Progress
from weakseg.result import Result


@dataclass(frozen=True)
class Arguments:
    """Masks of images.

    IMAGE.png (palette PNG, pixel = class id) is written for each image; with both mask outputs IMAGE.segmentation.png
    and IMAGE.pseudo_mask.png, with `cam` also IMAGE.npz with the heatmaps and scores.
    """

    images: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")
    ]  # files, or folders of them
    output: Path  # folder to write to
    bundle: Path | None = None  # a model bundle: run it here
    runtime: str = "onnxruntime"  # what executes the bundle
    provider: str | None = None  # what the runtime executes on: onnxruntime's cpu, cuda, tensorrt
    precision: Precision = "fp32"  # of the graphs that have it; others stay fp32
    public_key: Path | None = None  # PEM file: one of its keys must have signed the bundle
    endpoint: str | None = None  # host:port of a server: run it there; with the token of WEAKSEG_TOKEN, if that is set
    tls: bool = False  # speak TLS to it, trusting gRPC's own list of authorities
    ca: Path | None = None  # PEM file: speak TLS, trusting these instead
    cert: Path | None = None  # PEM file: the certificate to show it (mTLS)
    key: Path | None = None  # PEM file: the key of this certificate
    plaintext_token: bool = False  # send the token without TLS: where the network encrypts
    outputs: tuple[Literal["cam", "pseudo_mask", "segmentation"], ...] = ()  # default: what the model is made for
    tags: tuple[str, ...] = ()  # names of the classes in the images, if they are the same in all
    overlay: bool = False  # also write IMAGE.overlay.png
    json: bool = False  # print one JSON object to stdout

    def __post_init__(self) -> None:
        if (self.bundle is None) == (self.endpoint is None):
            raise UsageError("expected either --bundle or --endpoint: where shall the model run?")
        if self.overlay and self.outputs == ("cam",):
            raise UsageError("--overlay shows a mask: add segmentation or pseudo_mask to --outputs")


@dataclass(frozen=True)
class Task:
    """An image and the path of its outputs without a suffix."""

    image: Path
    stem: Path


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 3 if some images failed; raises where nothing could be done."""
    arguments = tyro.cli(Arguments, args=list(argv), prog="weakseg predict")
    tasks = find_tasks(arguments.images, arguments.output)
    written: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    progress = Progress("silent" if arguments.json else "auto")
    for task, result in progress.each(zip(tasks, _results(arguments, tasks), strict=True), "predict", len(tasks)):
        if isinstance(result, WeaksegError):
            failed.append({"image": str(task.image), "reason": result.reason, "message": str(result)})
        else:
            files = write(task, result, overlay=arguments.overlay)
            written.append(_record(task, result, files))
    _report(arguments, written, failed)
    return PartialError.exit_code if failed and written else int(bool(failed))


def find_tasks(images: Sequence[Path], output: Path) -> list[Task]:
    """Every image file, folders expanded; outputs of a folder's images keep their place below it.

    Raises:
        UsageError: no image, two images that would share an output, or an output that would replace an image.
    """
    found: list[Task] = []
    for path in images:
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.name[0] != ".")
            found += [Task(file, output / file.relative_to(path).with_suffix("")) for file in files]
        else:
            found.append(Task(path, output / path.stem))
    if not found:
        raise UsageError(f"expected image files, got none in {', '.join(map(str, images)) or 'no argument'}")
    taken: dict[Path, Path] = {}
    for task in found:
        if task.stem in taken:
            raise UsageError(
                f"{taken[task.stem]} and {task.image} would both write {task.stem}.png: predict them in two folders"
            )
        taken[task.stem] = task.image
        if task.stem.resolve() == task.image.with_suffix("").resolve():
            raise UsageError(
                f"--output {output} is the folder of {task.image}, which could be replaced: choose another"
            )
    return found


def write(task: Task, result: Result, *, overlay: bool) -> list[Path]:
    """Write what the result has, each file whole or not at all; returns the paths."""
    files = []
    for kind in result.mask_kinds:
        files.append(_with(task.stem, ".png" if len(result.mask_kinds) == 1 else f".{kind}.png"))
        write_bytes_atomic(files[-1], result.mask_png(kind))
    if result.heatmaps or not result.mask_kinds:
        files.append(result.save(_with(task.stem, ".npz")))
    if overlay:
        buffer = io.BytesIO()
        pixels = read_image(task.image) if result.image is None else None
        result.overlay(image=pixels).save(buffer, "PNG", compress_level=1)
        files.append(_with(task.stem, ".overlay.png"))
        write_bytes_atomic(files[-1], buffer.getvalue())
    return files


def _results(arguments: Arguments, tasks: Sequence[Task]) -> Iterator[Result | WeaksegError]:
    """One per task, in order; an image that fails is yielded as its error. Wrong options and a missing server raise."""
    outputs: Sequence[OutputKind] | None = arguments.outputs or None
    tags = arguments.tags or None
    paths = [task.image for task in tasks]
    if arguments.endpoint is not None:
        from weakseg.channel import TOKEN_VARIABLE
        from weakseg.client import Client

        names = ("tls", "ca", "cert", "key", "plaintext_token")
        access: Any = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
        if token := os.environ.get(TOKEN_VARIABLE):
            access["token"] = token
        with Client(arguments.endpoint, **access) as client:
            yield from client.segment_many(paths, on_error="return", outputs=outputs, tags=tags)
        return
    assert arguments.bundle is not None
    options = {name: getattr(arguments, name) for name in ("runtime", "provider", "precision", "public_key")}
    with closing(load(arguments.bundle, **options)) as model:
        request = model.request(outputs=outputs, tags=tags)
        for path in paths:
            try:
                decoded = model.decode(path)
                yield model.finish(decoded, model.infer(decoded, request), request)
            except WeaksegError as error:
                yield error


def _with(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)  # with_suffix would cut "cat.v2" to "cat"


def _record(task: Task, result: Result, files: Sequence[Path]) -> dict[str, Any]:
    return {
        "image": str(task.image),
        "files": [str(file) for file in files],
        "classes": list(result.legend()) if result.mask_kinds else list(result.present),
        "model": result.model,
    }


def _report(arguments: Arguments, written: Sequence[dict[str, Any]], failed: Sequence[dict[str, str]]) -> None:
    if arguments.json:
        print(json.dumps({"written": written, "failed": failed}))
        return
    for record in written:
        print(f"{record['files'][0]}: {', '.join(record['classes']) or 'background only'}")
    for failure in failed:
        image, message = failure["image"], failure["message"]
        # An image that a server refuses was only bytes to it; one that is refused here is named already.
        print(f"error: {message if message.startswith(image) else f'{image}: {message}'}", file=sys.stderr)
