"""grpc.health.v1: what a load balancer and a kubelet ask.

| service | SERVING when |
|---|---|
| `liveness` | always: a restart would not help a model that loads slowly or fails |
| `readiness`, the empty name, both services of ours | every model is ready, one at least answers, no drain |
| `<model>/<version>` | this version is ready, and answers |
| `<model>` | a version of it is, and does |

A model does not answer while its breaker is open (serve/breaker.py). One of several takes no server out of rotation: it
may fail everywhere, or for the images of one client, and the others would go with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.interceptors import SERVICES
from serve.models import Entry, Models
from weakseg.model import Model

READY_SERVICES = ("", "readiness", *SERVICES)


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The service, and what it says. Belongs to one event loop. answers: whether a loaded model does.

    grpcio's own servicer tells its watchers before it goes on: one that does not read would hold up every change of a
    status, and the end of the server.
    """

    def __init__(self, models: Models, answers: Callable[[Model], bool]) -> None:
        self._models = models
        self._answers = answers
        self._statuses: dict[str, health_pb2.HealthCheckResponse.ServingStatus.ValueType] = {}
        self._changed = asyncio.Event()  # of the latest statuses; set when there are newer ones
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome. May be asked in any thread."""
        return self._models.ready and not self.draining and any(map(self.is_ready, self._models.entries()))

    def is_ready(self, entry: Entry) -> bool:
        """Whether one model would answer a new request."""
        model = entry.model
        return model is not None and self._answers(model) and not self.draining

    def update(self) -> None:
        """Say what is true now; called when a model changes its state, or begins or ceases to answer."""
        serving = dict.fromkeys(READY_SERVICES, self.ready) | {"liveness": True}
        for entry in self._models.entries():
            is_ready = self.is_ready(entry)
            serving[f"{entry.name}/{entry.version}"] = is_ready
            serving[entry.name] = serving.get(entry.name, False) or is_ready
        gone = dict.fromkeys(self._statuses.keys() - serving.keys(), False)  # versions that are not served any more
        self._statuses = {service: _status(is_serving) for service, is_serving in (serving | gone).items()}
        self._changed.set()
        self._changed = asyncio.Event()

    async def drain(self) -> None:
        """From now on not ready, whatever the models do."""
        self.draining = True
        self.update()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:  # noqa: N802
        if request.service not in self._statuses:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return health_pb2.HealthCheckResponse(status=self._statuses[request.service])

    async def Watch(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: Any,  # noqa: ARG002
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        told = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if status != told:
                yield health_pb2.HealthCheckResponse(status=status)
                told = status
            await changed.wait()


def _status(serving: bool) -> health_pb2.HealthCheckResponse.ServingStatus.ValueType:
    return health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
