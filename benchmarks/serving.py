"""What serving costs: `python -m benchmarks.serving` (`make bench-serving`).

A real server around a MobileNetV2 DeepLab with random weights, which costs what a trained one does, and JPEG files of
500 x 375 pixels; callers are a process of their own, on the same cores. Ours and the peer take turns.

serving.vs_bare.N    images/s at N callers; peer: decode, ONNX Runtime and encode in a loop without a server, in as many
                     threads, with one thread for each execution or with all for one, whichever is faster
serving.goodput_4x   images/s answered while four times as many come; peer: the capacity, images/s at 16 callers
serving.noop_vs_echo calls per CPU second of the server, with a network that does nothing and an image of 32 x 32 raw
                     pixels; peer: a grpc.aio server that sends back the bytes that it gets
serving.p99_16       99th percentile of the latency at 16 callers; peer: 16 / throughput, what an even queue would give
"""

from __future__ import annotations

import io
import tempfile
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.line import line
from benchmarks.load import Load, closed_loop, open_loop, segment_request
from weakseg import bundle
from weakseg.classes import ClassTable
from weakseg.cpu import usable_cpus
from weakseg.local_server import Ports, local_server
from weakseg.manifest import GRAPH_OUTPUTS, SEGMENTATION, CamSettings, Graph, Manifest, Provenance, palette_for
from weakseg.preprocess import InputPolicy
from weakseg.recipe import BackboneConfig, PseudoLabelConfig
from weakseg.threshold import Threshold
from weakseg.v1 import segmentation_service_pb2 as pb

CLASSES = ClassTable(tuple(f"class{i}" for i in range(20)))
CALLERS = (1, 4, 16, 64)
AT = 16  # callers that the goals are about
GOALS = {"vs_bare": 0.95, "goodput_4x": 0.9, "noop_vs_echo": 0.6}
OVERLOAD = 4
TIMEOUT_S = 10.0  # of calls under overload
ROUNDS = 3


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--only", choices=("vs_bare", "overload", "noop", "start"), help="one part")
    args = parser.parse_args(argv)
    parts = {"start": start, "noop": noop_vs_echo, "vs_bare": vs_bare, "overload": overload}
    with tempfile.TemporaryDirectory() as folder:
        for name in [args.only] if args.only else parts:
            parts[name](Path(folder), args.seconds)


def start(root: Path, seconds: float) -> None:  # noqa: ARG001
    model = network(root)
    took, rss = [], []
    for _ in range(ROUNDS):
        began = time.monotonic()
        with server(root, model) as ports:
            took.append(time.monotonic() - began)
            rss.append(gauge(ports, "process_resident_memory_bytes") / 2**20)
    line("serving.start_to_ready_s", median(took), unit="s", cost=True)
    line("serving.idle_rss_mib", median(rss), unit="MiB", cost=True)


def vs_bare(root: Path, seconds: float) -> None:
    model, image = network(root), photograph()
    request, graph = segment_request(image), model / f"{SEGMENTATION}.onnx"
    served: dict[int, list[Load]] = {callers: [] for callers in CALLERS}
    bare: list[float] = []
    with server(root, model) as ports:
        for _ in range(ROUNDS):
            for callers in CALLERS:
                served[callers].append(closed_loop(ports.target, request, callers=callers, seconds=seconds))
                bare.append(max(bare_rate(graph, image, seconds / 2, by_image) for by_image in (True, False)))
    for callers, loads in served.items():
        goal = GOALS["vs_bare"] if callers == AT else None
        rate = median(load.rate for load in loads)
        line(f"serving.vs_bare.{callers}", rate, median(bare), unit="images/s", goal=goal)
        if callers == AT:
            p99 = median(load.quantile_s(0.99) for load in loads)
            line(f"serving.p99_{AT}", p99, AT / rate, unit="s", cost=True)


def overload(root: Path, seconds: float) -> None:
    model, request = network(root), segment_request(photograph())
    capacity, goodput = [], []
    with server(root, model) as ports:
        for _ in range(ROUNDS):
            capacity.append(closed_loop(ports.target, request, callers=AT, seconds=seconds).rate)
            rate = OVERLOAD * capacity[-1]
            goodput.append(open_loop(ports.target, request, rate=rate, seconds=2 * seconds, timeout_s=TIMEOUT_S))
    codes = sum((load.codes for load in goodput), goodput[0].codes.__class__())
    refused = [s for load in goodput for s in load.refused_s]
    print(f"overload: {dict(codes)}; refusals took {1e3 * median(refused):.1f} ms at the median")
    line(
        "serving.goodput_4x",
        median(load.rate for load in goodput),
        median(capacity),
        unit="images/s",
        goal=GOALS["goodput_4x"],
    )


def noop_vs_echo(root: Path, seconds: float) -> None:
    request = noop_request()
    ours, peers, rates = [], [], []
    with server(root, noop(root), "--max-delay-ms", "0", "--log-level", "warning") as ports, echo() as peer:
        for _ in range(ROUNDS):
            for target, cpu, into in (
                (ports.target, lambda: gauge(ports, "process_cpu_seconds_total"), ours),
                (peer[0], peer[1], peers),
            ):
                before = cpu()
                load = closed_loop(target, request, callers=AT, seconds=seconds)
                into.append(load.codes["OK"] / (cpu() - before))
                rates.append(f"{load.rate:.0f}")
    print(f"calls/s at {AT} callers, whose own work takes most of the other core, ours and echo in turns: {rates}")
    line("serving.noop_vs_echo", median(ours), median(peers), unit="calls/CPU s", goal=GOALS["noop_vs_echo"])


@contextmanager
def server(root: Path, model: Path, *options: str) -> Iterator[Ports]:
    with local_server(model, root / "serve.log", *options) as ports:
        yield ports


def gauge(ports: Ports, name: str) -> float:
    with urlopen(f"{ports.metrics}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return next(sample.value for family in families for sample in family.samples if sample.name == name)


def bare_rate(graph: Path, image: bytes, seconds: float, by_image: bool) -> float:
    with get_context("spawn").Pool(1) as pool:
        rate: float = pool.apply(_bare, (str(graph), image, seconds, usable_cpus(), by_image))
    return rate


def _bare(graph: str, image: bytes, seconds: float, threads: int, by_image: bool) -> float:
    """Images/s. by_image: `threads` loops with an execution of one thread each; else one loop, of all threads."""
    import onnxruntime

    cv2.setNumThreads(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1 if by_image else threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    counts = [0] * threads
    ends = float("inf")

    def once() -> None:
        rgb = cv2.cvtColor(cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        labels = session.run(["labels"], {"images": rgb[None]})[0][0]
        buffer = io.BytesIO()
        Image.fromarray(labels).save(buffer, "PNG", compress_level=1)

    def loop(i: int) -> None:
        while time.monotonic() < ends:
            once()
            counts[i] += 1

    once()
    began = time.monotonic()
    ends = began + seconds
    loops = [threading.Thread(target=loop, args=(i,)) for i in range(threads if by_image else 1)]
    for each in loops:
        each.start()
    for each in loops:
        each.join()
    return sum(counts) / (time.monotonic() - began)


@contextmanager
def echo() -> Iterator[tuple[str, Callable[[], float]]]:
    """A grpc.aio server that answers each call with its request: its address, and what its process has spent."""
    spawn = get_context("spawn")
    ours, its = spawn.Pipe()
    process = spawn.Process(target=_echo, args=(its,), daemon=True)
    process.start()
    try:
        target = ours.recv()

        def cpu_seconds() -> float:
            ours.send("cpu")
            spent: float = ours.recv()
            return spent

        yield target, cpu_seconds
    finally:
        process.terminate()
        process.join()


def _echo(pipe: Any) -> None:
    import asyncio

    import grpc

    async def same(request: bytes, context: Any) -> bytes:  # noqa: ARG001
        return request

    async def run() -> None:
        made = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(same)
        name = pb.DESCRIPTOR.services_by_name["SegmentationService"].full_name
        made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Segment": handler}),))
        pipe.send(f"127.0.0.1:{made.add_insecure_port('127.0.0.1:0')}")
        await made.start()
        while await asyncio.to_thread(pipe.recv):
            pipe.send(time.process_time())

    asyncio.run(run())


def network(root: Path) -> Path:
    """The bundle of a MobileNetV2 DeepLabV3+ with random weights, whose classes are equally likely in a photograph."""
    if (root / "network").exists():
        return root / "network" / "deeplab" / "1"
    import torch

    from export.labels_output import with_labels
    from export.onnx_from_torch import onnx_from_graphs
    from training.graphs import SegmentationGraph
    from training.models import DeepLabV3Plus, build_backbone

    torch.manual_seed(0)
    module = DeepLabV3Plus(build_backbone(BackboneConfig(name="mobilenet_v2", weights=None)), len(CLASSES)).eval()
    image = np.asarray(Image.open(io.BytesIO(photograph())))[None, :368, :496]  # whole cells of 16 pixels
    with torch.no_grad():  # else one class is all that masks hold
        module.head.bias -= module(torch.tensor(image).permute(0, 3, 1, 2).float()).mean((0, 2, 3))
    graph = onnx_from_graphs({SEGMENTATION: SegmentationGraph(module).eval()})[SEGMENTATION]
    return bundle.write(root / "network", manifest("deeplab"), {f"{SEGMENTATION}.onnx": with_labels(graph)}).folder


def noop(root: Path) -> Path:
    """The bundle of a network that calls everything background."""
    nodes = [
        helper.make_node("ReduceMin", ["images", "channel"], ["least"], keepdims=0),
        helper.make_node("Sub", ["least", "least"], ["labels"]),
        helper.make_node("Cast", ["labels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["float", "axis"], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 3])
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 1, "H", "W"]),
        helper.make_tensor_value_info("labels", TensorProto.UINT8, ["B", "H", "W"]),
    ]
    axes = [
        helper.make_tensor("channel", TensorProto.INT64, [1], [3]),
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
    ]
    graph = helper.make_graph(nodes, "noop", [images], outputs, axes)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    return bundle.write(root / "noop", manifest("noop"), {f"{SEGMENTATION}.onnx": made.SerializeToString()}).folder


def manifest(name: str) -> Manifest:
    return Manifest(
        name=name,
        version="1",
        classes=CLASSES.names,
        palette=palette_for(CLASSES),
        input=InputPolicy(max_side=1024),
        outputs=("segmentation",),
        graphs={SEGMENTATION: Graph(f"{SEGMENTATION}.onnx", GRAPH_OUTPUTS[SEGMENTATION])},
        presence=0.5,
        background=Threshold(0.4, "fixed", "of a benchmark"),
        pseudo_label=PseudoLabelConfig(),
        cam=CamSettings(),
        method="cam",
        provenance=Provenance("0"),
    )


def photograph(seed: int = 0, width: int = 500, height: int = 375) -> bytes:
    """A JPEG with about the detail, and the bytes, of a photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def noop_request() -> bytes:
    raw = pb.RawImage(width=32, height=32, rgb=bytes(32 * 32 * 3))
    outputs = [pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)]
    return pb.SegmentRequest(image=pb.Image(raw=raw), outputs=outputs).SerializeToString()


if __name__ == "__main__":
    main()
