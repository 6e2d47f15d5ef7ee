"""Which masks a person should look at first: the least certain ones.

`uncertainty` ranks by what the model says of its own mask; that this finds bad masks is measured in docs/results.md
(`python -m benchmarks.review`).
"""

from __future__ import annotations

import csv
import heapq
import io
from collections.abc import Iterable

from weakseg.batch.exports import Finished
from weakseg.batch.manifest import Row


def uncertainty(row: Row) -> float:
    """How little the model trusts a mask, in [0, 1]: mean entropy of its pixels, undecided ones being sure of nothing.

    1 where nothing is known: no class is present, which is as likely an object that was missed.
    """
    entropy = row["quality"]["entropy"]
    if entropy is None:
        return 1.0
    undecided = (row["quality"]["undecided_px"] or 0) / (row["width"] * row["height"])
    return float(entropy) * (1 - undecided) + undecided


def least_certain(rows: Iterable[Row], n: int) -> list[Row]:
    """The n most uncertain of those that succeeded, most uncertain first, ties by URI."""
    ok = (row for row in rows if row["status"] == "ok")
    return heapq.nsmallest(n, ok, key=lambda row: (-uncertainty(row), row["uri"]))


def ranking_csv(rows: Iterable[Row]) -> bytes:
    """image, uncertainty, mask: a line each, the first to look at first."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "uncertainty", "mask"])
    writer.writerows([row["uri"], f"{uncertainty(row):.6f}", row["outputs"]["mask"]["path"]] for row in rows)
    return text.getvalue().encode()


def write_review(finished: Finished, n: int) -> None:
    """review/ranking-<shard>.csv of n images."""
    rows = least_certain(finished.journal.rows(), n)
    finished.store.write(f"review/ranking-{finished.shard}.csv", ranking_csv(rows))
