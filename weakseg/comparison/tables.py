"""The table of a comparison: a part for each split, and one for what methods cost. For terminals and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weakseg import text
from weakseg.comparison.comparison import Comparison
from weakseg.comparison.figures import Summary

OF_SPLIT = {
    "cam": "CAM",
    "cam_crf": "CAM + CRF",
    "segmentation": "segmentation",
    "segmentation_crf": "segmentation + CRF",
    "fp": "too much",
    "fn": "missed",
    "boundary_f": "boundary F",
    "ece": "ECE",
}
OF_COSTS = {
    "train_cpu_ratio": "training, × cam",
    "train_peak_ratio": "memory, × cam",
    "train_cpu_seconds": "training, CPU s",
    "train_peak_mib": "memory, MiB",
    "cam_cpu_seconds": "maps, CPU s / image",
}
FEW_DIGITS = ("train_cpu_seconds", "train_peak_mib")
NOTE = (
    "Percent. CAM, CAM + CRF, segmentation: mIoU; maps and their masks with the images' tags given, segmentation "
    "without. Too much, missed: false positives and negatives of CAM, which with its mIoU sum to 100. Boundary F: of "
    "CAM. ECE: calibration error of the classifier's scores."
)
NOTE_COSTS = (
    "Training: CPU seconds and peak memory of its largest process; × cam: multiples of the plain classifier's of the "
    "same seed."
)


@dataclass(frozen=True)
class Table:
    """values: what cells say, as numbers, None where they say nothing."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    values: list[list[float | None]]


def tables(comparison: Comparison) -> list[Table]:
    """Columns that no method has a figure for are left out, and tables without any."""
    found = comparison.summaries()
    made: list[Table] = []
    for split in comparison.splits:
        rows = {name: splits.get(split, {}) for name, (splits, _) in found.items()}
        made.append(_table(comparison, f"Split {split}", "" if made else NOTE, OF_SPLIT, rows))
    made.append(_table(comparison, "Costs", NOTE_COSTS, OF_COSTS, {name: costs for name, (_, costs) in found.items()}))
    return [table for table in made if len(table.header) > 2]


def _table(
    comparison: Comparison,
    title: str,
    note: str,
    names: Mapping[str, str],
    rows: Mapping[str, Mapping[str, Summary]],
) -> Table:
    columns = [name for name in names if any(name in row for row in rows.values())]
    return Table(
        title,
        note,
        ["method", "seeds", *(names[column] for column in columns)],
        [
            [name, str(len(comparison.figures_of(name))), *(_cell(row, c) for c in columns)]
            for name, row in rows.items()
        ],
        [[None, None, *(row[c].mean if c in row else None for c in columns)] for row in rows.values()],
    )


def _cell(row: Mapping[str, Summary], column: str) -> str:
    if column not in row:
        return "-"
    one, factor = row[column], 100 if column in OF_SPLIT else 1
    digits = 0 if column in FEW_DIGITS else 1 if column in OF_SPLIT else 2
    spread = "" if one.sd is None else f" ± {factor * one.sd:.{digits}f}"
    return f"{factor * one.mean:.{digits}f}{spread}"


def as_text(comparison: Comparison) -> str:
    parts = [f"{table.title}\n{text.table(table.header, table.rows)}" for table in tables(comparison)]
    return "\n\n".join([*parts, *_asides(comparison)])


def as_markdown(comparison: Comparison) -> str:
    parts = []
    for table in tables(comparison):
        lines = [table.header, ["---", *("---:" for _ in table.header[1:])], *table.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts.append("\n\n".join([f"### {table.title}", body, *([table.note] if table.note else [])]))
    return "\n\n".join([*parts, *_asides(comparison)]) + "\n"


def _asides(comparison: Comparison) -> list[str]:
    failed = [f"failed: {line}" for line in comparison.failures()]
    return ["\n".join(lines) for lines in (failed, comparison.left_out) if lines]
