"""`weakseg export RUN`: the networks of a run folder to a model bundle, or a bundle to an archive of TorchServe."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from weakseg.errors import UsageError
from weakseg.manifest import PRECISIONS
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.records import RecordError, from_json
from weakseg.run_folder import read_json


def main(argv: Sequence[str]) -> int:
    named = {arg.replace("=", " ", 1) for arg in (*argv, *map(" ".join, pairwise(argv)))}
    if {"--target tensorrt", "--target tensorrt-rtx"} & named:
        from export import engine_commands  # with arguments of its own, of a bundle that is there; needs no torch

        return engine_commands.main(argv)
    args = _parser().parse_args(argv)
    if args.target == "torchserve":
        return _export_archive(args)
    recipe = read_recipe(args.run)
    changes = {key: value for key in ("name", "version", "max_side") if (value := getattr(args, key)) is not None}
    if args.precisions is not None:
        changes["precisions"] = tuple(args.precisions)
    recipe = replace(recipe, export=replace(recipe.export, **changes))
    from export.bundle_from_run import export_run  # torch and onnx: not for --help or a wrong path

    made = export_run(recipe, args.run, args.output, Progress("silent" if args.json else "auto"))
    if args.json:
        print(json.dumps(made))
    else:
        print(f"bundle: {made['bundle']} ({made['mib']} MiB, sha256 {made['sha256'][:12]})")
        for file, differences in made["parity"].items():
            worst = ", ".join(f"{name} {value:.4g}" for name, value in differences.items())
            print(f"  {file}: differences from torch in onnxruntime: {worst}")
        print(f'try it: weakseg predict IMAGE --bundle "{made["bundle"]}" --output masks')
    return 0


def _export_archive(args: argparse.Namespace) -> int:
    if (args.name, args.version, args.max_side, args.precisions) != (None,) * 4:
        raise UsageError(
            "--name, --version, --max-side and --precisions are the bundle's: export the bundle with them first"
        )
    from export.torchserve import export_archive

    made = export_archive(args.run, args.output)
    if args.json:
        print(json.dumps(made))
    else:
        print(f"archive: {made['archive']} ({made['mib']} MiB) of {made['model']}, sha256 {made['sha256'][:12]}")
        print(f'try it: make torchserve BUNDLE="{args.run}"')
    return 0


def read_recipe(folder: Path) -> Recipe:
    """The recipe that a run folder was made with.

    Raises:
        UsageError: not a run folder, or one of another version of weakseg.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"expected a run folder with config.json, got {folder}: `weakseg run RECIPE` makes one")
    try:
        return from_json(Recipe, read_json(path), "recipe")
    except RecordError as error:
        raise UsageError(f"{path}: {error}: the run is of another version of weakseg, run the recipe again") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weakseg export",
        description="Export a run's networks to <output>/<name>/<version>/, if its graphs compute what torch does.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="a run folder, as in runs/<recipe>; for torchserve also a bundle"
    )
    parser.add_argument(
        "--target",
        choices=("bundle", "torchserve", "tensorrt", "tensorrt-rtx"),
        default="bundle",
        help="torchserve: write <output>/<name>-<version>.mar of the bundle that RUN is or has; tensorrt, "
        "tensorrt-rtx: its engines for this GPU, see --target tensorrt --help (default: bundle)",
    )
    parser.add_argument("--output", type=Path, default=Path("models"), help="folder of models (default: models)")
    parser.add_argument("--name", help="of the model (default: the recipe's)")
    parser.add_argument("--version", help="of the model (default: the recipe's)")
    parser.add_argument("--max-side", type=int, help="longest side in pixels that the network may see")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS[1:],
        help="of the graphs, besides float32 (default: the recipe's); INT8 is calibrated on the training images",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
    return parser
