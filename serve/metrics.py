"""Every metric of the server, in a registry of its own, and the HTTP port that shows them.

Label values come from closed sets: served models, status codes, stages, methods of our services. One model has at most
500 series, whatever was asked for and however it ended.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import socketserver
import threading
from collections import deque
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    Summary,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

from weakseg.errors import ConfigError
from weakseg.memory import limit_bytes

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15)
CALL_SECONDS = (0.005, 0.025, 0.1, 0.5, 2.5, 10)  # coarser: there is one per method
BYTES = tuple(float(4**k) for k in range(5, 13))  # 1 KiB to 16 MiB
BATCH = (1, 2, 4, 8, 16, 32)
KEPT_VERSIONS = 4  # that are no longer served, whose counters a scrape still finds

# Process-wide, as prometheus_client has it: else every counter and histogram is one series more, its time of birth.
disable_created_metrics()  # type: ignore[no-untyped-call]

log = logging.getLogger("serve.metrics")


class Metrics:
    """The instruments, by name. One per server, so that two servers in a process do not add up."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        model = ("model", "version")
        self.requests = self._counter("weakseg_requests_total", "Images asked for, by outcome", (*model, "code"))
        self.priorities = self._counter(
            "weakseg_priority_requests_total", "Images asked for, by priority", ("priority",)
        )
        self.request_seconds = self._histogram(
            "weakseg_request_duration_seconds", "One image, in to out", SECONDS, model
        )
        self.stage_seconds = self._histogram(
            "weakseg_stage_duration_seconds", "Parts of a request", SECONDS, ("stage",)
        )
        self.batch_size = self._histogram("weakseg_batch_size", "Images per execution of a graph", BATCH, model)
        self.images = self._counter("weakseg_images_total", "Images that went through a graph", model)
        self.executions = self._counter("weakseg_executions_total", "Executions of a graph", model)
        self.queue_seconds = Summary(  # the stages have buckets of all images together
            "weakseg_queue_duration_seconds",
            "Waiting for a batch and for the model, of one image",
            ("priority",),
            registry=self.registry,
        )
        self.queue_depth = self._gauge("weakseg_queue_depth", "Images that wait for a graph")
        self.queue_limit = self._gauge("weakseg_queue_limit", "Requests in the server beyond which one is refused")
        self.inflight = self._gauge("weakseg_inflight", "Requests in the server")
        self.image_memory_bytes = self._gauge("weakseg_image_memory_bytes", "Memory taken for the pixels of images")
        self.image_memory_waiting = self._gauge("weakseg_image_memory_waiting", "Requests that wait for such memory")
        self.unread_bytes = self._gauge("weakseg_unread_bytes", "Memory of answers that clients have not read yet")
        self.rejected = self._counter("weakseg_rejected_total", "Images without an answer, by reason", ("reason",))
        self.refinements_cut = self._counter(
            "weakseg_refinements_cut_short_total", "Pseudo-masks without the refinement asked for", model
        )
        self.cache_hits = self._counter("weakseg_cache_hits_total", "Answers that were given from memory")
        self.cache_misses = self._counter("weakseg_cache_misses_total", "Requests that no answer was kept for")
        self.cache_bytes = self._gauge("weakseg_cache_bytes", "Size of the answers that are kept")
        self.model_state = self._gauge("weakseg_model_state", "1 for the state a model is in", (*model, "state"))
        self.model_unhealthy = self._gauge("weakseg_model_unhealthy", "1 while a model that fails is not asked", model)
        self.ready = self._gauge("weakseg_ready", "1 while /readyz answers 200")
        self.memory_limit_bytes = self._gauge(
            "weakseg_memory_limit_bytes", "Memory that the process may take: its container's, else the machine's"
        )
        self.memory_limit_bytes.set_function(lambda: limit_bytes() or math.nan)  # when scraped: it may be raised
        self.hung = self._gauge("weakseg_hung_executions", "Executions that were given up and have not ended")
        self.model_load_seconds = self._gauge("weakseg_model_load_seconds", "How long loading took", model)
        self.model_info = self._gauge("weakseg_model_info", "Always 1", (*model, "sha256", "provider", "threads"))
        self.response_bytes = self._histogram("weakseg_response_bytes", "Size of a response", BYTES, ())
        self.loop_lag_seconds = self._gauge("weakseg_event_loop_lag_seconds", "Delay of the latest timer of the loop")
        method = ("grpc_type", "grpc_service", "grpc_method")
        self.grpc_started = self._counter("grpc_server_started_total", "Calls begun", method)
        self.grpc_handled = self._counter("grpc_server_handled_total", "Calls ended", (*method, "grpc_code"))
        self.grpc_seconds = self._histogram("grpc_server_handling_seconds", "Calls, begin to end", CALL_SECONDS, method)
        # One child of each of these for the whole life of the server, so that a call need not look for it again.
        self.of_stage = cache(self.stage_seconds.labels)
        self.of_priority = cache(self.priorities.labels)
        self.of_queue = cache(self.queue_seconds.labels)
        self.of_started = cache(self.grpc_started.labels)
        self.of_handled = cache(self.grpc_handled.labels)
        self.of_seconds = cache(self.grpc_seconds.labels)
        self._gone: deque[tuple[str, str]] = deque()  # versions that are no longer served, the latest last

    def watch_certificate(self, expiry: Callable[[], float]) -> None:
        """`expiry()` is asked when scraped: Unix time, of the certificate that the port for gRPC shows."""
        self.certificate_expiry = self._gauge(
            "weakseg_certificate_expiry_timestamp_seconds", "End of the certificate's validity"
        )
        self.certificate_expiry.set_function(expiry)

    def set_image_memory(self, n_bytes: int, n_waiting: int) -> None:
        self.image_memory_bytes.set(n_bytes)
        self.image_memory_waiting.set(n_waiting)

    def forget_state(self, name: str, version: str) -> None:
        """Drop what says how a version is; what it has done stays."""
        for gauge in (self.model_state, self.model_unhealthy, self.model_load_seconds, self.model_info):
            gauge.remove_by_labels({"model": name, "version": version})

    def forget_model(self, name: str, version: str) -> None:
        """A version is no longer served: its state goes now, its counters once KEPT_VERSIONS others have gone, too.

        Until then scrapes find their last values, and requests that it is still answering are counted.
        """
        self.forget_state(name, version)
        self.keep_model(name, version)
        self._gone.append((name, version))
        if len(self._gone) > KEPT_VERSIONS:
            oldest = dict(zip(("model", "version"), self._gone.popleft(), strict=True))
            for counter in (
                self.requests,
                self.request_seconds,
                self.batch_size,
                self.images,
                self.executions,
                self.refinements_cut,
            ):
                counter.remove_by_labels(oldest)

    def keep_model(self, name: str, version: str) -> None:
        """A version is served, perhaps again."""
        if (name, version) in self._gone:
            self._gone.remove((name, version))

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """What a scrape gets that accepts these media types, and which of them it is.

        OpenMetrics, which has exemplars, where it is asked for; else Prometheus' own format.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...]) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


class MetricsServer:
    """`/metrics`, `/livez` and `/readyz` on a port of their own, in a thread of their own.

    `ready()` returns whether the server takes requests, and what to show about it (JSON).
    """

    def __init__(self, metrics: Metrics, host: str, port: int, ready: Callable[[], tuple[bool, Any]]) -> None:
        handler = type("Handler", (_Handler,), {"metrics": metrics, "ready": staticmethod(ready)})
        try:
            self._server = _Server((host, port), handler)
        except OSError as error:
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            raise ConfigError(
                f"cannot listen on {address} for metrics: {error.strerror or error}; "
                "stop what uses the port or choose another with --metrics-port"
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:  # `::` is every address, IPv4's, too, as it is to gRPC
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # HTTPServer's own looks its name up in the DNS, which can take many seconds where there is none.
        socketserver.TCPServer.server_bind(self)


class _Handler(BaseHTTPRequestHandler):
    metrics: Metrics
    ready: Callable[[], tuple[bool, Any]]
    timeout = 10  # seconds that a silent client may keep its thread

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/metrics":
            self._answer(200, *self.metrics.text(self.headers.get("Accept", "")))
        elif path == "/livez":
            self._answer(200, b"ok\n", "text/plain")
        elif path == "/readyz":
            ready, detail = self.ready()
            self._answer(200 if ready else 503, json.dumps(detail).encode() + b"\n", "application/json")
        else:
            self._answer(404, b"expected /metrics, /livez or /readyz\n", "text/plain")

    def _answer(self, code: int, body: bytes, content_type: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        log.debug(format, *args)
