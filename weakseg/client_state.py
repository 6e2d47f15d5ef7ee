"""What the clients of weakseg/client.py remember: their model, and the order of a stream. No channel in here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, Literal

from weakseg.errors import ConfigError, ModelFailedError, ModelLoadingError, ServiceError, WeaksegError
from weakseg.model import Source
from weakseg.result import Result
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.wire import (
    ModelInfo,
    Outgoing,
    SegmentOptions,
    outgoing_from_source,
    result_from_response,
    segment_request,
)
from weakseg.wire_errors import error_from_status

OnError = Literal["raise", "return"]
Failed = tuple[int, WeaksegError]  # an image, by its index, that was never sent


class KnownModel:
    """What a client knows about its model: class ids are only meaningful beside its class table."""

    def __init__(self, model: str | None) -> None:
        name, _, version = (model or "").partition("/")
        self.ref = pb.ModelRef(name=name, version=version)
        self.info: ModelInfo | None = None

    def learn(self, info: ModelInfo) -> ModelInfo:
        """Raises ModelLoadingError or ModelFailedError where the model cannot answer."""
        if info.state == "loading":
            raise ModelLoadingError(f"model {info.id} is being loaded: try again in a moment")
        if info.state != "ready":
            raise ModelFailedError(f"model {info.id} cannot answer: {info.failure or info.state}")
        self.info = info
        return info

    def may_move(self, info: ModelInfo) -> bool:
        """Of a call whose version was not there: whether to ask once more, where none was asked for, or a label.

        The version may be gone, and another is to be learnt about. Or it is on other servers behind the name: while
        they are updated one by one, some have it and some the next. By chance which is assumed: calls reach servers in
        turns, and any fixed order of asking could keep step with them.
        """
        if self.info is info and random.random() < 0.5:  # else another call has forgotten it, or learnt of the next
            self.info = None
        return info.version != self.ref.version

    def check(self, response: pb.SegmentResponse, info: ModelInfo) -> ModelInfo:
        """`info`, unless the model that answered is another one under the same name and version."""
        if response.model_sha256 != info.sha256:
            self.info = None
            raise ServiceError(f"model {info.id} was replaced on the server in the meantime: send the image again")
        return info


class StreamOrder:
    """Results of a stream put back into the order of their images, or given as they come with the image's index.

    At most `in_flight` images are under way or wait for their turn: the caller takes a slot for each, and gets it back
    when the image has had its turn. `request` may be called in another thread than the rest.
    """

    def __init__(self, in_flight: int, on_error: OnError, *, ordered: bool = True) -> None:
        if in_flight < 1:
            raise ConfigError(f"in_flight must be at least 1, got {in_flight}")
        if on_error not in ("raise", "return"):
            raise ConfigError(f"on_error must be 'raise' or 'return', got {on_error!r}")
        self.in_flight = in_flight
        self._on_error = on_error
        self._ordered = ordered
        self._n_images = 0
        self._images: dict[int, Outgoing] = {}
        self._settled: dict[int, Result | WeaksegError] = {}
        self._turn = 0

    def request(self, image: Source, info: ModelInfo, options: SegmentOptions) -> pb.SegmentStreamRequest | Failed:
        """The message of the next image, unless it has failed already: that is to be settled."""
        index = self._n_images
        self._n_images += 1
        try:
            outgoing = outgoing_from_source(image, ignore_orientation=options.get("ignore_orientation", False))
            message = segment_request(outgoing, info, options, str(index))
        except WeaksegError as error:
            return index, _bare(error)
        self._images[index] = outgoing
        return pb.SegmentStreamRequest(request=message)

    def settle(self, came: pb.SegmentStreamResponse | Failed, known: KnownModel, info: ModelInfo) -> None:
        if isinstance(came, tuple):
            index, error = came
            self._settled[index] = error
            return
        index = int(came.request_id)
        outgoing = self._images.pop(index)
        try:
            if came.HasField("error"):
                raise error_from_status(came.error)
            known.check(came.response, info)
            self._settled[index] = result_from_response(came.response, info, outgoing)
        except WeaksegError as error:
            self._settled[index] = _bare(error)

    def in_turn(self, release: Callable[[], None]) -> Iterator[Any]:
        """What is settled and next, without order as (index, result); `release` gives a slot back."""
        while self._settled:
            index = self._turn if self._ordered else next(iter(self._settled))
            if index not in self._settled:
                return
            settled = self._settled.pop(index)
            self._turn += 1
            release()
            if isinstance(settled, WeaksegError) and self._on_error == "raise":
                raise settled
            yield settled if self._ordered else (index, settled)


def _bare(error: WeaksegError) -> WeaksegError:
    """Without the frames that it came through: they hold an image, and who collects errors would collect images."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error
