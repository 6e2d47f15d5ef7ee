"""The process: put the parts together, run until told to stop, stop without losing a request.

Stopping (SIGTERM): readiness goes off; for `drain_delay_s` everything is answered as before, while load balancers
notice; then new requests are refused (UNAVAILABLE, DRAINING) and those inside may finish within `drain_grace_s`; then
the port is closed, and the models last. SIGINT skips the delay; a second signal skips the grace. A server in which
too many executions hang stops itself in the same way: only a new process gets their threads back.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

import weakseg
from serve.access import Access
from serve.admin import AdminPort
from serve.admission import Admission
from serve.drift import DriftGauge, Window
from serve.health import Health
from serve.idle import MOST_IDLE
from serve.inference import grpc_inference_service_pb2_grpc as oip_grpc
from serve.interceptors import SERVICES, Edge
from serve.lifecycle import Lifecycle
from serve.metrics import Metrics, MetricsServer
from serve.models import Entry, Models, ModelState
from serve.oip import InferenceService
from serve.pipeline import Pipeline
from serve.ports import listen
from serve.rate_limit import RateLimit
from serve.refining import Refiners
from serve.repository import BundleFolder
from serve.service import SegmentationService
from serve.settings import ServeConfig
from serve.steps import most_of
from serve.tls import Expiry
from weakseg.cpu import usable_cpus
from weakseg.errors import ConfigError
from weakseg.model import Model
from weakseg.preprocess import fitted_size
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

if TYPE_CHECKING:  # an extra
    from serve.tracing import Tracing

WATCH_EVERY_S = 0.5
MORE_HUNG = 2  # executions that were given up and have not ended, beyond as many as run at once
UNREAD_SHARE = 2  # of the memory for images: one client, who may have a quarter and what is inside, is not all of it
CALLS_BEYOND = 256  # the pipeline's limit: refused ones, health checks, questions about models
HOLD_S = 0.2  # within this time a caller that goes on calling has called again
GOAWAY_S = 0.05  # for gRPC to tell connections that there will be no more answers
REFUSALS_S = 1.0  # for the last refusals; only an open health watch takes all of it

log = logging.getLogger("serve")


class Server:
    """One gRPC server with its models and its metrics port; `start` it on a running event loop.

    load: opens a bundle; None = as configured. on_broken: called once when too many executions hang, unless it stops.
    """

    def __init__(
        self,
        config: ServeConfig,
        scan: Callable[[], Sequence[BundleFolder]],
        load: Callable[[Path], Model] | None = None,
        on_broken: Callable[[], object] = lambda: None,
    ) -> None:
        self.config = config
        self.broken = False
        self._on_broken = on_broken
        self.port = 0
        self.metrics_port = 0
        self.admin_port: int | None = None
        self.metrics = Metrics()
        self.tracing = open_tracing() if config.tracing else None
        self.threads = runner_threads(config)
        self.admission = Admission(
            self.metrics,
            RateLimit(config.rate_limit, config.rate_burst),
            queue_limit=config.queue_limit,
            max_batch=config.max_batch,
            adaptive=config.adaptive_limit,
            bulk_share=config.bulk_share,
            unread_bytes=UNREAD_SHARE * config.image_memory_mib * 2**20,
        )
        self.pipeline = Pipeline(
            self.metrics,
            self.admission,
            threads=config.threads or usable_cpus(),
            runner_threads=self.threads,
            max_batch=config.max_batch,
            max_delay_s=config.max_delay_ms / 1000,
            bulk_wait_s=config.bulk_wait_s,
            execution_timeout_s=config.execution_timeout_s or None,
            max_pixels=config.max_pixels,
            image_memory_bytes=config.image_memory_mib * 2**20,
            refiners=Refiners(
                config.refine_threads or config.threads or usable_cpus(), config.refine_budget_ms / 1000 or None
            ),
            tracing=self.tracing,
        )
        self.models = Models()
        self.lifecycle = Lifecycle(
            self.models,
            scan,
            load or loader(config),
            self._on_model_change,
            close=self.pipeline.close_model,
            policy=config.load_policy,
            keep=config.keep_versions,
        )
        self.metrics.registry.register(DriftGauge(self._windows))
        self.health = Health(self.models, self.admission.breakers.answers)
        self.metrics.ready.set_function(lambda: self.health.ready)
        if config.tls is not None:
            self.metrics.watch_certificate(Expiry(config.tls).seconds)
        self.admission.breakers.on_change = self._on_health_change
        self._edge = Edge(self.metrics, Access(config.tokens))
        self._http: MetricsServer | None = None
        self._admin: AdminPort | None = None
        self._grpc: Any = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Open the ports and begin to load the models; returns before they are ready.

        Raises:
            ConfigError: a port that cannot be opened.
        """
        self._http = MetricsServer(self.metrics, self.config.host, self.config.metrics_port, self._ready)
        self.metrics_port = self._http.port
        try:
            self._grpc = self._build()
            config = self.config
            self.port = listen(self._grpc, config.host, config.port, config.tls, flag="--port")
            if config.admin_port is not None:
                self._admin = AdminPort(config, config.admin_port, self._edge, self.lifecycle)
                self.admin_port = self._admin.port
        except ConfigError:
            self._http.close()
            raise
        self.pipeline.start()
        self.health.update()
        await self._grpc.start()
        if self._admin is not None:
            await self._admin.start()
        self._spawn(self._watch_models())
        self._spawn(self._warm_up())
        self._spawn(self._watch())
        fields = {
            "port": self.port,
            "metrics_port": self.metrics_port,
            "admin_port": self.admin_port,
            "models": [f"{entry.name}/{entry.version}" for entry in self.models.entries()],
            "threads": self.threads,
            "event_loop": type(asyncio.get_running_loop()).__module__,
            "version": weakseg.__version__,
        }
        log.info("serving", extra={"fields": fields})

    async def wait_loaded(self) -> None:
        """Until no model is loading any more."""
        while not self.lifecycle.settled:
            await asyncio.sleep(0.01)

    async def _close_port(self) -> None:
        """Close it while every caller waits for a refusal, and refuse them after that.

        A call that gRPC has received when it closes, and has given to no handler yet, would end CANCELLED, which
        clients do not try again.
        """
        self._edge.refusals.clear()
        await asyncio.sleep(HOLD_S)
        closing = asyncio.ensure_future(self._grpc.stop(REFUSALS_S))
        await asyncio.sleep(GOAWAY_S)
        self._edge.refusals.set()
        await closing

    def reload(self) -> None:
        """Begin to look for models that are new, changed or gone."""
        self._spawn(self.lifecycle.reload())

    async def stop(self, *, delay_s: float | None = None, grace_s: float | None = None) -> bool:
        """Drain and close, as the module says; None = as configured. Whether every request inside was answered."""
        log.info("draining", extra={"fields": {"running": self._edge.running}})
        await self.health.drain()
        await asyncio.sleep(self.config.drain_delay_s if delay_s is None else delay_s)
        self.admission.draining = True
        grace_s = self.config.drain_grace_s if grace_s is None else grace_s
        ends = monotonic() + grace_s
        idle = await self._edge.wait_idle(grace_s) and await self.admission.unread.wait_sent(ends - monotonic())
        # Not before: grpc.aio's own grace does not wait for every handler (github.com/grpc/grpc/issues/37239).
        await self._close_port()
        if self._admin is not None:
            await self._admin.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.pipeline.close()  # before the models: nothing may run in them
        await self.lifecycle.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)
        if self._http is not None:
            self._http.close()
        log.info("stopped", extra={"fields": {"all_finished": idle}})
        return idle

    def _build(self) -> Any:
        limit = self.config.max_message_bytes
        server = grpc.aio.server(
            interceptors=[self._edge],
            # An outer guard, refused by gRPC before a message is read; it counts health checks, too, so it is no queue.
            maximum_concurrent_rpcs=MOST_IDLE + self.admission.limit + CALLS_BEYOND,
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                # Identity alone: small messages that unfold to the limit would be refused only when they have.
                ("grpc.compression_enabled_algorithms_bitset", 1),
                ("grpc.so_reuseport", int(self.config.share_port)),  # gRPC's own default is to share it, unasked
                # Clients that ping every 30 s on idle connections are not abuse.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                *self._connection_age(),
            ],
        )
        service = SegmentationService(self.config, self.models, self.pipeline, self.metrics, self.tracing)
        pb_grpc.add_SegmentationServiceServicer_to_server(service, server)
        inference = InferenceService(self.config, self.models, self.pipeline, self.metrics, self.health, self.tracing)
        oip_grpc.add_GRPCInferenceServiceServicer_to_server(inference, server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        if self.config.reflection:
            from grpc_reflection.v1alpha import reflection

            names = (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return server

    def _connection_age(self) -> list[tuple[str, int]]:
        """Without it clients stay on the servers that they met, and new ones get nothing; calls end as they would."""
        age_ms = round(self.config.max_connection_age_s * 1000)
        return [("grpc.max_connection_age_ms", age_ms)] if age_ms else []

    def _ready(self) -> tuple[bool, Any]:
        """For /readyz, from another thread: reads only."""
        entries = {f"{entry.name}/{entry.version}": entry for entry in self.models.entries()}
        unhealthy = [id_ for id_, entry in entries.items() if self._is_unhealthy(entry)]
        models = {id_: entry.state.name for id_, entry in entries.items()}
        return self.health.ready, {"draining": self.health.draining, "models": models, "unhealthy": unhealthy}

    def _is_unhealthy(self, entry: Entry) -> bool:
        """Whether a model is loaded, and is not asked because it fails."""
        model = entry.model
        return model is not None and not self.admission.breakers.answers(model)

    def _on_health_change(self) -> None:
        for entry in self.models.entries():
            if entry.model is not None:
                self.metrics.model_unhealthy.labels(entry.name, entry.version).set(self._is_unhealthy(entry))
        self.health.update()

    def _windows(self) -> Iterator[tuple[str, str, Window | None]]:
        """For a scrape, from another thread: reads only."""
        for entry in self.models.entries():
            model = entry.model
            if model is not None:
                yield entry.name, entry.version, self.pipeline.steps.windows.of(model)

    def _on_model_change(self, entry: Entry) -> None:
        labels = (entry.name, entry.version)
        if entry.state is ModelState.UNLOADING:
            self.metrics.forget_model(*labels)
        else:
            self.metrics.forget_state(*labels)
            self.metrics.keep_model(*labels)
            for state in ModelState:
                self.metrics.model_state.labels(*labels, state.name).set(entry.state is state)
        if entry.model is not None:
            self.metrics.model_load_seconds.labels(*labels).set(entry.load_s)
            sha256, provider = entry.model.bundle.sha256, entry.model.runner.provider
            self.metrics.model_info.labels(*labels, sha256, provider, str(self.threads)).set(1)
        self._on_health_change()

    async def _watch_models(self) -> None:
        await self.lifecycle.reload()
        while self.config.poll_s:
            await asyncio.sleep(self.config.poll_s)
            await self.lifecycle.reload()

    async def _warm_up(self) -> None:
        """The first pseudo-mask should not wait for the CRF's kernels; the log says whether there is a CRF at all."""
        log.info("dense CRF", extra={"fields": {"available": await self.pipeline.refiners.warm_up()}})

    async def _watch(self) -> None:
        while True:
            started = monotonic()
            await asyncio.sleep(WATCH_EVERY_S)
            self.metrics.loop_lag_seconds.set(max(0.0, monotonic() - started - WATCH_EVERY_S))
            if self.pipeline.hung >= self.threads + MORE_HUNG and not self.broken:
                self.broken = True
                log.error("executions hang: a restart is needed", extra={"fields": {"hung": self.pipeline.hung}})
                if not self.health.draining:  # else it would cut off those who still have time to finish
                    self._on_broken()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def open_tracing() -> Tracing:
    """Raises ConfigError without the extra `tracing`, or for an OTEL_* variable that asks for what is not there."""
    try:
        from serve.tracing import tracing_from_environment
    except ImportError as error:
        raise ConfigError(f"--tracing needs OpenTelemetry ({error}): pip install 'weakseg[tracing]'") from error
    return tracing_from_environment()


def runner_threads(config: ServeConfig) -> int:
    """Threads of the network: on two cores, eight take several times as long as two."""
    return min(config.threads or usable_cpus(), usable_cpus())


def loader(config: ServeConfig) -> Callable[[Path], Model]:
    """`weakseg.load` as configured, and every graph run, on one image and on as many as go through it together: the
    first request should not wait for kernels, nor the first batch.

    A bundle that loads and cannot run is told now, before anybody asks.
    """

    def load(path: Path) -> Model:
        model = weakseg.load(
            path,
            runtime=config.runtime,
            provider=config.provider,
            precision=config.precision,
            threads=runner_threads(config),
            public_key=config.public_key,
            beside=config.side_by_side,
        )
        for width, height in config.warm_up_sizes:
            shape = fitted_size(height, width, replace(model.manifest.input, policy="fit"))
            for n, graph in product(sorted({1, most_of(model, shape, config.max_batch)}), model.manifest.graphs):
                for runner in filter(None, (model.runner, model.beside)):
                    runner.run(graph, np.zeros((n, *shape, 3), np.uint8))
        return model

    return load


async def serve(
    config: ServeConfig, scan: Callable[[], Sequence[BundleFolder]], on_start: Callable[[Server], None]
) -> bool:
    """Serve until SIGTERM or SIGINT; SIGHUP reloads the models. `on_start` is called when the ports are open.

    Returns: whether it was told to stop, and every request inside was answered.
    """
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    server = Server(config, scan, on_broken=partial(signals.put_nowait, signal.SIGTERM))
    await server.start()
    loop.add_signal_handler(signal.SIGHUP, server.reload)
    on_start(server)
    settling = asyncio.ensure_future(_settle(server))
    first = await signals.get()
    settling.cancel()
    stopping = asyncio.ensure_future(server.stop(delay_s=0.0 if first is signal.SIGINT else None))
    second = asyncio.ensure_future(signals.get())
    await asyncio.wait({stopping, second}, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        stopping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stopping
        return await server.stop(delay_s=0.0, grace_s=0.0)
    second.cancel()
    return stopping.result() and not server.broken


async def _settle(server: Server) -> None:
    """What start-up made stays: collections need not look at it again, which takes tenths of a second."""
    await server.wait_loaded()
    await server.pipeline.refiners.warm.wait()
    gc.collect()
    gc.freeze()
