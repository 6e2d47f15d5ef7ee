"""The report of a comparison: one page, nothing outside it needed, and its pictures as a file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from weakseg.comparison.comparison import ALWAYS_SEGMENTED, BEST, Comparison
from weakseg.comparison.figures import summary
from weakseg.comparison.jobs import folder_of
from weakseg.comparison.tables import Table, tables
from weakseg.environment import machine
from weakseg.files import write_bytes_atomic
from weakseg.progress import Progress
from weakseg.report import panel, recipe_of
from weakseg.report.charts import Series, line_chart
from weakseg.report.colours import class_colours, css
from weakseg.report.pictures import main_split
from weakseg.scoring import SWEEP_THRESHOLDS

FILE, PICTURE = "report.html", "panel.webp"
STYLE = """
.wide { max-width: 640px; }
.methods td:first-child { font-weight: 600; } .methods td.best { font-weight: 700; color: var(--accent); }
.methods th { cursor: pointer; white-space: normal; vertical-align: bottom; }
.methods td + td, .methods th + th { text-align: right; }
.panel img { width: 100%; height: auto; border-radius: 8px; }
"""
# A click on a column sorts by it; without scripts the table is in the order of its methods.
SORT = """
for (const table of document.querySelectorAll(".methods")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, i) => head.addEventListener("click", () => {
    const down = (head.dataset.down = head.dataset.down === "1" ? "0" : "1") === "1";
    const key = (row) => +(row.cells[i].dataset.v ?? (down ? -Infinity : Infinity));
    const rows = [...body.rows];
    rows.sort(i ? (a, b) => (down ? key(b) - key(a) : key(a) - key(b))
                : (a, b) => (down ? 1 : -1) * a.cells[0].textContent.localeCompare(b.cells[0].textContent));
    body.append(...rows);
  }));
}
"""
HIGHER_IS_BETTER = ("CAM", "CAM + CRF", "segmentation", "segmentation + CRF", "boundary F")


def write(comparison: Comparison, progress: Progress) -> None:
    """Writes panel.webp, of the first seed that each method has maps of, and report.html."""
    progress.say("comparison: pictures")
    rows = panel_rows(comparison)
    picture, shown = panel.draw(rows) if rows else (b"", [])
    if picture:
        write_bytes_atomic(comparison.root / PICTURE, picture)
    write_bytes_atomic(comparison.root / FILE, page(comparison, picture, shown).encode())


def panel_rows(comparison: Comparison) -> list[panel.Row]:
    rows = []
    for name, seeds in comparison.seeds.items():
        folders = [folder_of(comparison.root, name, seed) for seed in seeds]
        made = [folder for folder in folders if (folder / "pseudo_label" / "done.json").is_file()]
        rows += [(name, recipe_of(folder), folder) for folder in made[:1]]
    return rows


def page(comparison: Comparison, picture: bytes, shown: Sequence[str]) -> str:
    assets = files("weakseg.report")
    style, script = (assets.joinpath(name).read_text() for name in ("report.css", "report.js"))
    colours = class_colours(range(len(comparison.seeds)))
    lines = "".join(
        f".m{i}{{stroke:{css(colour)}}}.swatch.m{i}{{background:{css(colour)}}}" for i, colour in colours.items()
    )
    sections = [
        _failures(comparison),
        *(_table(table) for table in tables(comparison)),
        _curves(comparison),
        _pictures(comparison, picture, shown),
        _terms(comparison),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>methods on {escape(comparison.base.name)} · weakseg</title><style>{style}{STYLE}{lines}</style></head>"
        f"<body>{_header(comparison)}<main>{''.join(sections)}</main><script>{script}{SORT}</script></body></html>\n"
    )


def _header(comparison: Comparison) -> str:
    here = machine()
    optim = comparison.base.train.optim
    facts = [
        f"recipe {comparison.terms.recipe}",
        f"{comparison.base.backbone.name}, output stride {comparison.base.backbone.output_stride}",
        f"epochs: {optim.epochs}, crops of {optim.crop_px} px",
        f"{here['cpus']} × {here['cpu']}",
        *here["gpus"],
    ]
    chips = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f'<header><p class="brand">weakseg · comparison</p><h1>{len(comparison.seeds)} methods, equal terms</h1>'
        '<p class="lead">The same images, backbone, augmentation and number of images seen; what differs is what is '
        f'learnt from the tags.</p><ul class="chips">{chips}</ul></header>'
    )


def _failures(comparison: Comparison) -> str:
    said = "".join(f"<p>{escape(line)}</p>" for line in comparison.failures())
    return f'<section class="warning"><h2>Failed</h2>{said}</section>' if said else ""


def _table(table: Table) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    best = [_best(table, column) for column in range(len(table.header))]
    rows = ""
    for cells, values in zip(table.rows, table.values, strict=True):
        row = ""
        for i, (cell, value) in enumerate(zip(cells, values, strict=True)):
            data = "" if value is None else f' data-v="{value:.6g}"'
            strong = ' class="best"' if value is not None and value == best[i] else ""
            row += f"<td{strong}{data}>{escape(cell)}</td>"
        rows += f"<tr>{row}</tr>"
    return (
        f'<section><h2>{escape(table.title)}</h2><p class="note">{escape(table.note)}</p>'
        '<div class="scroll">'
        f'<table class="methods"><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


def _best(table: Table, column: int) -> float | None:
    """Of the columns where more is better."""
    known = [row[column] for row in table.values if row[column] is not None]
    return max(known, key=lambda v: v or 0.0) if known and table.header[column] in HIGHER_IS_BETTER else None


def _curves(comparison: Comparison) -> str:
    """Mean over the seeds of mIoU of the CAMs by threshold, a line a method, on the split of the pictures."""
    split = main_split(comparison.base)
    series = []
    for i, name in enumerate(comparison.seeds):
        curves = [run.curves[split] for run in comparison.figures_of(name) if split in run.curves]
        means = [summary([v for v in at if v is not None]) for at in zip(*curves, strict=True)]
        points = [(float(t), one.mean) for t, one in zip(SWEEP_THRESHOLDS, means, strict=False) if one is not None]
        series.append(Series(name, [t for t, _ in points], [v for _, v in points], f"m{i}"))
    chart = line_chart(series, x="threshold t", y="mIoU, %", title="mIoU of the CAMs by threshold", percent=True)
    if not chart:
        return ""
    return (
        f'<section><h2>mIoU of the CAMs by threshold</h2><p class="note">Split <b>{escape(split)}</b>. A method whose '
        "line is flat forgives a threshold that is not quite right.</p>"
        f'<div class="box wide">{chart}</div></section>'
    )


def _pictures(comparison: Comparison, picture: bytes, shown: Sequence[str]) -> str:
    if not picture:
        return ""
    uri = b64encode(picture).decode()
    alt = f"{len(shown)} images, their true masks and the maps of every method"
    return (
        f'<section><h2>Maps</h2><p class="note">Split <b>{escape(main_split(comparison.base))}</b>: '
        f"{escape(', '.join(shown))}, the first of each class in turn, by the order of the list. Bright: where the "
        "strongest class of the tags is strong; white line: the method's mask at its threshold. Colours are those of "
        f'the true classes.</p><div class="panel"><img src="data:image/webp;base64,{uri}" alt="{alt}"></div></section>'
    )


def _terms(comparison: Comparison) -> str:
    train = comparison.splits[0]
    budget = comparison.terms.budget
    seen = "the recipe's own" if budget is None else f"those that come nearest to {budget:,} images"
    chosen = ", ".join(comparison.segmented) or "none was trained"
    points = [
        f"Every row is a run of the recipe {comparison.terms.recipe} with another method: the same backbone, crops, "
        f"augmentation and optimiser; epochs: {comparison.base.train.optim.epochs}, {seen}. Passes over an image "
        "differ, and are in the costs.",
        f"Overrides, for all alike: {' '.join(comparison.terms.overrides) or 'none'}. Beyond them a method has the "
        "settings of its own section and of its preset.",
        "Thresholds are chosen for each method by the recipe's rule, "
        f"{comparison.base.pseudo_label.threshold.rule.replace('_', ' ')}.",
        f"Segmentation networks: {chosen}. With --segmentation some they are {', '.join(ALWAYS_SEGMENTED)} and the "
        f"best {BEST} by CAM + CRF on {train}; no other split has a say in it.",
        *comparison.left_out,
    ]
    said = "".join(f"<p>{escape(point)}</p>" for point in points)
    return f'<section><h2>What is equal, and what is chosen where</h2><div class="note">{said}</div></section>'
