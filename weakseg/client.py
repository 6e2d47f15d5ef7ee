"""Typed gRPC client: images in, `Result`s out, errors of weakseg/errors.py.

    with Client("localhost:8500") as client:
        client.segment("cat.jpg").save("cat-mask.png")
        for result in client.segment_many(["a.jpg", "b.jpg"], outputs=("segmentation", "cam")):
            print(result)

`Client` may be used from several threads, `AsyncClient` from one event loop. Both keep to the version of the model that
they met first until the server no longer has it.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, Unpack, overload

import grpc

from weakseg.channel import AccessOptions, Patience, channel_options, credentials, metadata, trace_metadata
from weakseg.client_state import Failed, KnownModel, OnError, StreamOrder
from weakseg.errors import ModelNotFoundError, WeaksegError
from weakseg.model import Source
from weakseg.result import Result
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc
from weakseg.wire import (
    ModelInfo,
    SegmentOptions,
    info_from_message,
    outgoing_from_source,
    result_from_response,
    segment_request,
)
from weakseg.wire_errors import error_from_rpc

TIMEOUT_S = 30.0
MAX_MESSAGE_BYTES = 32 * 2**20

# Of a stream: an answer, an image that was never sent, an error that ends it; None = no more answers.
Event = pb.SegmentStreamResponse | Failed | Exception | None


class Client:
    """A connection to a server. Opening it does not wait; the first call does.

    A call is tried again when no server could be reached, and when one was busy and said for how long; an image of a
    stream is not, but its error says the same.

    Args:
        target: "host:port", or any gRPC name: "dns:///weakseg:8500" is balanced over all its addresses.
        model: "name", "name/version" or "name/label"; None = the only model there is. Without a version it is the one
            labelled "stable", or else the newest.
        timeout_s: for each call, retries included; streams have none.
        max_message_bytes: largest request and response; the server has its own, `ModelInfo.max_message_bytes`.
        access: TLS and tokens, see `weakseg.channel.AccessOptions`.
    """

    def __init__(
        self,
        target: str,
        *,
        model: str | None = None,
        timeout_s: float = TIMEOUT_S,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        **access: Unpack[AccessOptions],
    ) -> None:
        self.target = target
        self.timeout_s = timeout_s
        self._known = KnownModel(model)
        secret, options = credentials(access), channel_options(max_message_bytes)
        self._metadata = metadata(access, target, encrypted=secret is not None)
        self._channel = (
            grpc.secure_channel(target, secret, options) if secret else grpc.insecure_channel(target, options)
        )
        self._stub = pb_grpc.SegmentationServiceStub(self._channel)

    def segment(
        self, image: Source, *, timeout_s: float | None = None, request_id: str = "", **options: Unpack[SegmentOptions]
    ) -> Result:
        """Segment one image.

        Args:
            image: a path, the bytes of an image file, a Pillow image, or (H, W, 3) RGB or (H, W) grey uint8.
            timeout_s: for this call.
            request_id: goes into the server's log.
            options: see `weakseg.wire.SegmentOptions`.
        Raises:
            ImageError, UnknownClassError, ServiceError and others of weakseg/errors.py.
        """
        outgoing = outgoing_from_source(image, ignore_orientation=options.get("ignore_orientation", False))

        def ask(info: ModelInfo) -> Result:
            request = segment_request(outgoing, info, options, request_id)
            response = self._call(self._stub.Segment, request, timeout_s)
            return result_from_response(response, self._known.check(response, info), outgoing)

        patience = Patience(self.timeout_s if timeout_s is None else timeout_s)
        while True:
            info = self._info()
            try:
                return ask(info)
            except ModelNotFoundError as error:
                if not self._known.may_move(info):
                    raise
                time.sleep(patience.pause_s(error))

    @overload
    def segment_many(
        self, images: Iterable[Source], *, in_flight: int = 8, **options: Unpack[SegmentOptions]
    ) -> Iterator[Result]: ...
    @overload
    def segment_many(
        self,
        images: Iterable[Source],
        *,
        in_flight: int = 8,
        on_error: Literal["return"],
        **options: Unpack[SegmentOptions],
    ) -> Iterator[Result | WeaksegError]: ...
    def segment_many(
        self,
        images: Iterable[Source],
        *,
        in_flight: int = 8,
        on_error: OnError = "raise",
        **options: Unpack[SegmentOptions],
    ) -> Iterator[Result | WeaksegError]:
        """Results of many images in their order, over one stream that keeps `in_flight` of them under way.

        `images` is read lazily, from another thread; what it raises is raised here. An image that fails raises its
        error or, with on_error="return", stands as an error among the results. A connection that breaks always raises.
        """
        return self._stream(images, StreamOrder(in_flight, on_error), options)

    def segment_unordered(
        self, images: Iterable[Source], *, in_flight: int = 8, **options: Unpack[SegmentOptions]
    ) -> Iterator[tuple[int, Result | WeaksegError]]:
        """`segment_many` without order: (index of an image, its result or error), no one waiting for a slower one."""
        return self._stream(images, StreamOrder(in_flight, "return", ordered=False), options)

    def model(self) -> ModelInfo:
        """The model that this client asks, as the server describes it now."""
        return info_from_message(self._call(self._stub.GetModel, pb.GetModelRequest(model=self._known.ref), None).model)

    def models(self) -> list[ModelInfo]:
        """All models of the server, ready or not."""
        found: list[ModelInfo] = []
        request = pb.ListModelsRequest()
        while True:
            page = self._call(self._stub.ListModels, request, None)
            found += map(info_from_message, page.models)
            if not page.next_page_token:
                return found
            request = pb.ListModelsRequest(page_token=page.next_page_token)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, images: Iterable[Source], order: StreamOrder, options: SegmentOptions) -> Iterator[Any]:
        """gRPC's thread reads images, one of ours the responses, and the caller takes what came of either."""
        slots, closed = threading.Semaphore(order.in_flight), threading.Event()
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        info = self._info()

        def requests() -> Iterator[pb.SegmentStreamRequest]:
            try:
                for image in images:
                    slots.acquire()
                    if closed.is_set():
                        return
                    request = order.request(image, info, options)
                    if isinstance(request, tuple):
                        events.put(request)
                    else:
                        yield request
            except Exception as error:
                events.put(error)

        def receive() -> None:
            try:
                for response in call:
                    events.put(response)
                events.put(None)
            except Exception as error:
                events.put(error)

        call = self._stub.SegmentStream(requests(), metadata=(*self._metadata, *trace_metadata()))
        threading.Thread(target=receive, daemon=True).start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, grpc.RpcError):
                    raise error_from_rpc(event, self.target) from event
                if isinstance(event, Exception):
                    raise event
                order.settle(event, self._known, info)
                yield from order.in_turn(slots.release)
        finally:
            closed.set()
            slots.release()  # the thread that reads images may wait for one
            call.cancel()  # type: ignore[no-untyped-call]

    def _info(self) -> ModelInfo:
        return self._known.info or self._known.learn(self.model())

    def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        patience = Patience(self.timeout_s if timeout_s is None else timeout_s)
        sent = (*self._metadata, *trace_metadata())
        while True:
            try:
                return method(request, timeout=patience.left_s, metadata=sent)
            except grpc.RpcError as error:
                time.sleep(patience.wait_s(error_from_rpc(error, self.target), error))


class AsyncClient:
    """`Client` for asyncio: the same arguments, methods and errors. Images are read and results decoded in threads."""

    def __init__(
        self,
        target: str,
        *,
        model: str | None = None,
        timeout_s: float = TIMEOUT_S,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        **access: Unpack[AccessOptions],
    ) -> None:
        self.target = target
        self.timeout_s = timeout_s
        self._known = KnownModel(model)
        secret, options = credentials(access), channel_options(max_message_bytes)
        self._metadata = metadata(access, target, encrypted=secret is not None)
        self._channel = (
            grpc.aio.secure_channel(target, secret, options) if secret else grpc.aio.insecure_channel(target, options)
        )
        self._stub: Any = pb_grpc.SegmentationServiceStub(self._channel)

    async def segment(
        self, image: Source, *, timeout_s: float | None = None, request_id: str = "", **options: Unpack[SegmentOptions]
    ) -> Result:
        """Segment one image; see `Client.segment`."""
        ignore = options.get("ignore_orientation", False)
        outgoing = await asyncio.to_thread(outgoing_from_source, image, ignore_orientation=ignore)

        async def ask(info: ModelInfo) -> Result:
            request = segment_request(outgoing, info, options, request_id)
            response = await self._call(self._stub.Segment, request, timeout_s)
            return await asyncio.to_thread(result_from_response, response, self._known.check(response, info), outgoing)

        patience = Patience(self.timeout_s if timeout_s is None else timeout_s)
        while True:
            info = await self._info()
            try:
                return await ask(info)
            except ModelNotFoundError as error:
                if not self._known.may_move(info):
                    raise
                await asyncio.sleep(patience.pause_s(error))

    @overload
    def segment_many(
        self, images: Iterable[Source], *, in_flight: int = 8, **options: Unpack[SegmentOptions]
    ) -> AsyncIterator[Result]: ...
    @overload
    def segment_many(
        self,
        images: Iterable[Source],
        *,
        in_flight: int = 8,
        on_error: Literal["return"],
        **options: Unpack[SegmentOptions],
    ) -> AsyncIterator[Result | WeaksegError]: ...
    def segment_many(
        self,
        images: Iterable[Source],
        *,
        in_flight: int = 8,
        on_error: OnError = "raise",
        **options: Unpack[SegmentOptions],
    ) -> AsyncIterator[Result | WeaksegError]:
        """Results of many images in their order; see `Client.segment_many`."""
        return self._stream(images, StreamOrder(in_flight, on_error), options)

    def segment_unordered(
        self, images: Iterable[Source], *, in_flight: int = 8, **options: Unpack[SegmentOptions]
    ) -> AsyncIterator[tuple[int, Result | WeaksegError]]:
        """(index of the image, its result or error) as they come; see `Client.segment_unordered`."""
        return self._stream(images, StreamOrder(in_flight, "return", ordered=False), options)

    async def model(self) -> ModelInfo:
        """The model that this client asks, as the server describes it now."""
        response = await self._call(self._stub.GetModel, pb.GetModelRequest(model=self._known.ref), None)
        return info_from_message(response.model)

    async def models(self) -> list[ModelInfo]:
        """All models of the server, ready or not."""
        found: list[ModelInfo] = []
        request = pb.ListModelsRequest()
        while True:
            page = await self._call(self._stub.ListModels, request, None)
            found += map(info_from_message, page.models)
            if not page.next_page_token:
                return found
            request = pb.ListModelsRequest(page_token=page.next_page_token)

    async def close(self) -> None:
        await self._channel.close(None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _stream(
        self, images: Iterable[Source], order: StreamOrder, options: SegmentOptions
    ) -> AsyncIterator[Any]:
        slots = asyncio.Semaphore(order.in_flight)
        events: asyncio.Queue[Event] = asyncio.Queue()
        info = await self._info()

        async def requests() -> AsyncIterator[pb.SegmentStreamRequest]:
            try:
                for image in images:
                    await slots.acquire()
                    request = await asyncio.to_thread(order.request, image, info, options)
                    if isinstance(request, tuple):
                        events.put_nowait(request)
                    else:
                        yield request
            except Exception as error:
                events.put_nowait(error)

        async def receive() -> None:
            try:
                async for response in call:
                    events.put_nowait(response)
                events.put_nowait(None)
            except Exception as error:
                events.put_nowait(error)

        call = self._stub.SegmentStream(requests(), metadata=(*self._metadata, *trace_metadata()))
        receiving = asyncio.create_task(receive())
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, grpc.RpcError):
                    raise error_from_rpc(event, self.target) from event
                if isinstance(event, Exception):
                    raise event
                await asyncio.to_thread(order.settle, event, self._known, info)
                for result in order.in_turn(slots.release):
                    yield result
        finally:
            call.cancel()
            receiving.cancel()

    async def _info(self) -> ModelInfo:
        return self._known.info or self._known.learn(await self.model())

    async def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        patience = Patience(self.timeout_s if timeout_s is None else timeout_s)
        sent = (*self._metadata, *trace_metadata())
        while True:
            try:
                return await method(request, timeout=patience.left_s, metadata=sent)
            except grpc.RpcError as error:
                await asyncio.sleep(patience.wait_s(error_from_rpc(error, self.target), error))
