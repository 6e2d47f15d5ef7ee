"""Status codes and google.rpc details back to the classes of weakseg/errors.py, as serve/interceptors.py made them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from weakseg.errors import (
    DeadlineTooShortError,
    ImageError,
    InvalidRequestError,
    ResponseTooLargeError,
    ServiceError,
    WeaksegError,
)

DETAILS_KEY = "grpc-status-details-bin"
IMAGE_REASONS = ("IMAGE_UNDECODABLE", "IMAGE_TOO_LARGE", "UNSUPPORTED_FORMAT")


def error_from_rpc(error: grpc.RpcError, target: str) -> WeaksegError:
    """The typed error of a call that failed; what has no reason is told by its status code."""
    call: Any = error  # an RpcError that a stub raised is also the call
    details = dict(call.trailing_metadata() or ()).get(DETAILS_KEY)
    if details is not None:
        return error_from_status(status_pb2.Status.FromString(details))
    return _transport_error(call.code(), call.details() or "", target)


def error_from_status(status: Any) -> WeaksegError:
    """The typed error of a google.rpc.Status."""
    reason, field, retry_s = "", "", None
    for detail in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            retry_s = retry.retry_delay.ToNanoseconds() / 1e9
    if reason in IMAGE_REASONS:
        return ImageError(status.message, reason)
    if reason == InvalidRequestError.reason:
        return InvalidRequestError(status.message, field)
    kind = {kind.reason: kind for kind in _classes(WeaksegError)}.get(reason, ServiceError)
    error = kind(status.message)
    if isinstance(error, ServiceError):
        error.retry_s = retry_s
    return _with_reason(error, reason)


def _transport_error(code: grpc.StatusCode, message: str, target: str) -> WeaksegError:
    """Errors that gRPC itself reports: they carry no details."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineTooShortError(f"{target} did not answer in time: allow more with timeout_s")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        outbound = "CLIENT: Sent" in message or "SERVER: Received" in message
        if outbound:
            return ImageError(f"the request is above the limit ({message}): scale the image down", "IMAGE_TOO_LARGE")
        return ResponseTooLargeError(
            f"the response is above the limit ({message}): raise max_message_bytes or ask less"
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return _with_reason(ServiceError(f"no server answers at {target} ({message}): is it running?"), code.name)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return _with_reason(ServiceError(f"{target} is no weakseg server, or an older one ({message})"), code.name)
    return _with_reason(ServiceError(f"{target}: {code.name}: {message}"), code.name)


def _with_reason(error: WeaksegError, reason: str) -> WeaksegError:
    error.reason = reason or error.reason
    return error


def _classes(kind: type[WeaksegError]) -> Iterator[type[WeaksegError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _classes(child)
