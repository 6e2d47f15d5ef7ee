"""The servers that are measured: how each is asked, and the settings that are tried of each.

How it is configured stands in servers/<name>.py; why its authors would nod, in docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from google.protobuf.wrappers_pb2 import BytesValue

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
    "defaults": Setting(0, 0, 0),  # of those that decide for themselves
}


@dataclass(frozen=True)
class Peer:
    """A server in an environment of its own.

    package: whose version is said. api: what its users would take of what it speaks.
    service: where to ask, of its port. request: what to send of a JPEG file.
    checked: it answers with masks.
    """

    name: str
    package: str
    api: Literal["gRPC", "HTTP"]
    service: Callable[[int], Service]
    request: Callable[[bytes], bytes] = bytes
    settings: tuple[str, ...] = ("workers", "batches", "threads")
    environment: str = ""
    checked: bool = True

    @property
    def python(self) -> Path:
        return ROOT / f".venv-peer-{self.environment or self.name}" / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return next(self.python.parents[1].glob("lib/python3*/site-packages"))


def http(path: str, **headers: str) -> Callable[[int], Service]:
    named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return lambda port: Http(port, path, named)


def grpc(method: str) -> Callable[[int], Service]:
    return lambda port: Grpc(f"127.0.0.1:{port}", method)


def oip_request(image: bytes, shape: tuple[int, ...] = (1,)) -> bytes:
    """The Open Inference Protocol's: one element of BYTES, its length before it."""
    tensor = oip.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=shape)
    raw = len(image).to_bytes(4, "little") + image
    return oip.ModelInferRequest(model_name="model", inputs=[tensor], raw_input_contents=[raw]).SerializeToString()


def oip_request_of_a_batch(image: bytes) -> bytes:
    """As Triton has it: its models' shapes begin with the size of the batch."""
    return oip_request(image, (1, 1))


def torchserve_request(image: bytes) -> bytes:
    """PredictionsRequest {string model_name = 1; map<string, bytes> input = 3;}."""
    return _field(1, b"model") + _field(3, _field(1, b"data") + _field(2, image))


def _field(number: int, value: bytes) -> bytes:
    """Of a protobuf message: bytes, a text or a message."""
    length, size = len(value), bytearray()
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *size, length]) + value


def bytes_value(image: bytes) -> bytes:
    return BytesValue(value=image).SerializeToString()


MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
PREDICTIONS = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
JPEG = {"Content_Type": "image/jpeg"}
OURS = Peer("weakseg", "weakseg", "gRPC", grpc(SEGMENT), segment_request, ("defaults",))
PEERS = {
    peer.name: peer
    for peer in (
        OURS,
        Peer("litserve", "litserve", "HTTP", http("/predict", **JPEG)),
        Peer("bentoml", "bentoml", "HTTP", http("/segment", **JPEG)),
        Peer("mlserver", "mlserver", "gRPC", grpc(MODEL_INFER), oip_request),
        Peer("kserve", "kserve", "gRPC", grpc(MODEL_INFER), oip_request, ("workers", "threads")),
        Peer("triton", "nvidia-pytriton", "gRPC", grpc(MODEL_INFER), oip_request_of_a_batch),
        Peer("ray", "ray", "gRPC", grpc("/peers.Segmentation/Segment"), bytes_value),
        Peer("torchserve", "torchserve", "gRPC", grpc(PREDICTIONS), torchserve_request),
        Peer("echo_grpc", "grpcio", "gRPC", grpc(SEGMENT), segment_request, ("defaults",), "weakseg", checked=False),
        Peer("echo_http", "weakseg", "HTTP", http("/"), settings=("defaults",), environment="weakseg", checked=False),
    )
}
