"""Ray Serve: a replica for each job, asked through Serve's gRPC proxy; bytes travel in protobuf's own BytesValue."""

import os
import signal
import sys
import tempfile
from typing import Any

import grpc
import ray
from google.protobuf.wrappers_pb2 import BytesValue
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions

from benchmarks.peers.processes import free_port
from benchmarks.peers.servers.job import Job
from benchmarks.peers.servers.setting import BATCH, DELAY_S, PORT, QUEUE, WORKERS


def add_to_server(servicer: Any, server: Any) -> None:
    """What protoc makes of `service Segmentation { rpc Segment(BytesValue) returns (BytesValue); }`."""
    handler = grpc.unary_unary_rpc_method_handler(
        servicer.Segment, request_deserializer=BytesValue.FromString, response_serializer=BytesValue.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peers.Segmentation", {"Segment": handler}),))


@serve.deployment(
    num_replicas=WORKERS,
    max_ongoing_requests=2 * BATCH,  # the next batch waits in the replica
    max_queued_requests=QUEUE,
    ray_actor_options={"num_cpus": 1},
)
class Segmentation:
    def __init__(self) -> None:
        self.job = Job()

    async def Segment(self, request: BytesValue) -> BytesValue:  # noqa: N802
        mask = await self.batch(request.value) if BATCH > 1 else self.job([request.value])[0]
        return BytesValue(value=mask)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=DELAY_S)
    async def batch(self, files: list[bytes]) -> list[bytes]:
        return self.job(files)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short, as sockets are in it
        ray.init(include_dashboard=False, _temp_dir=folder, log_to_driver=False)
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host="127.0.0.1", port=free_port()),
            grpc_options=gRPCOptions(port=PORT, grpc_servicer_functions=["benchmarks.peers.servers.ray.add_to_server"]),
        )
        serve.run(Segmentation.bind(), route_prefix="/")
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    os.environ |= {  # which Ray reads when it is imported
        "RAY_AUTH_MODE": "disabled",  # of the cluster, which is this process and its children
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # no cluster of several machines: the loopback interface will do
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 are short on a busy machine
    }
    os.execv(sys.executable, [sys.executable, "-c", "from benchmarks.peers.servers.ray import main; main()"])
