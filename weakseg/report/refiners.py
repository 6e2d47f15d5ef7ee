"""What refiners changed: a warning at the top of the page where one did harm, and a table further down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Record = dict[str, Any]
HEAD = (
    "refiner",
    "split",
    "images",
    "equal pixels",
    "foreground",
    "images that lost a class",
    "class that shrank most",
    "mIoU",
)


def warnings(records: Sequence[Record]) -> str:
    """A paragraph each time that a refiner made label maps worse; empty when none did."""
    texts = [record["warning"] for record in records if record["warning"]]
    said = "".join(f"<p>{escape(text[0].upper() + text[1:])}.</p>" for text in texts)
    return f'<section class="warning"><h2>Warning</h2>{said}</section>' if said else ""


def section(records: Sequence[Record], split: str, names: Mapping[str, str]) -> str:
    """A table, and above it in words what happened on the main split. names: {what: title} of label maps."""
    records = [record for record in records if record["agreement"] is not None]
    if not records:
        return ""
    told = " ".join(_told(record, names) for record in records if record["split"] == split)
    header = "".join(f"<th>{name}</th>" for name in HEAD)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(one)) + "</tr>" for one in records)
    return (
        f'<section><h2>What each refiner changed</h2><p class="note">{told} Before → after, in percent; images without '
        "tags are left out. A class is lost where it has pixels before and none after.</p>"
        f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


def _told(record: Record, names: Mapping[str, str]) -> str:
    steps = f"From {escape(names[record['before']])} to {escape(names[record['after']])}"
    area, miou = record["foreground"], record["miou"]
    then = "" if miou is None else f", mIoU from {100 * miou['before']:.1f} to {100 * miou['after']:.1f}"
    return (
        f"{steps} on <b>{escape(record['split'])}</b>, {100 * (1 - record['agreement']):.1f} % of the pixels get "
        f"another label; the foreground goes from {100 * area['before']:.1f} to {100 * area['after']:.1f} %{then}."
    )


def _cells(record: Record) -> list[str]:
    had, lost = record["images"]["had"], record["images"]["lost"]
    shrunken = min(
        (item for item in record["classes"].items() if item[1]["before"]),
        key=lambda item: item[1]["after"] / item[1]["before"],
        default=None,
    )
    return [
        record["refiner"],
        record["split"],
        f"{record['n_images']:,}",
        f"{100 * record['agreement']:.1f}",
        _pair(record["foreground"]),
        f"{lost:,} of {had:,}",
        "–" if shrunken is None else f"{shrunken[0]} {_pair(shrunken[1])}",
        "–" if record["miou"] is None else _pair(record["miou"]),
    ]


def _pair(shares: Mapping[str, float]) -> str:
    return f"{100 * shares['before']:.1f} → {100 * shares['after']:.1f}"
