"""What every front end does around a request for masks: its deadline, its counts, its line in the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import grpc

from serve.batcher import Priority
from serve.interceptors import code_from_error, code_of_cancellation
from serve.metrics import Metrics
from serve.requests import MAX_REQUEST_ID
from weakseg.errors import WeaksegError

log = logging.getLogger("serve.requests")

Context = Any  # grpc.aio.ServicerContext; the stubs make it generic in ways that handlers are not


@dataclass
class Outcome:
    """What a handler learns about its request on the way; `fields` and `response_bytes` once it is answered."""

    model: tuple[str, str] = ("", "")  # name, version
    n_images: int = 1
    priority: Priority = "interactive"
    fields: dict[str, Any] = field(default_factory=dict)
    response_bytes: int | None = None


def deadline_of(context: Context) -> float | None:
    """The deadline of a call on the clock of `time.monotonic`; None = none."""
    remaining: float | None = context.time_remaining()
    return None if remaining is None else monotonic() + remaining


@contextmanager
def counted(metrics: Metrics, request_id: str, deadline: float | None) -> Iterator[Outcome]:
    """Around the work for one request: counts its images by outcome and writes its line to the log."""
    started = monotonic()
    outcome = Outcome()
    failure: BaseException | None = None
    code = grpc.StatusCode.OK
    try:
        yield outcome
    except asyncio.CancelledError as error:
        failure, code = error, code_of_cancellation(deadline is not None and deadline <= monotonic())
        raise
    except Exception as error:
        failure, code = error, code_from_error(error)
        raise
    finally:
        _record(metrics, request_id, outcome, code, monotonic() - started, failure)
        # Its traceback holds this frame: a circle, and with it the decoded image, until the garbage collector comes by.
        failure = None


def _record(
    metrics: Metrics,
    request_id: str,
    outcome: Outcome,
    code: grpc.StatusCode,
    seconds: float,
    failure: BaseException | None,
) -> None:
    metrics.requests.labels(*outcome.model, code.name).inc(outcome.n_images)
    metrics.priorities.labels(outcome.priority).inc(outcome.n_images)
    for _ in range(outcome.n_images):
        metrics.request_seconds.labels(*outcome.model).observe(seconds)
    if outcome.response_bytes is not None:
        metrics.response_bytes.observe(outcome.response_bytes)
    fields: dict[str, Any] = {
        "request_id": request_id[:MAX_REQUEST_ID],  # one that is refused for its length comes through here, too
        "model": "/".join(outcome.model),
        "priority": outcome.priority,
        "code": code.name,
        "ms": round(seconds * 1000, 2),
        **outcome.fields,
    }
    if failure is not None:
        fields["reason"] = failure.reason if isinstance(failure, WeaksegError) else type(failure).__name__
        metrics.rejected.labels(_reject_reason(failure)).inc(outcome.n_images)
    log.info("request", extra={"fields": fields})


def _reject_reason(failure: BaseException) -> str:
    """A closed set, as a metric's label must be."""
    if isinstance(failure, WeaksegError):
        return failure.reason
    return "CANCELLED" if isinstance(failure, asyncio.CancelledError) else "INTERNAL"
