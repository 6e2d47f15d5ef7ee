"""The steps of one image that take time: look, decode, refine, finish, encode. They run in threads, and only in these.

Each is counted, traced and timed here, so that it does not matter which threads they run in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from serve.admission import Admission
from serve.batcher import BatchAnswer
from serve.drift import Windows
from serve.job import Answer, Job, ModelRunError
from serve.metrics import Metrics
from weakseg.errors import DataError, ModelFailedError, OutputUnsupportedError, ServiceError, WeaksegError
from weakseg.image import SERVICE_FORMATS, check_pixels, probe
from weakseg.image_header import MAX_PARTS
from weakseg.model import ON_CPU, Decoded, GraphOutputs, Model
from weakseg.preprocess import fitted_size
from weakseg.result import Result
from weakseg.stopping import Check, StoppedError, go_on

# Of all images of a batch together. Measured with MobileNetV2: of 64 x 64 pixels a batch of 8 takes 0.82 of the time,
# of 128 x 128 0.95, of 256 x 256 1.14, of 384 x 384 1.19.
CPU_BATCH_PIXELS = 2**16

T = TypeVar("T")
U = TypeVar("U")
Arrays = dict[str, NDArray[Any]]  # outputs of a graph
Runs = dict[str, BatchAnswer[Arrays]]  # by graph, of one image, without the batch axis
# What a pixel takes at the most, measured: the decoder's own image and ours; coefficients of a progressive JPEG;
# canvases of libwebp. Two masks of up to 254 classes and their encoding take less than that. They have the size of the
# whole image, so reduced decoding counts as much.
BYTES_PER_PIXEL = {"JPEG": 12, "PNG": 7, "WEBP": 16}
BYTES_PER_RAW_PIXEL = 7


@dataclass(frozen=True)
class Seen:
    """What is known of an image before it is decoded: the most that its pixels take, (height, width) for a graph."""

    n_bytes: int
    shape: tuple[int, int]


class Steps:
    """May be called in any thread.

    Args:
        max_batch, max_delay_s: of the batcher.
    """

    def __init__(
        self, metrics: Metrics, admission: Admission, *, max_pixels: int, max_batch: int, max_delay_s: float
    ) -> None:
        self.windows = Windows()
        self._metrics, self._admission = metrics, admission
        self._max_pixels = max_pixels
        self._max_batch, self._max_delay_s = max_batch, max_delay_s

    def look(self, job: Job, max_parts: int = MAX_PARTS) -> Seen:
        """Raises ImageError for what can be refused before it is decoded; TooManyPartsError beyond `max_parts`."""
        if job.size is not None:
            return _seen(job, job.size, BYTES_PER_RAW_PIXEL)
        image = job.load()
        if not isinstance(image, bytes):
            return _seen(job, (image.shape[0], image.shape[1]), BYTES_PER_RAW_PIXEL)
        header = probe(image, formats=SERVICE_FORMATS, max_parts=max_parts)
        size = (header.height, header.width) if job.ignore_orientation else header.oriented_size
        seen = _seen(job, size, BYTES_PER_PIXEL[header.format])
        check_pixels(header, self._max_pixels)
        return seen

    def decode(self, job: Job) -> Decoded:
        """The network's input; the pixels that it was made of are gone."""
        job.check_time()
        started = monotonic()
        decoded = job.model.decode(
            job.load(),
            max_pixels=self._max_pixels,
            formats=SERVICE_FORMATS,
            ignore_orientation=job.ignore_orientation,
            reduced_decoding=job.reduced_decoding,
        )
        self._end(job, "decode", started)
        return replace(decoded, rgb=None)

    def count_runs(self, job: Job, runs: Runs) -> None:
        """Of an image that has gone through its graphs."""
        queue_s = sum(run.queue_s for run in runs.values())
        self._observe(job, "queue", queue_s)
        self._observe(job, "infer", sum(run.infer_s for run in runs.values()))
        self._metrics.of_queue(job.priority).observe(queue_s)

    def refine(self, job: Job, decoded: Decoded, runs: Runs, check: Check) -> list[Answer]:
        """Empty when it was stopped: here, so that what its frames hold is given back by this thread."""
        try:
            job.check_time()
            return [self._finish(job, decoded, runs, check)]
        except StoppedError:
            return []

    def answer(
        self, job: Job, held: list[Decoded], runs: Runs, refined: list[Answer], then: Callable[[Answer], T]
    ) -> T:
        """held: the image, which is taken out of it, as are the `runs`: this thread gives their arrays back.

        To unmap megabytes takes milliseconds, which the event loop does not have.
        """
        try:
            job.check_time()
            answer = refined.pop() if refined else self._unrefined(job, held[0], runs)
            window = self.windows.of(job.model)
            if window is not None:
                window.add(held[0].prepared, answer.result.scores)
            job.check_time()
            return then(answer)
        finally:
            held.clear()
            runs.clear()

    def encode(self, job: Job, encode: Callable[[U], T], answered: U) -> T:
        started = monotonic()
        encoded = encode(answered)
        self._end(job, "encode", started)
        return encoded

    def _unrefined(self, job: Job, decoded: Decoded, runs: Runs) -> Answer:
        """Of a request that is to be refined: what it would get with refine="none", and the mark that says so."""
        answer = self._finish(replace(job, request=job.request.unrefined()), decoded, runs)
        return replace(answer, result=replace(answer.result, refinement_cut_short=job.request.refines))

    def _finish(self, job: Job, decoded: Decoded, runs: Runs, check: Check = go_on) -> Answer:
        started = monotonic()
        result = _result(job, decoded, {graph: run.output for graph, run in runs.items()}, check)
        check()  # not counted when nobody takes it
        seconds = {
            "queue": sum(run.queue_s for run in runs.values()),
            "decode": decoded.seconds,
            "infer": sum(run.infer_s for run in runs.values()),
            "postprocess": self._end(job, "postprocess", started),
        }
        most = most_of(job.model, decoded.prepared.shape, self._max_batch)
        return Answer(result, seconds, min(run.batch_size for run in runs.values()), most, self._max_delay_s)

    def _end(self, job: Job, stage: str, started: float) -> float:
        """The seconds that a stage took, which ends now."""
        seconds = monotonic() - started
        self._observe(job, stage, seconds)
        if job.trace is not None:
            job.trace.stage(stage, started, seconds)
        return seconds

    def _observe(self, job: Job, stage: str, seconds: float) -> None:
        exemplar = None if job.trace is None else job.trace.exemplar
        self._metrics.of_stage(stage).observe(seconds, exemplar)
        if stage != "queue":
            self._admission.worked(seconds)


def most_of(model: Model, shape: tuple[int, ...], max_batch: int) -> int:
    """Images of this (height, width, ...) in a batch: on a CPU, large ones are faster one by one."""
    if model.runner.provider != ON_CPU:
        return max_batch
    return max(1, min(CPU_BATCH_PIXELS // (shape[0] * shape[1]), max_batch))


def run_graph(run: Callable[[NDArray[np.uint8]], Arrays], images: list[NDArray[np.uint8]]) -> list[Arrays]:
    """(H, W, 3) each through a graph together: stack, run, take apart. Slices are copied, or each would keep them all.

    Raises:
        ValueError: an output that is not of so many images. What `run` raises.
    """
    outputs = run(images[0][None] if len(images) == 1 else np.stack(images))
    for name, array in outputs.items():
        if len(array) != len(images):
            raise ValueError(f"expected output {name} of {len(images)} images, got one of shape {array.shape}")
    if len(images) == 1:
        return [{name: array[0] for name, array in outputs.items()}]
    return [{name: array[i].copy() for name, array in outputs.items()} for i in range(len(images))]


def _seen(job: Job, size: tuple[int, int], bytes_per_pixel: int) -> Seen:
    shape = fitted_size(*size, job.model.manifest.input)  # refuses what `decode` would refuse later
    return Seen(size[0] * size[1] * bytes_per_pixel, shape)


def _result(job: Job, decoded: Decoded, outputs: GraphOutputs, check: Check) -> Result:
    """`Model.finish`, its errors as a client should see them."""
    try:
        return job.model.finish(decoded, outputs, job.request, check)
    except ModelFailedError as error:
        raise ModelRunError(str(error)) from error
    except (ServiceError, DataError):
        raise
    except WeaksegError as error:  # a package is not installed, or the manifest asks for what cannot be
        raise OutputUnsupportedError(f"this server cannot compute {', '.join(job.request.outputs)}: {error}") from error
