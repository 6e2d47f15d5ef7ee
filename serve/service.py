"""weakseg.v1.SegmentationService: from messages to the pipeline and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import timestamp_pb2

from serve.cache import ResponseCache
from serve.calls import Call, Context, call_of, counted
from serve.encode import KIND_NAMES, REFINEMENTS, class_infos, drift_message, response_from_answer
from serve.interceptors import SERVICE, let_go, model_name, status_from_error
from serve.job import Job
from serve.metrics import Metrics
from serve.models import Entry, Models
from serve.parsing import MESSAGE_BYTES
from serve.pipeline import QUICK_BYTES, Pipeline
from serve.requests import (
    MAX_PAGE_TOKEN,
    PRIORITY_NAMES,
    check_request,
    image_from_message,
    page_size,
    request_from_message,
)
from serve.settings import ServeConfig
from weakseg.bundle import Order, natural_order
from weakseg.errors import InvalidRequestError, QueueFullError
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

if TYPE_CHECKING:  # an extra
    from serve.tracing import Tracing


class SegmentationService(pb_grpc.SegmentationServiceServicer):
    """The four methods. Errors leave them as exceptions; serve/interceptors.py makes status codes of them."""

    def __init__(
        self,
        config: ServeConfig,
        models: Models,
        pipeline: Pipeline,
        metrics: Metrics,
        tracing: Tracing | None = None,
    ) -> None:
        self._config = config
        self._models = models
        self._pipeline = pipeline
        self._metrics = metrics
        self._tracing = tracing
        self._cache = ResponseCache(config.cache_mib * 2**20, metrics) if config.cache_mib else None

    async def Segment(self, request: pb.SegmentRequest, context: Context) -> pb.SegmentResponse:  # noqa: N802
        response, size = await self._segment(request, call_of(f"{SERVICE}/Segment", context))
        self._pipeline.admission.unread.until_sent(size, context)
        return response

    # A coroutine that writes, where the stubs expect a generator: so its tasks end before it does.
    async def SegmentStream(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[pb.SegmentStreamRequest], context: Context
    ) -> None:
        call = call_of(f"{SERVICE}/SegmentStream", context)
        slots = asyncio.Semaphore(self._config.stream_in_flight)
        writing = asyncio.Lock()
        gone = False

        async def answer(asked: list[pb.SegmentRequest]) -> None:
            nonlocal gone
            try:
                response, size = await self._stream_response(asked.pop(), call)
                with self._pipeline.admission.unread.holding(size):
                    async with writing:
                        await context.write(response)
            except grpc.aio.BaseError:  # there is nobody to write to; gRPC is about to cancel this call
                gone = True
            finally:
                slots.release()  # only now: a client that does not read stops the reading of its requests

        ended: InvalidRequestError | QueueFullError | None = None
        async with asyncio.TaskGroup() as tasks:
            try:
                async for item in request_iterator:
                    await slots.acquire()
                    tasks.create_task(answer([item.request]))
                    del item  # its answer, or the next one, may be long in coming
            except (InvalidRequestError, QueueFullError) as error:  # raised below: those before it are answered first
                ended = error
        if gone:  # the end of its requests may have come before the cancellation
            raise asyncio.CancelledError
        if ended is not None:
            raise ended

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: ARG002, N802
        entry = self._models.get(request.model.name, request.model.version)
        message, model = self._describe(entry), entry.model
        window = None if model is None else self._pipeline.steps.windows.of(model)
        if window is not None:
            message.drift.CopyFrom(drift_message(await asyncio.to_thread(window.drift)))
        return pb.GetModelResponse(model=message)

    async def ListModels(  # noqa: N802
        self,
        request: pb.ListModelsRequest,
        context: Context,  # noqa: ARG002
    ) -> pb.ListModelsResponse:
        size = page_size(request)
        entries = self._models.entries()
        if request.page_token:
            after = _position(request.page_token)
            entries = [entry for entry in entries if (entry.name, natural_order(entry.version)) > after]
        page = entries[:size]
        token = f"{page[-1].name}/{page[-1].version}" if len(entries) > size else ""
        return pb.ListModelsResponse(models=map(self._describe, page), next_page_token=token)

    async def _stream_response(self, request: pb.SegmentRequest, call: Call) -> tuple[pb.SegmentStreamResponse, int]:
        try:
            response, size = await self._segment(request, call)
        except Exception as error:  # the stream goes on: this one image failed
            status = status_from_error(error, model_name(request.model))
            let_go(error)
            return pb.SegmentStreamResponse(request_id=request.request_id, error=status), 0
        return pb.SegmentStreamResponse(request_id=request.request_id, response=response), size

    async def _segment(self, request: pb.SegmentRequest, call: Call) -> tuple[pb.SegmentResponse, int]:
        """One image, counted, traced and logged; the response and its size."""
        with counted(self._metrics, call, request_id=request.request_id, tracing=self._tracing) as outcome:
            check_request(request, self._config.max_pixels)
            outcome.priority = PRIORITY_NAMES[request.priority]
            asked = request.model
            with self._models.use(asked.name, asked.version, request.request_id) as (entry, model):
                outcome.model = (entry.name, entry.version)
                image = partial(image_from_message, request.image)
                job = Job(
                    entry.name,
                    entry.version,
                    model,
                    image() if MESSAGE_BYTES.get() <= QUICK_BYTES else image,
                    request_from_message(request, model),
                    size=_raw_size(request.image),
                    deadline=call.deadline,
                    reduced_decoding=request.image.reduced_decoding,
                    ignore_orientation=request.image.ignore_orientation,
                    priority=outcome.priority,
                    trace=outcome.trace,
                )
                response, size = await self._answer(job, request)
                outcome.response_bytes = size
            outcome.fields = {"width": response.image_width, "height": response.image_height}
            if self._cache is not None:
                outcome.fields["cached"] = response.cached
            outcome.fields |= _timing_fields(response.timing)
        return response, size

    async def _answer(self, job: Job, request: pb.SegmentRequest) -> tuple[pb.SegmentResponse, int]:
        """The response to a valid request and its size, from the cache or the pipeline."""
        limit_bytes = self._config.max_message_bytes
        encode = partial(response_from_answer, request=request, limit_bytes=limit_bytes)
        if self._cache is None:
            return await self._pipeline.segment(job, encode)
        key, known = await asyncio.to_thread(self._cache.find, request, job.model.bundle.sha256)
        if known is None or known[1] > limit_bytes:  # of this request's longer id
            return await self._pipeline.segment(job, partial(self._cache.keeping, key, encode))
        self._pipeline.admission.known()
        return known

    def _describe(self, entry: Entry) -> pb.Model:
        message = pb.Model(
            ref=pb.ModelRef(name=entry.name, version=entry.version),
            state=pb.ModelState.ValueType(entry.state.value),
            failure=entry.failure,
            labels=self._models.labels_of(entry),
            max_batch_size=self._config.max_batch,
            max_image_pixels=self._config.max_pixels,
            max_message_bytes=self._config.max_message_bytes,
        )
        if entry.model is not None and entry.loaded_at is not None:
            manifest = entry.model.manifest
            kinds = {name: kind for kind, name in KIND_NAMES.items()}
            loaded_at = timestamp_pb2.Timestamp()
            loaded_at.FromDatetime(entry.loaded_at)
            message.MergeFrom(
                pb.Model(
                    sha256=entry.model.bundle.sha256,
                    classes=class_infos(manifest.classes, manifest.palette),
                    output_kinds=[pb.OutputKind.ValueType(kinds[name]) for name in manifest.outputs],
                    execution_provider=entry.model.runner.provider,
                    loaded_at=loaded_at,
                    max_side=manifest.input.max_side,
                    refuses_larger=manifest.input.policy == "refuse",
                    presence_threshold=manifest.presence,
                    refinements=[REFINEMENTS[name] for name in entry.model.refinements],
                )
            )
        return message


def _raw_size(image: pb.Image) -> tuple[int, int] | None:
    return (image.raw.height, image.raw.width) if image.WhichOneof("source") == "raw" else None


def _position(token: str) -> tuple[str, Order]:
    name, slash, version = token.partition("/")
    if not slash or len(token) > MAX_PAGE_TOKEN:
        raise InvalidRequestError(f"expected the next_page_token of an earlier page, got {token!r}", "page_token")
    return name, natural_order(version)


def _timing_fields(timing: pb.Timing) -> dict[str, Any]:
    stages = ("queue", "decode", "infer", "postprocess", "encode")
    fields: dict[str, Any] = {f"{stage}_ms": getattr(timing, stage).ToMicroseconds() / 1000 for stage in stages}
    return fields | {"batch_size": timing.batch_size}
