"""What the clients of weakseg/client.py remember: their model, and the order of a stream. No channel in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

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

    def forget(self) -> bool:
        """Whether there was something to forget, and another version may be there to learn about."""
        known, self.info = self.info, None
        return known is not None and not self.ref.version

    def check(self, response: pb.SegmentResponse, info: ModelInfo) -> ModelInfo:
        """`info`, unless the model that answered is another one under the same name and version."""
        if response.model_sha256 != info.sha256:
            self.info = None
            raise ServiceError(f"model {info.id} was replaced on the server in the meantime: send the image again")
        return info


class StreamOrder:
    """Results of a stream put back into the order of their images. Requests and responses may be in two threads.

    At most `in_flight` images are under way or wait for their turn: the caller takes a slot for each, and gets it back
    when the image has had its turn.
    """

    def __init__(self, in_flight: int, on_error: OnError) -> None:
        if in_flight < 1:
            raise ConfigError(f"in_flight must be at least 1, got {in_flight}")
        if on_error not in ("raise", "return"):
            raise ConfigError(f"on_error must be 'raise' or 'return', got {on_error!r}")
        self._on_error = on_error
        self._n_images = 0
        self._images: dict[int, Outgoing] = {}
        self._settled: dict[int, Result | WeaksegError] = {}
        self._never_sent: set[int] = set()
        self._turn = 0

    def request(self, image: Source, info: ModelInfo, options: SegmentOptions) -> pb.SegmentStreamRequest | None:
        """The message of the next image; None = it failed already, keeps no slot, and takes its turn as an error."""
        index = self._n_images
        self._n_images += 1
        try:
            outgoing = outgoing_from_source(image, ignore_orientation=options.get("ignore_orientation", False))
            message = segment_request(outgoing, info, options, str(index))
        except WeaksegError as error:
            self._never_sent.add(index)
            self._settled[index] = error
            return None
        self._images[index] = outgoing
        return pb.SegmentStreamRequest(request=message)

    def settle(self, response: pb.SegmentStreamResponse, known: KnownModel, info: ModelInfo) -> None:
        index = int(response.request_id)
        outgoing = self._images.pop(index)
        try:
            if response.HasField("error"):
                raise error_from_status(response.error)
            known.check(response.response, info)
            self._settled[index] = result_from_response(response.response, info, outgoing)
        except WeaksegError as error:
            self._settled[index] = error

    def in_turn(self, release: Callable[[], None]) -> Iterator[Result | WeaksegError]:
        """What is settled and next; `release` gives a slot back."""
        while self._turn in self._settled:
            settled = self._settled.pop(self._turn)
            if self._turn not in self._never_sent:
                release()
            self._turn += 1
            if isinstance(settled, WeaksegError) and self._on_error == "raise":
                raise settled
            yield settled
