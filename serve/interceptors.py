"""The edge of every call: errors become status codes, calls are counted and timed.

This holds the one table from the classes of weakseg/errors.py to status codes. An error that is not in it is a fault of
ours: INTERNAL with a fixed text and an id; its trace goes to the log under that id and never to the client.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from time import monotonic
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.descriptor import Descriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from serve.access import ADMIN_SERVICE, CLIENT, Access
from serve.idle import Idle
from serve.logs import AUDIT
from serve.metrics import Metrics
from serve.parsing import Unreadable, deserializer, readable
from weakseg import errors

DOMAIN = "weakseg"
SERVICE = "weakseg.v1.SegmentationService"
INFERENCE_SERVICE = "inference.GRPCInferenceService"
SERVICES = (SERVICE, INFERENCE_SERVICE)  # ours; a drain waits for their calls

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # what a read gives when there is no more; the stubs lack it

# Of a text that may quote the client. A status has it up to three times, and gRPC takes 8 KiB of trailers.
MAX_TOLD_BYTES = 1000

log = logging.getLogger("serve.errors")
calls = logging.getLogger("serve.calls")
audit = logging.getLogger(AUDIT)


@dataclass(frozen=True)
class Row:
    """How a class of errors is told: `retry_s` becomes RetryInfo, `field` BadRequest, `resource` ResourceInfo."""

    code: grpc.StatusCode
    retry_s: float | None = None  # used when the error says nothing more exact
    field: str | None = None  # path used when the error names none
    resource: bool = False


TABLE: dict[type[errors.WeaksegError], Row] = {
    errors.InvalidRequestError: Row(grpc.StatusCode.INVALID_ARGUMENT, field=""),
    errors.UnknownClassError: Row(grpc.StatusCode.INVALID_ARGUMENT, field=""),
    errors.ImageError: Row(grpc.StatusCode.INVALID_ARGUMENT, field="image"),
    errors.ModelNotFoundError: Row(grpc.StatusCode.NOT_FOUND, resource=True),
    errors.ModelFailedError: Row(grpc.StatusCode.FAILED_PRECONDITION, resource=True),
    errors.ModelNeededError: Row(grpc.StatusCode.FAILED_PRECONDITION),
    errors.FoldersUnreadableError: Row(grpc.StatusCode.FAILED_PRECONDITION),
    errors.ModelUnhealthyError: Row(grpc.StatusCode.UNAVAILABLE, retry_s=1.0),
    errors.OutputUnsupportedError: Row(grpc.StatusCode.FAILED_PRECONDITION),
    errors.ModelLoadingError: Row(grpc.StatusCode.UNAVAILABLE, retry_s=1.0),
    errors.DrainingError: Row(grpc.StatusCode.UNAVAILABLE, retry_s=0.5),
    errors.QueueFullError: Row(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_s=0.25),
    errors.OutOfMemoryError: Row(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_s=1.0),
    errors.ResponseTooLargeError: Row(grpc.StatusCode.RESOURCE_EXHAUSTED),
    errors.DeadlineTooShortError: Row(grpc.StatusCode.DEADLINE_EXCEEDED),
    errors.UnauthenticatedError: Row(grpc.StatusCode.UNAUTHENTICATED),
    errors.PermissionDeniedError: Row(grpc.StatusCode.PERMISSION_DENIED),
    errors.RateLimitedError: Row(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_s=1.0),
}
# The one class whose code depends on its reason: a limit of the server, not a fault of the file.
IMAGE_TOO_LARGE = Row(grpc.StatusCode.RESOURCE_EXHAUSTED)


def status_from_error(error: Exception, resource: str = "") -> status_pb2.Status:
    """google.rpc.Status of any error; what is not in TABLE is logged here with its trace.

    `resource` names the model that was asked for, `name/version`.
    """
    row = row_from_error(error)
    if row is None:
        return _internal_status(error)
    assert isinstance(error, errors.WeaksegError)
    message = _told(str(error))
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if row.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=getattr(error, "field", "") or row.field, description=message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if row.retry_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round((getattr(error, "retry_s", None) or row.retry_s) * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if row.resource:
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type="weakseg.v1.Model", resource_name=_told(resource), description=message
            )
        )
    return _status(row.code, message, details)


def row_from_error(error: BaseException) -> Row | None:
    """The row of the nearest class; None = INTERNAL."""
    if isinstance(error, errors.ImageError) and error.reason == "IMAGE_TOO_LARGE":
        return IMAGE_TOO_LARGE
    return next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), None)


def code_from_error(error: BaseException) -> grpc.StatusCode:
    """The status code that an error ends a call with."""
    row = row_from_error(error)
    return row.code if row else grpc.StatusCode.INTERNAL


def code_of_cancellation(deadline_passed: bool) -> grpc.StatusCode:
    """A call ends early when its client went away, or when its time was up: the handler cannot tell from the error."""
    return grpc.StatusCode.DEADLINE_EXCEEDED if deadline_passed else grpc.StatusCode.CANCELLED


def _told(text: str) -> str:
    data = text.encode(errors="replace")
    return text if len(data) <= MAX_TOLD_BYTES else data[:MAX_TOLD_BYTES].decode(errors="ignore") + "…"


def _internal_status(error: Exception) -> status_pb2.Status:
    error_id = uuid.uuid4().hex[:12]
    log.error("internal error", exc_info=error, extra={"fields": {"error_id": error_id}})
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"error_id": error_id})
    return _status(grpc.StatusCode.INTERNAL, f"internal error {error_id}: the server's log says more", [info])


def _status(code: grpc.StatusCode, message: str, details: list[Message]) -> status_pb2.Status:
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


class Edge(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps the handlers of every service. `running` counts calls of ours, for a drain to wait on."""

    def __init__(self, metrics: Metrics, access: Access) -> None:
        self._metrics = metrics
        self._access = access
        self._handlers: dict[tuple[str, str], Any] = {}  # by method and caller, of methods that there are
        self._idle_calls = Idle()
        self.running = 0
        self.refusals = asyncio.Event()  # clear: calls that a drain refuses wait for their answer
        self.refusals.set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether no call of ours was running within the time."""
        if not self.running:  # with no time at all, `wait_for` would not even look
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # UNIMPLEMENTED, answered by gRPC
            return None
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        path = str(handler_call_details.method)
        try:
            caller = self._access.caller(path, _authorization(handler_call_details))
        except (errors.UnauthenticatedError, errors.PermissionDeniedError) as error:
            # As a stream, and this one reads no message.
            refuse = self._wrap(self._refusal(error, path), kind, path, "", stream=True)
            return grpc.stream_stream_rpc_method_handler(refuse)
        made = self._handlers.get((path, caller))
        if made is None:  # once: of a call that asks for little it would be a tenth of the work
            wrapped = self._wrap(getattr(handler, kind), kind, path, caller, handler.request_streaming)
            # As a stream of requests: gRPC calls a handler of one request only when that is there.
            make = getattr(grpc, f"stream_{kind.partition('_')[2]}_rpc_method_handler")
            made = make(wrapped, deserializer(path, handler.request_deserializer), handler.response_serializer)
            self._handlers[path, caller] = made
        return made

    def _refusal(self, error: errors.ServiceError, path: str) -> Any:
        async def refuse(request: Any, context: Any) -> None:  # noqa: ARG001
            fields = {"method": path, "peer": context.peer(), "reason": error.reason, "message": str(error)}
            audit.warning("denied", extra={"fields": fields})
            self._metrics.rejected.labels(error.reason).inc()
            raise error

        return refuse

    def _wrap(self, behaviour: Any, kind: str, path: str, caller: str, stream: bool) -> Any:
        # Both hand the request on and keep none: an AbortError holds these frames for as long as `let_go` says.
        async def call(_: Any, context: Any) -> Any:
            client = caller or address_of(context.peer())
            CLIENT.set(client)
            given = [self._messages(context, client) if stream else await self._message(context, client)]
            asked, said = _asked_model(given[0]), _audited(path, given[0])
            async with self._observe(kind, path, asked, context, said):
                return await behaviour(readable(given.pop()), context)

        async def generate(_: Any, context: Any) -> AsyncIterator[Any]:
            client = caller or address_of(context.peer())
            CLIENT.set(client)
            given = [self._messages(context, client) if stream else await self._message(context, client)]
            async with self._observe(kind, path, _asked_model(given[0]), context):
                responses = behaviour(readable(given.pop()), context)
                async for response in self._news(responses, client) if kind == "unary_stream" else responses:
                    yield response

        return generate if inspect.isasyncgenfunction(behaviour) else call

    async def _message(self, context: Any, client: str) -> Any:
        """The request of a call that has one; Unreadable where none comes."""
        try:
            message = await self._idle_calls.wait(context.read(), client)
        except errors.QueueFullError as error:
            return Unreadable(error)
        if message is EOF:
            return Unreadable(errors.InvalidRequestError("expected a message, got the end of the call"))
        return message

    async def _messages(self, context: Any, client: str) -> AsyncIterator[Any]:
        """The requests of a stream; raises QueueFullError, and what `readable` does."""
        while (message := await self._idle_calls.wait(context.read(), client)) is not EOF:
            given = [message]
            del message  # not held while the next one is waited for
            yield readable(given.pop())

    async def _news(self, responses: AsyncIterator[Any], client: str) -> AsyncIterator[Any]:
        """The responses of a call that watches something: nothing is done for it in between."""
        while (response := await self._idle_calls.wait(anext(responses, None), client)) is not None:
            yield response

    @asynccontextmanager
    async def _observe(
        self, kind: str, path: str, asked: str, context: Any, said: dict[str, Any] | None = None
    ) -> AsyncIterator[None]:
        service, method = path.strip("/").rsplit("/", 1)
        labels = (kind, service, method)
        started = monotonic()
        code = grpc.StatusCode.UNKNOWN
        self._metrics.of_started(*labels).inc()
        self._enter(service)
        try:
            yield
            code = grpc.StatusCode.OK
        except asyncio.CancelledError:
            remaining = context.time_remaining()
            code = code_of_cancellation(remaining is not None and remaining <= 0)
            raise
        except grpc.aio.AbortError:  # a handler that is not ours ended its call
            code = _code_from_int(context.code())
            raise
        except Exception as error:
            code = code_from_error(error)
            status = rpc_status.to_status(status_from_error(error, asked))
            let_go(error)
            if isinstance(error, errors.DrainingError):
                await self.refusals.wait()
            await context.abort(status.code, status.details, status.trailing_metadata)
        finally:
            self._leave(service)
            self._metrics.of_handled(*labels, code.name).inc()
            if service in SERVICES:  # how long somebody watched the health is no news
                self._metrics.of_seconds(*labels).observe(monotonic() - started)
            if said is not None or calls.isEnabledFor(logging.DEBUG):
                fields = {"method": path, "peer": context.peer(), "client": CLIENT.get(), "code": code.name}
                fields |= {"ms": round((monotonic() - started) * 1000, 2)}
                if said is not None:
                    audit.info("admin", extra={"fields": fields | said})
                else:
                    calls.debug("call", extra={"fields": fields})

    def _enter(self, service: str) -> None:
        if service in SERVICES:
            self.running += 1
            self._idle.clear()

    def _leave(self, service: str) -> None:
        if service in SERVICES:
            self.running -= 1
            if not self.running:
                self._idle.set()


def let_go(error: BaseException | None) -> None:
    """Drop what the frames of an error hold, such as a decoded image.

    The error itself lives on, until the garbage collector comes by: in a circle with the futures that told it, and the
    AbortError that follows in one with gRPC's call.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def address_of(peer: str) -> str:
    """gRPC's name of a peer without its port: ipv4:10.0.0.1:5000 -> ipv4:10.0.0.1."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer


def _authorization(details: grpc.HandlerCallDetails) -> str | None:
    values = [value for key, value in details.invocation_metadata or () if key == "authorization"]
    return str(values[0]) if values else None


def model_name(ref: Any) -> str:
    """`name/version` of a ModelRef, as far as it says."""
    return _joined(ref.name, ref.version)


def _joined(name: str, version: str) -> str:
    return "/".join(part for part in (name, version) if part)


def _asked_model(request: Any) -> str:
    """The model that a request of any of our methods names; a stream's request is an iterator, which names none."""
    return _reader(request.DESCRIPTOR)(request) if isinstance(request, Message) else ""


@cache  # what a message does not have, it takes long to say
def _reader(kind: Descriptor) -> Callable[[Any], str]:
    """What reads `name/version` from messages of a type; nothing from those that name no model."""
    fields = kind.fields_by_name
    if "model_name" in fields:
        return lambda request: _joined(request.model_name, request.model_version)
    if "model" in fields and fields["model"].message_type is not None:
        return lambda request: model_name(request.model)
    return model_name if "version" in fields else lambda _: ""


def _audited(path: str, request: Any) -> dict[str, Any] | None:
    """What the log says that an operator asked for; None of other calls, and of those that are denied."""
    if not path.startswith(f"/{ADMIN_SERVICE}/") or not isinstance(request, Message | Unreadable):
        return None
    return {"asked": {} if isinstance(request, Unreadable) else MessageToDict(request)}


def _code_from_int(value: Any) -> grpc.StatusCode:
    number = value if isinstance(value, int) else value.value[0]
    return next((code for code in grpc.StatusCode if code.value[0] == number), grpc.StatusCode.UNKNOWN)
