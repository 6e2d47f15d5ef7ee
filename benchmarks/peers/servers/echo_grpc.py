"""What the callers can do: a grpc.aio server that sends back what it gets."""

import asyncio
import os
from typing import Any

import grpc


async def same(request: bytes, context: Any) -> bytes:  # noqa: ARG001
    return request


async def serve() -> None:
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(same)
    name = "weakseg.v1.SegmentationService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Segment": handler}),))
    server.add_insecure_port(f"127.0.0.1:{os.environ['PEER_PORT']}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve())
