"""`weakseg compare --methods …`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from weakseg.comparison import comparison as comparisons
from weakseg.comparison import page, tables
from weakseg.comparison.jobs import Terms
from weakseg.comparison.names import chosen
from weakseg.errors import PartialError
from weakseg.files import write_bytes_atomic
from weakseg.progress import Progress

DEFAULT_RECIPE = "synthetic"
TABLE = "table.md"


def main(argv: Sequence[str]) -> int:
    """Train, map and score every method that is not done; returns 3 where some failed and the others went on."""
    args, overrides = _parser().parse_known_args(argv)
    root = args.folder or Path("runs") / f"compare-{Path(args.recipe or DEFAULT_RECIPE).stem.replace('-', '_')}"
    if args.dataset is not None:
        overrides = ["--data.root", str(args.dataset), *overrides]
    as_before = (root / comparisons.FILE).is_file() and args.recipe is None and args.budget is None and not overrides
    terms = None if as_before else Terms(args.recipe or DEFAULT_RECIPE, tuple(overrides), args.budget)
    comparison = comparisons.load(root, terms)
    comparisons.check_segmentation(comparison, args.segmentation)
    names, left_out = chosen(args.methods, comparison.base)
    progress = Progress("silent" if args.json else "auto")
    for line in left_out:
        progress.say(line)
    seeds = args.seeds or comparison.seeds.get("cam") or [0]
    runs = chain(
        comparisons.add(comparison, names, seeds, left_out, progress),
        comparisons.segment(comparison, args.segmentation, progress),
    )
    for _ in runs:
        write_bytes_atomic(root / TABLE, tables.as_markdown(comparison).encode())
    page.write(comparison, progress)
    if args.json:
        print(json.dumps({"folder": str(root), **comparison.to_json()}))
    else:
        print(f"{tables.as_text(comparison)}\n\nreport: {root / page.FILE}")
    return PartialError.exit_code if comparison.errors else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weakseg compare",
        description="Training methods beside each other, on equal terms: each is a run of the recipe with another "
        "method, up to its scores. What is done is skipped, also in a folder of before that gets more methods.",
        epilog="Any key of the recipe can be set, for all methods alike: --train.optim.batch_size 8.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        required=True,
        metavar="NAME",
        help="all, or of training/methods, also several joined by +; cam/grad_cam for other maps of its classifier",
    )
    parser.add_argument("--recipe", help=f"of the plain classifier (default: the folder's, else {DEFAULT_RECIPE})")
    parser.add_argument("--dataset", type=Path, metavar="PATH", help="short for --data.root PATH")
    parser.add_argument(
        "--budget", type=int, metavar="IMAGES", help="that each training sees (default: the recipe's epochs)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="default: the folder's, else 0")
    parser.add_argument(
        "--segmentation",
        default="some",
        choices=("none", "some", "all"),
        help="who has a segmentation network trained; some: cam, seam and the best two on the training split",
    )
    parser.add_argument("--folder", type=Path, help="where results go (default: runs/compare-<recipe>)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
    return parser
