"""What TorchServe's workers call: a batch of requests in, as many masks out."""

from typing import Any

from benchmarks.peers.servers.job import Job

job: Job | None = None


def handle(data: list[dict[str, bytes]] | None, context: Any) -> list[bytes]:  # noqa: ARG001
    """data: None when the worker starts."""
    global job
    if job is None:
        job = Job()
    return job([bytes(request["data"]) for request in data]) if data else []
