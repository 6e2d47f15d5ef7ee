"""KServe's Python server. It has no batches of its own (its batcher is a sidecar), and computes what `predict` does not
hand to a thread on the event loop: so jobs are threads of one pool."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc.aio
import kserve
import numpy as np
import uvicorn

from benchmarks.peers.processes import free_port
from benchmarks.peers.servers.job import Job
from benchmarks.peers.servers.setting import PORT, WORKERS


class Segmentation(kserve.Model):
    def load(self) -> bool:
        self.job, self.pool = Job(), ThreadPoolExecutor(WORKERS)
        self.ready = True
        return self.ready

    async def predict(
        self,
        payload: kserve.InferRequest,
        headers: dict[str, str] | None = None,  # noqa: ARG002
        response_headers: dict[str, str] | None = None,  # noqa: ARG002
    ) -> kserve.InferResponse:
        files = list(payload.inputs[0].as_numpy())
        masks = await asyncio.get_running_loop().run_in_executor(self.pool, self.job, files)
        output = kserve.InferOutput("mask", [len(masks)], "BYTES")
        output.set_data_from_numpy(np.array(masks, np.object_))
        return kserve.InferResponse(payload.id, self.name, [output])


def stay_on_loopback() -> None:
    """KServe listens on every interface, and no option says otherwise."""
    configure, listen = uvicorn.Config.__init__, grpc.aio._server.Server.add_insecure_port

    def on_loopback(self: uvicorn.Config, *args: Any, **options: Any) -> None:
        configure(self, *args, **(options | {"host": "127.0.0.1"}))

    uvicorn.Config.__init__ = on_loopback
    grpc.aio._server.Server.add_insecure_port = lambda self, at: listen(self, at.replace("[::]", "127.0.0.1"))


if __name__ == "__main__":
    stay_on_loopback()
    model = Segmentation("model")
    model.load()
    server = kserve.ModelServer(http_port=free_port(), grpc_port=PORT, enable_latency_logging=False)
    logging.getLogger("kserve").setLevel(logging.WARNING)  # which it has set: a line for each request
    server.start([model])
