"""`weakseg demo`: synthetic photographs through every stage into a running service, checked and shown."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weakseg.datasets import Sample, read
from weakseg.datasets.synthetic import make_synthetic
from weakseg.errors import ParityError
from weakseg.local_server import local_server
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.recipe_loading import load_recipe, override
from weakseg.report.page import duration
from weakseg.run import run, summary
from weakseg.tolerance import FP32

N_SERVED = 12


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="weakseg demo",
        description="Make synthetic photographs, run every stage of the recipe `synthetic`, serve the bundle, request "
        "masks, check them, write a report. Run twice, it does only what is not done.",
        epilog="Any key of the recipe can be set as for `weakseg run`, e.g. --data.root data/synthetic.",
        allow_abbrev=False,
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where results go (default: runs/demo)")
    parser.add_argument("--n-train", type=int, default=500, help="training images (default: 500)")
    parser.add_argument("--n-val", type=int, default=150, help="validation images (default: 150)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
    args, overrides = parser.parse_known_args(argv)
    recipe = override(load_recipe("synthetic"), overrides, prog="weakseg demo")
    progress = Progress("silent" if args.json else "auto")
    began = time.monotonic()
    make_synthetic(
        recipe.data.root, args.n_train, args.n_val, n_tune=args.n_train // 10, seed=recipe.seed, progress=progress
    )
    done = run(recipe, args.folder, progress=progress)
    bundle = args.folder / "bundle" / recipe.export.name / recipe.export.version
    served = check_service(recipe, bundle, args.folder / "served", progress)
    if args.json:
        print(json.dumps({"folder": str(args.folder), "bundle": str(bundle), "stages": done, "served": served}))
        return 0
    print(summary(args.folder, done))
    print(
        f"\nserved: {served['n_images']} masks by gRPC, equal to offline ones on {100 * served['agreement']:.2f} % of "
        f"pixels\n\n{duration(time.monotonic() - began)} in all. Open:\n"
        f"  {args.folder / 'report.html'}  the report\n"
        f"  {served['pictures'][0]}  a served mask over its photograph, and {served['n_images'] - 1} more beside it\n"
        f"  {bundle / 'manifest.json'}  the bundle: `weakseg predict --bundle {bundle} IMAGE`, "
        f"`weakseg serve --bundle {bundle}`"
    )
    return 0


def check_service(recipe: Recipe, bundle: Path, pictures: Path, progress: Progress) -> dict[str, Any]:
    """Start the real server on the bundle, request masks, compare them with offline ones, save pictures.

    Raises:
        ServiceError: the server does not start.
        ParityError: masks differ on more pixels than the tolerance allows.
    """
    import weakseg
    from weakseg.client import Client

    samples = read(recipe.data, recipe.evaluate.splits[-1]).samples[:N_SERVED]
    pictures.mkdir(parents=True, exist_ok=True)
    equal = total = 0
    saved = []
    with (
        local_server(bundle, pictures / "serve.log") as (endpoint, _),
        Client(endpoint) as client,
        weakseg.load(bundle) as offline,
    ):
        for sample in progress.each(samples, "served masks", total=len(samples)):
            remote = client.segment(sample.image)
            local = offline.segment(sample.image)
            equal += int((remote.mask == local.mask).sum())
            total += local.mask.size
            saved.append(pictures / f"{_file_name(sample)}.png")
            remote.overlay(image=local.image).save(saved[-1])
    agreement = equal / total
    if agreement < FP32.label_agreement:
        raise ParityError(
            f"served masks must equal offline ones on {FP32.label_agreement:.1%} of the pixels, got {agreement:.3%}: "
            f"compare {saved[0]} with `weakseg predict --bundle {bundle}`"
        )
    return {"n_images": len(samples), "agreement": agreement, "pictures": [str(path) for path in saved]}


def _file_name(sample: Sample) -> str:
    return sample.id.replace("/", "_")
