"""Spans of OpenTelemetry: one a request with a child per stage, sent to where the OTEL_* variables say.

    span of the client
      └─ weakseg.v1.SegmentationService/Segment     its parent is the client's span (W3C traceparent in the metadata)
           ├─ decode
           ├─ queue                                 per graph
           ├─ infer                                 per graph; linked to the execution that the image was part of
           │    └─ execution                        of the first traced image in the batch, linked to the others'
           ├─ postprocess
           └─ encode

Imported only where tracing is configured: it needs the extra `tracing`. Nothing of an image but its size gets in here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from time import monotonic, time
from typing import Any

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import weakseg
from weakseg.errors import ConfigError

PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

# With these the span of a server is an error: https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


class Trace:
    """The span of one request. Times are on the clock of `time.monotonic`; methods may be called in any thread.

    trace_id: 32 hexadecimal digits; empty where OpenTelemetry is off. exemplar: of its durations; None = not sampled.
    """

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span)
        self._epoch_s = time() - monotonic()
        context = span.get_span_context()
        self.trace_id = f"{context.trace_id:032x}" if context.is_valid else ""
        self.recording = span.is_recording()
        self.exemplar = {"trace_id": self.trace_id} if self.recording else None

    def stage(self, name: str, started: float, seconds: float, attributes: Mapping[str, Any] | None = None) -> None:
        """A child that has ended."""
        if self.recording:
            self.child(name, started, attributes).end(self.ns(started + seconds))

    def child(self, name: str, started: float, attributes: Mapping[str, Any] | None = None) -> Span:
        return self._tracer.start_span(name, self._context, attributes=attributes, start_time=self.ns(started))

    def ns(self, at: float) -> int:
        """A time as spans have it."""
        return round((self._epoch_s + at) * 1e9)

    def end(self, code: grpc.StatusCode, attributes: Mapping[str, Any]) -> None:
        self._span.set_attribute("rpc.response.status_code", code.name)
        self._span.set_attributes(dict(attributes))
        if code in FAULTS:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class Tracing:
    """Where traces begin."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self._tracer = provider.get_tracer("weakseg", weakseg.__version__)

    def begin(self, method: str, metadata: Iterable[tuple[str, Any]]) -> Trace:
        """A request by this method, `service/method`; its parent stands in the metadata of the call, if it has one."""
        headers = {key: value for key, value in metadata if key in ("traceparent", "tracestate")}
        parent = TraceContextTextMapPropagator().extract(headers)
        attributes = {"rpc.system.name": "grpc", "rpc.method": method}
        return Trace(self._tracer, self._tracer.start_span(method, parent, SpanKind.SERVER, attributes))

    def execution(
        self,
        traces: Iterable[Trace],
        started: float,
        seconds: float,
        *,
        failed: bool,
        attributes: Mapping[str, Any],
    ) -> None:
        """Infer, of each image, and the execution that they share, which has ended."""
        infers = [(trace, trace.child("infer", started, attributes)) for trace in traces if trace.recording]
        if not infers:
            return
        (first, parent), *others = infers
        execution = self._tracer.start_span(
            "execution",
            set_span_in_context(parent),
            attributes=attributes,
            links=[Link(span.get_span_context()) for _, span in others],
            start_time=first.ns(started),
        )
        if failed:
            execution.set_status(StatusCode.ERROR)
        execution.end(first.ns(started + seconds))
        for trace, span in infers:
            span.add_link(execution.get_span_context())
            span.end(trace.ns(started + seconds))

    def close(self) -> None:
        """Send what has not been sent."""
        self.provider.shutdown()


def tracing_from_environment() -> Tracing:
    """Raises ConfigError for an OTEL_* variable that asks for what is not there."""
    ours = Resource({"service.name": "weakseg", "service.version": weakseg.__version__})
    resource = Resource.create().merge(ours).merge(OTELResourceDetector().detect())  # the variables win
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    if exporter not in ("otlp", "none"):
        raise ConfigError(f"OTEL_TRACES_EXPORTER must be otlp or none, got {exporter!r}")
    for variable in PROTOCOL_VARIABLES:
        if os.environ.get(variable, "grpc") != "grpc":
            raise ConfigError(
                f"{variable} must be grpc, got {os.environ[variable]!r}: collectors take OTLP over gRPC on port 4317"
            )
    if exporter == "otlp":
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)
