"""One image for one model, and what comes of it. No gRPC in here: all front ends make these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from time import monotonic
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from serve.lanes import Priority
from weakseg.errors import DeadlineTooShortError
from weakseg.model import Model, Request
from weakseg.result import Result

if TYPE_CHECKING:  # an extra
    from serve.tracing import Trace

Image: TypeAlias = "bytes | NDArray[np.uint8]"


@dataclass(frozen=True)
class Job:
    """One image for one model.

    name, version: of the model, for batch keys and metrics.
    image: a file in one of SERVICE_FORMATS, (H, W, 3) uint8 RGB, or what makes one of them in a thread.
    size: (height, width) of an image that is no file; None = the file says it.
    deadline: on the clock of `time.monotonic`; None = none.
    ignore_orientation, reduced_decoding: of a file, see `Model.segment`. priority: see `serve.batcher.Batcher`.
    """

    name: str
    version: str
    model: Model
    image: Image | Callable[[], Image]
    request: Request
    _: KW_ONLY
    size: tuple[int, int] | None = None
    deadline: float | None = None
    ignore_orientation: bool = False
    reduced_decoding: bool = False
    priority: Priority = "interactive"
    trace: Trace | None = None

    def load(self) -> Image:
        """The file or the pixels. In a thread: only to copy 30 MiB out of a message takes milliseconds."""
        return self.image() if callable(self.image) else self.image

    def check_time(self) -> None:
        """Raises DeadlineTooShortError when nobody waits any more; a step that takes time asks before it starts."""
        if self.deadline is not None and self.deadline <= monotonic():
            raise DeadlineTooShortError("the deadline passed before the answer was ready: allow more time")


@dataclass(frozen=True)
class Answer:
    """seconds: queue, decode, infer, postprocess. batch_size: of several graphs, the smallest.

    max_batch_size, max_batch_delay_s: what it might have been, and how long it might have been waited for.
    """

    result: Result
    seconds: dict[str, float]
    batch_size: int
    max_batch_size: int
    max_batch_delay_s: float


class ModelRunError(Exception):
    """A loaded model failed on a request: our fault, so not in the error table, so INTERNAL."""
