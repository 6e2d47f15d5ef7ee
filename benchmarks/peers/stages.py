"""Where our server's time goes when it is not the segmentation network's: `python -m benchmarks.peers.stages`.

serving.photographs_12mp   images/s of 4000 x 3000 pixels, at 4 callers, with the small network: decoding bounds it
serving.pseudo_masks_crf   images/s of CAM and pseudo-mask with a dense CRF, 500 x 375 pixels, two tags, at 4 callers

Each with the milliseconds and the share of every stage, from weakseg_stage_duration_seconds; waiting is no share.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from benchmarks import serving
from benchmarks.line import line
from benchmarks.load import closed_loop, segment_request
from benchmarks.peers.models import model_folder
from weakseg import bundle
from weakseg.local_server import Ports
from weakseg.manifest import CLASSIFIER, GRAPH_OUTPUTS, Graph
from weakseg.recipe import BackboneConfig
from weakseg.v1 import segmentation_service_pb2 as pb

CALLERS = 4
WAITS = "queue"
TAGS = (1, 2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.stages", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--only", choices=("photographs", "pseudo_masks"))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if args.only != "pseudo_masks":
            request = segment_request(serving.photograph(0, 4000, 3000))
            measure("photographs_12mp", root, model_folder("small", root), request, args.seconds)
        if args.only != "photographs":
            measure("pseudo_masks_crf", root, classifier(root), pseudo_mask_request(), args.seconds)


def measure(name: str, root: Path, model: Path, request: bytes, seconds: float) -> None:
    with serving.server(root, model) as ports:
        before = stages(ports)
        load = closed_loop(ports.target, request, callers=CALLERS, seconds=seconds)
        after = stages(ports)
    if set(load.codes) != {"OK"}:
        raise SystemExit(f"expected answers to all requests, got {dict(load.codes)}")
    line(f"serving.{name}", load.rate, unit="images/s")
    spent = {stage: after[stage] - before.get(stage, 0.0) for stage in after}
    waited, images = spent.pop(WAITS, 0.0), load.codes["OK"] + load.warmed_up
    print(f"  an image waits for {1000 * waited / images:.1f} ms")
    for stage, took in spent.items():
        print(f"  {stage}: {1000 * took / images:.1f} ms an image, {100 * took / sum(spent.values()):.0f} %")


def stages(ports: Ports) -> dict[str, float]:
    """Seconds so far, of each stage."""
    with urlopen(f"{ports.metrics}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        name = "weakseg_stage_duration_seconds_sum"
        return {s.labels["stage"]: s.value for family in families for s in family.samples if s.name == name}


def classifier(root: Path) -> Path:
    """The bundle of a MobileNetV2 classifier with random weights."""
    import torch

    from export.onnx_from_torch import onnx_from_graphs
    from training import cams
    from training.graphs import ClassifierGraph
    from training.models import CamClassifier, build_backbone

    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="mobilenet_v2", weights=None))
    module = ClassifierGraph(CamClassifier(backbone, len(serving.CLASSES)), cams.get("cam")).eval()
    files = {f"{CLASSIFIER}.onnx": onnx_from_graphs({CLASSIFIER: module})[CLASSIFIER]}
    graphs = {CLASSIFIER: Graph(f"{CLASSIFIER}.onnx", GRAPH_OUTPUTS[CLASSIFIER])}
    manifest = replace(serving.manifest("classifier"), outputs=("cam", "pseudo_mask"), graphs=graphs)
    return bundle.write(root / "classifier", manifest, files).folder


def pseudo_mask_request() -> bytes:
    outputs = [
        pb.OutputSpec(kind=pb.OUTPUT_KIND_CAM),
        pb.OutputSpec(kind=pb.OUTPUT_KIND_PSEUDO_MASK, refinement=pb.REFINEMENT_CRF),
    ]
    image = pb.Image(encoded=serving.photograph())
    return pb.SegmentRequest(image=image, outputs=outputs, tags=pb.Tags(class_ids=TAGS)).SerializeToString()


if __name__ == "__main__":
    main()
