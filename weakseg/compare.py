"""`weakseg compare RUN RUN …`: the evaluations of several runs beside each other. No torch, no true masks.

`weakseg compare --methods …` makes the runs itself (weakseg.comparison).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weakseg.errors import UsageError
from weakseg.run_folder import read_evaluations
from weakseg.text import table


def main(argv: Sequence[str]) -> int:
    """Entry of `weakseg compare`."""
    if any(argument.partition("=")[0] == "--methods" for argument in argv):
        from weakseg.comparison import commands  # recipes and their overrides, which finished runs need none of

        return commands.main(argv)
    parser = argparse.ArgumentParser(
        prog="weakseg compare",
        description="Scores of several runs, one row a run.",
        epilog="To train several methods on equal terms and compare them: weakseg compare --methods all --recipe NAME; "
        "`weakseg compare --methods all --help` says more.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders")
    parser.add_argument("--split", default="val", help="which split (default: val)")
    parser.add_argument("--metric", default="miou", choices=("miou", "boundary_f"), help="which figure")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
    args = parser.parse_args(argv)
    rows = {str(run): figures(run, args.split, args.metric) for run in args.runs}
    if args.json:
        print(json.dumps({"split": args.split, "metric": args.metric, "runs": rows}))
        return 0
    names = list(dict.fromkeys(what for row in rows.values() for what in row))
    cells = [[run, *(_percent(row.get(what)) for what in names)] for run, row in rows.items()]
    print(table([f"{args.metric} on {args.split}, %", *names], cells))
    return 0


def figures(run: Path, split: str, metric: str) -> dict[str, float | None]:
    """{what: figure} of one run on one split, in the order of the chain.

    Raises:
        UsageError: the run has no evaluation of that split.
    """
    records: list[dict[str, Any]] = [record for record in read_evaluations(run) if record["split"] == split]
    if not records:
        raise UsageError(
            f"{run} has no evaluation of the split {split!r}: run its evaluate stage, or name another --split"
        )
    return {record["what"]: record[metric] for record in records}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
