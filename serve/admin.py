"""weakseg.v1.AdminService, on a port of its own: which models the server has, and how much it logs."""

from __future__ import annotations

from typing import Any

import grpc

from serve import logs
from serve.calls import Context
from serve.interceptors import Edge
from serve.lifecycle import Lifecycle
from serve.models import Entry
from serve.ports import listen
from serve.settings import ServeConfig
from weakseg.errors import FoldersUnreadableError, InvalidRequestError
from weakseg.v1 import admin_service_pb2 as pb
from weakseg.v1 import admin_service_pb2_grpc as pb_grpc
from weakseg.v1.segmentation_service_pb2 import ModelRef, ModelState

MAX_CALLS = 16  # at once; they wait for each other anyway
MAX_MESSAGE_BYTES = 4096  # of a request: a name and a version, which the log repeats

LEVELS: dict[int, str] = {
    pb.LOG_LEVEL_DEBUG: "debug",
    pb.LOG_LEVEL_INFO: "info",
    pb.LOG_LEVEL_WARNING: "warning",
    pb.LOG_LEVEL_ERROR: "error",
}


class AdminPort:
    """A gRPC server beside the one for everybody: no queue or limit of that one holds an operator up.

    Raises:
        ConfigError: the port cannot be opened.
    """

    def __init__(self, config: ServeConfig, port: int, edge: Edge, lifecycle: Lifecycle) -> None:
        self._server: Any = grpc.aio.server(
            interceptors=[edge],
            maximum_concurrent_rpcs=MAX_CALLS,
            options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)],
        )
        pb_grpc.add_AdminServiceServicer_to_server(AdminService(lifecycle), self._server)
        self.port = listen(self._server, config.admin_host, port, config.tls, flag="--admin-port")

    async def start(self) -> None:
        await self._server.start()

    async def close(self) -> None:
        """Calls that have no answer yet get none."""
        await self._server.stop(None)


class AdminService(pb_grpc.AdminServiceServicer):
    """The five methods. Errors leave them as exceptions; serve/interceptors.py makes status codes and audit lines."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:  # noqa: ARG002, N802
        _check_named(request)
        return pb.LoadModelResponse(model=_status(await self._lifecycle.load(request.name, request.version)))

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:  # noqa: ARG002, N802
        _check_named(request)
        await self._lifecycle.unload(request.name, request.version, force=request.force)
        return pb.UnloadModelResponse()

    async def ReloadModels(self, request: pb.ReloadModelsRequest, context: Context) -> pb.ReloadModelsResponse:  # noqa: ARG002, N802
        if failure := await self._lifecycle.reload():
            raise FoldersUnreadableError(failure)
        unloaded = [ModelRef(name=name, version=version) for name, version in self._lifecycle.unloaded()]
        return pb.ReloadModelsResponse(models=map(_status, self._lifecycle.models.entries()), unloaded=unloaded)

    async def GetLogLevel(self, request: pb.GetLogLevelRequest, context: Context) -> pb.GetLogLevelResponse:  # noqa: ARG002, N802
        return pb.GetLogLevelResponse(level=_level())

    async def SetLogLevel(self, request: pb.SetLogLevelRequest, context: Context) -> pb.SetLogLevelResponse:  # noqa: ARG002, N802
        if request.level not in LEVELS:
            raise InvalidRequestError(f"expected DEBUG, INFO, WARNING or ERROR, got {request.level}", "level")
        previous = _level()
        logs.set_level(LEVELS[request.level])
        return pb.SetLogLevelResponse(previous_level=previous)


def _check_named(request: pb.LoadModelRequest | pb.UnloadModelRequest) -> None:
    for field in ("name", "version"):
        if not getattr(request, field):
            raise InvalidRequestError(f"expected the {field} of a model, got none: nothing is guessed here", field)


def _level() -> pb.LogLevel.ValueType:
    return pb.LogLevel.Value(f"LOG_LEVEL_{logs.level().upper()}")


def _status(entry: Entry) -> pb.ModelStatus:
    return pb.ModelStatus(
        name=entry.name,
        version=entry.version,
        state=ModelState.ValueType(entry.state.value),
        failure=entry.failure,
        sha256="" if entry.model is None else entry.model.bundle.sha256,
    )
