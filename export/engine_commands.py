"""`weakseg export --target tensorrt BUNDLE`: engines of a bundle for the GPU that is here, if they compute the same."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export import parity
from export.engine_from_onnx import engine_from_onnx, profile_from_policy
from weakseg.bundle import Bundle, open_bundle
from weakseg.datasets.synthetic import synthetic_scene
from weakseg.engines import EngineRecord, Platform, Profile, cache_folder, write_engine
from weakseg.errors import UsageError
from weakseg.image import read_image
from weakseg.manifest import PRECISIONS, Precision
from weakseg.preprocess import InputPolicy, prepare
from weakseg.progress import Progress
from weakseg.runners import open_runner
from weakseg.runners.cuda import Cuda
from weakseg.runners.tensorrt import Library, TensorRtRunner, load_library, this_platform
from weakseg.tolerance import CAM_MIN_SCORE

TARGETS: dict[str, Library] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
MAX_SIDE = 512  # of the images that are compared; larger ones meet the same layers
N_IMAGES = 3


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    bundle = open_bundle(args.bundle / "bundle" if (args.bundle / "config.json").is_file() else args.bundle)
    policy = bundle.manifest.input
    progress = Progress("silent" if args.json else "auto")
    made = build_engines(
        bundle,
        TARGETS[args.target],
        args.precision,
        profile_from_policy(policy, args.batch, args.typical_size),
        example_images(args.images, policy),
        progress,
    )
    if args.json:
        print(json.dumps(made))
    else:
        for engine in made["engines"]:
            worst = ", ".join(f"{name} {value:.2g}" for name, value in engine["parity"].items())
            print(f"{engine['graph']}: {engine['path']} ({engine['mib']} MiB)\n  agrees with onnxruntime: {worst}")
        print(f'load it: weakseg.load("{bundle.folder}", runtime="{args.target}", precision="{args.precision}")')
    return 0


def build_engines(
    bundle: Bundle,
    library: Library,
    precision: Precision,
    profile: Profile,
    images: Sequence[NDArray[np.uint8]],
    progress: Progress,
) -> dict[str, Any]:
    """Build, compare and keep an engine of each graph, in the order of the manifest.

    An engine is compared with the fp32 graph in onnxruntime, which agrees with torch, before it is written.

    Returns:
        {"platform", "precision", "engines": [{"graph", "path", "mib", "parity"}]}.
    Raises:
        ConfigError: a library, a GPU or the precision is missing. WeaksegError: TensorRT refuses a graph.
        ParityError: an engine computes something else; it is not kept, those before it are.
    """
    paths = bundle.graph_paths(precision)
    trt, cache = load_library(library), cache_folder()
    platform = this_platform(trt, Cuda())
    timing_cache = cache / f"{platform.file_name}.times"
    reference = open_runner(bundle.graph_paths())
    engines = []
    for graph, path in paths.items():
        progress.say(f"{graph}: building for {platform}; this can take minutes")
        plan = engine_from_onnx(trt, graph, path.read_bytes(), profile, platform, timing_cache)
        progress.say(f"{graph}: comparing with onnxruntime")
        runner = TensorRtRunner({graph: plan}, library)
        try:
            report = parity.compare(
                graph,
                reference,
                runner,
                images,
                normalisation=bundle.manifest.cam.normalisation,
                runtime=library,
                precision=precision,
                views=bundle.manifest.graphs[graph].views,
                max_side=bundle.manifest.input.max_side,
                min_score=CAM_MIN_SCORE.get(bundle.manifest.cam.method, 0.0),
            )
        finally:
            runner.close()
        record = _record(bundle, graph, precision, platform, profile, plan, report.summary())
        written = write_engine(cache, path, record, plan)
        engines.append(
            {"graph": graph, "path": str(written), "mib": round(len(plan) / 2**20, 1), "parity": record.parity}
        )
    reference.close()
    return {"platform": str(platform), "precision": precision, "engines": engines}


def example_images(folder: Path | None, policy: InputPolicy) -> list[NDArray[np.uint8]]:
    """What is compared on: the first images of a folder, or synthetic photographs.

    Raises:
        UsageError: the folder has no image.
    """
    policy = InputPolicy(min(policy.max_side, MAX_SIDE))
    if folder is None:
        scenes = [synthetic_scene(0, f"engine-{i}", policy.max_side).image for i in range(N_IMAGES)]
        return [prepare(image, policy) for image in scenes]
    paths = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    if not paths:
        raise UsageError(f"expected photographs (.jpg, .png) in {folder}, got none: name another folder with --images")
    return [prepare(read_image(path), policy) for path in paths[:N_IMAGES]]


def _record(
    bundle: Bundle,
    graph: str,
    precision: Precision,
    platform: Platform,
    profile: Profile,
    plan: bytes,
    differences: dict[str, float],
) -> EngineRecord:
    digest = hashlib.sha256(plan).hexdigest()
    return EngineRecord(bundle.manifest.id, graph, precision, platform, profile, digest, differences)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weakseg export",
        description="Build TensorRT engines of a bundle's graphs for the GPU that is here, and keep those that compute "
        "what the graphs do.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", choices=list(TARGETS), required=True, help="which TensorRT")
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a model bundle, or a run folder that has one")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the bundle's graphs (default: fp32); others stay fp32",
    )
    parser.add_argument("--batch", type=int, default=8, help="most images in one execution (default: 8)")
    parser.add_argument(
        "--typical-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of images, to be fastest at (default: a 4 : 3 photograph of the model's longest side)",
    )
    parser.add_argument("--images", type=Path, help="folder of photographs to compare on (default: synthetic ones)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
    return parser
