"""`weakseg report RUN`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from weakseg.progress import Progress
from weakseg.report import recipe_of, write_report


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="weakseg report", description="A run folder as one self-contained HTML page.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, as `weakseg run` makes it")
    parser.add_argument("--output", type=Path, help="where the page goes (default: RUN/report.html)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
    args = parser.parse_args(argv)
    output = args.output or args.run / "report.html"
    n_images = write_report(recipe_of(args.run), args.run, output, Progress("silent" if args.json else "auto"))
    print(json.dumps({"report": str(output), "n_images": n_images}) if args.json else f"report: {output}")
    return 0
