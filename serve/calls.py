"""What every front end does around a request for masks: its deadline, counts and trace, its line in the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

import grpc

from serve.interceptors import code_from_error, code_of_cancellation
from serve.lanes import Priority
from serve.metrics import Metrics
from serve.requests import MAX_REQUEST_ID
from weakseg.errors import WeaksegError

if TYPE_CHECKING:  # an extra
    from serve.tracing import Trace, Tracing

log = logging.getLogger("serve.requests")

Context = Any  # grpc.aio.ServicerContext; the stubs make it generic in ways that handlers are not


@dataclass(frozen=True)
class Call:
    """What a request came by: `service/method`, the deadline on the clock of `time.monotonic` (None = none)."""

    method: str
    deadline: float | None
    metadata: tuple[tuple[str, Any], ...]


@dataclass
class Outcome:
    """What a handler learns about its request on the way; `fields` and `response_bytes` once it is answered."""

    trace: Trace | None = None
    model: tuple[str, str] = ("", "")  # name, version
    n_images: int = 1
    priority: Priority = "interactive"
    fields: dict[str, Any] = field(default_factory=dict)
    response_bytes: int | None = None


def call_of(method: str, context: Context) -> Call:
    remaining: float | None = context.time_remaining()
    deadline = None if remaining is None else monotonic() + remaining
    return Call(method, deadline, tuple(context.invocation_metadata() or ()))


@contextmanager
def counted(metrics: Metrics, call: Call, *, request_id: str, tracing: Tracing | None) -> Iterator[Outcome]:
    """Around the work for one request: counts its images by outcome, traces it and writes its line to the log."""
    started = monotonic()
    outcome = Outcome(None if tracing is None else tracing.begin(call.method, call.metadata))
    failure: BaseException | None = None
    code = grpc.StatusCode.OK
    try:
        yield outcome
    except asyncio.CancelledError as error:
        failure, code = error, code_of_cancellation(call.deadline is not None and call.deadline <= monotonic())
        raise
    except Exception as error:
        failure, code = error, code_from_error(error)
        raise
    finally:
        seconds, reason = monotonic() - started, "" if failure is None else _reason(failure)
        _count(metrics, outcome, code, seconds, reason)
        _log(request_id, outcome, code, seconds, failure)
        if outcome.trace is not None:
            outcome.trace.end(code, _attributes(request_id, outcome, reason))
        # Its traceback holds this frame: a circle, and with it the decoded image, until the garbage collector comes by.
        failure = None


def _count(metrics: Metrics, outcome: Outcome, code: grpc.StatusCode, seconds: float, reason: str) -> None:
    metrics.requests.labels(*outcome.model, code.name).inc(outcome.n_images)
    metrics.of_priority(outcome.priority).inc(outcome.n_images)
    exemplar = None if outcome.trace is None else outcome.trace.exemplar
    for _ in range(outcome.n_images):
        metrics.request_seconds.labels(*outcome.model).observe(seconds, exemplar)
    if outcome.response_bytes is not None:
        metrics.response_bytes.observe(outcome.response_bytes)
    if reason:
        metrics.rejected.labels(reason).inc(outcome.n_images)


def _log(
    request_id: str, outcome: Outcome, code: grpc.StatusCode, seconds: float, failure: BaseException | None
) -> None:
    if not log.isEnabledFor(logging.INFO):
        return
    fields: dict[str, Any] = {
        "request_id": request_id[:MAX_REQUEST_ID],  # one that is refused for its length comes through here, too
        "model": "/".join(outcome.model),
        "priority": outcome.priority,
        "code": code.name,
        "ms": round(seconds * 1000, 2),
        **outcome.fields,
    }
    if outcome.trace is not None and outcome.trace.trace_id:
        fields["trace_id"] = outcome.trace.trace_id
    if failure is not None:
        fields["reason"] = failure.reason if isinstance(failure, WeaksegError) else type(failure).__name__
    log.info("request", extra={"fields": fields})


def _attributes(request_id: str, outcome: Outcome, reason: str) -> dict[str, Any]:
    """Of the span: what the log line has, but its times, which are spans of their own."""
    name, version = outcome.model
    known = {"request_id": request_id[:MAX_REQUEST_ID], "model": name, "version": version, "priority": outcome.priority}
    known |= {key: value for key, value in outcome.fields.items() if not key.endswith("_ms")}
    attributes = {f"weakseg.{key}": value for key, value in known.items() if value != ""}
    return attributes | ({"error.type": reason} if reason else {})


def _reason(failure: BaseException) -> str:
    """A closed set, as a metric's label must be."""
    if isinstance(failure, WeaksegError):
        return failure.reason
    return "CANCELLED" if isinstance(failure, asyncio.CancelledError) else "INTERNAL"
