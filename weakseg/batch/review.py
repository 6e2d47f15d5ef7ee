"""Which masks a person should look at first: the least certain ones, as a list and as Label Studio and CVAT tasks.

`uncertainty` ranks by what the model says of its own mask; that this finds bad masks is measured in docs/results.md
(`python -m benchmarks.review`).
"""

from __future__ import annotations

import csv
import heapq
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from weakseg.batch.exports import Finished
from weakseg.batch.manifest import Row
from weakseg.masks.labelled import LabelledImage


def uncertainty(row: Row) -> float:
    """How little the model trusts a mask, in [0, 1]: the mean of two shares.

    Pixels that are undecided; and of each class that should be there what its pixels lack in confidence, on average, 1
    for a class without a pixel: a mask that has lost its object is sure of the background. Where no class should be
    there, what the whole mask lacks. The two were chosen among thirteen signals on the `tune` images of wsss-mini.
    """
    undecided = (row["quality"]["undecided_px"] or 0) / (row["width"] * row["height"])
    sure = {one["name"]: one["confidence"] or 0.0 for one in row["classes"]}
    expected = row["present"] or list(sure)
    doubts = [1 - sure.get(name, 0.0) for name in expected] or [1 - (row["quality"]["confidence"] or 0.0)]
    return (undecided + sum(doubts) / len(doubts)) / 2


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
    """review/ranking-<shard>.csv, tasks-<shard>.json and annotations-<shard>.xml of n images."""
    from weakseg.masks.cvat import annotations_xml
    from weakseg.masks.label_studio import label_config, tasks_json

    rows = least_certain(finished.journal.rows(), n)
    finished.store.write(f"review/ranking-{finished.shard}.csv", ranking_csv(rows))
    chosen = _Chosen(finished, tuple(rows))
    tasks = tasks_json(chosen, finished.classes, model_version=finished.model)
    for path, chunks in (
        (f"review/tasks-{finished.shard}.json", tasks),
        (f"review/annotations-{finished.shard}.xml", annotations_xml(chosen, finished.classes)),
    ):
        with finished.store.writing(path) as file:
            for chunk in chunks:
                file.write(chunk)
    finished.store.write("review/config.xml", label_config(finished.classes, "brush").encode())


@dataclass(frozen=True)
class _Chosen:
    """Some of the finished images, in an order of their own."""

    finished: Finished
    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[LabelledImage]:
        return (image for _, image in self.finished.with_rows(self.rows))
