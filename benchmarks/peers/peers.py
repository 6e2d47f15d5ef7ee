"""The servers that are measured: how each is asked, and the settings that are tried of each.

How it is configured stands in servers/<name>.py; why its authors would nod, in docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.load import SEGMENT, Grpc, Service, segment_request
from benchmarks.peers.http import Http
from serve.inference import grpc_inference_service_pb2 as oip
from weakseg.cpu import usable_cpus

CORES = usable_cpus()
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Setting:
    """workers: jobs side by side, each of `threads` of ONNX Runtime. batch: images that may go together."""

    workers: int
    threads: int
    batch: int


SETTINGS: Mapping[str, Setting] = {
    "workers": Setting(workers=CORES, threads=1, batch=1),
    "batches": Setting(workers=CORES, threads=1, batch=4),
    "threads": Setting(workers=1, threads=CORES, batch=4),
}


@dataclass(frozen=True)
class Peer:
    """A server in an environment of its own.

    package: whose version is said. api: what its users would take of what it speaks.
    service: where to ask, of its port and the folder where it works. request: what to send of a JPEG file.
    checked: it answers with masks.
    """

    name: str
    package: str
    api: Literal["gRPC", "HTTP"]
    service: Callable[[int, Path], Service]
    request: Callable[[bytes], bytes] = bytes
    settings: tuple[str, ...] = tuple(SETTINGS)
    environment: str = ""
    checked: bool = True

    @property
    def python(self) -> Path:
        return ROOT / f".venv-peer-{self.environment or self.name}" / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return next(self.python.parents[1].glob("lib/python3*/site-packages"))


def http(path: str, **headers: str) -> Callable[[int, Path], Service]:
    named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return lambda port, _: Http(port, path, named)


def grpc(method: str) -> Callable[[int, Path], Service]:
    return lambda port, _: Grpc(f"127.0.0.1:{port}", method)


def oip_request(image: bytes, *shape: int) -> bytes:
    """The Open Inference Protocol's: one element of BYTES, its length before it."""
    tensor = oip.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=shape or (1,))
    raw = len(image).to_bytes(4, "little") + image
    return oip.ModelInferRequest(model_name="model", inputs=[tensor], raw_input_contents=[raw]).SerializeToString()


MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
OURS = Peer("weakseg", "weakseg", "gRPC", grpc(SEGMENT), segment_request, ("workers",))
PEERS = {
    peer.name: peer
    for peer in (
        OURS,
        Peer("litserve", "litserve", "HTTP", http("/predict", Content_Type="image/jpeg")),
        Peer("echo_grpc", "grpcio", "gRPC", grpc(SEGMENT), segment_request, ("workers",), "weakseg", checked=False),
        Peer("echo_http", "weakseg", "HTTP", http("/"), settings=("workers",), environment="weakseg", checked=False),
    )
}
