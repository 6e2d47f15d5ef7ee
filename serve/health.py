"""grpc.health.v1: what a load balancer and a kubelet ask.

| service | SERVING when |
|---|---|
| `liveness` | always: a restart would not help a model that loads slowly or fails |
| `readiness`, the empty name, both services of ours | every model is ready and the server is not draining |
| `<model>/<version>` | this version is ready |
| `<model>` | a version of it is ready |
"""

from __future__ import annotations

from grpc_health.v1 import health, health_pb2

from serve.interceptors import SERVICES
from serve.models import Entry, Models

READY_SERVICES = ("", "readiness", *SERVICES)


class Health:
    """The servicer, and what it says. Starts as alive and not ready."""

    def __init__(self, models: Models) -> None:
        self.servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._models = models
        self._known: set[str] = set()
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome."""
        return self._models.ready and not self.draining

    def is_ready(self, entry: Entry) -> bool:
        """Whether one model would answer a new request."""
        return entry.loaded is not None and not self.draining

    async def update(self) -> None:
        """Say what is true now; called when a model changes its state."""
        statuses = dict.fromkeys(READY_SERVICES, self.ready) | {"liveness": True}
        for entry in self._models.entries():
            is_ready = self.is_ready(entry)
            statuses[f"{entry.name}/{entry.version}"] = is_ready
            statuses[entry.name] = statuses.get(entry.name, False) or is_ready
        gone = dict.fromkeys(self._known - statuses.keys(), False)  # versions that are not served any more
        self._known = set(statuses)
        for service, serving in (statuses | gone).items():
            await self.servicer.set(service, _status(serving))

    async def drain(self) -> None:
        """From now on not ready, whatever the models do."""
        self.draining = True
        await self.update()


def _status(serving: bool) -> health_pb2.HealthCheckResponse.ServingStatus.ValueType:
    return health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
