"""The page: sections from the run folder, each left out when there is nothing to say."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from weakseg.recipe import Recipe
from weakseg.records import to_json
from weakseg.report import refiners
from weakseg.report.charts import Mark, Series, bars, line_chart, shares
from weakseg.report.colours import css
from weakseg.report.pictures import LAYERS, Picture, Pictures, main_split
from weakseg.run_folder import (
    rate_text,
    read_evaluations,
    read_json,
    read_metrics,
    read_refinements,
    read_timings,
    walk_pictures,
)
from weakseg.stages import STAGES

NAMES = {
    "cam": "CAM",
    "cam_crf": "CAM + CRF",
    "random_walk": "CAM + random walk",
    "pseudo_mask": "Pseudo-masks",
    "segmentation": "Segmentation",
    "segmentation_crf": "Segmentation + CRF",
    "segmentation_full": "Full supervision",
    "segmentation_full_crf": "Full supervision + CRF",
}
LAYER_HELP = {
    "CAM": "strongest class activation of each pixel; the white line is the threshold",
    "pseudo-mask": "what the segmentation network learns from; grey is ignored",
    "prediction": "the segmentation network, without tags",
    "truth": "the true mask, seen by the scorer alone",
}
Record = dict[str, Any]


def page(recipe: Recipe, folder: Path, pictures: Pictures) -> str:
    """The whole document, nothing outside it needed."""
    records, refined = read_evaluations(folder), read_refinements(folder)
    sections = [
        refiners.warnings(refined),
        _headline(recipe, records),
        _pictures(pictures, folder),
        _walks(folder) if recipe.affinity is not None else "",
        _classes(recipe, records, pictures),
        refiners.section(refined, main_split(recipe), NAMES),
        _curves(folder, records),
        _timings(folder),
        _all_figures(records),
        _settings(recipe, folder),
    ]
    assets = files("weakseg.report")
    style, script = (assets.joinpath(name).read_text() for name in ("report.css", "report.js"))
    rules = "".join(f".p{i}{{background-image:url({one.photograph})}}" for i, one in enumerate(pictures.shown))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(recipe.name)} · weakseg</title><style>{style}{rules}</style></head>"
        f"<body>{_header(recipe, folder)}<main>{''.join(sections)}</main><script>{script}</script></body></html>\n"
    )


def _header(recipe: Recipe, folder: Path) -> str:
    made = read_json(folder / "environment.json") if (folder / "environment.json").is_file() else {}
    machine = made.get("machine", {})
    facts = [
        f"seed {recipe.seed}",
        f"commit {made['commit'][:10]}" if made.get("commit") else "",
        made.get("started", "").partition("T")[0],
        f"{machine['cpus']} × {machine['cpu']}" if "cpu" in machine else "",
        *machine.get("gpus", []),
    ]
    chips = "".join(f"<li>{escape(str(fact))}</li>" for fact in facts if fact)
    method = f"{recipe.train.method} on {recipe.backbone.name}, output stride {recipe.backbone.output_stride}"
    return (
        f'<header><p class="brand">weakseg · run report</p><h1>{escape(recipe.name)}</h1>'
        f'<p class="lead">From image-level labels to masks: {escape(method)}.</p>'
        f'<ul class="chips">{chips}</ul></header>'
    )


def _headline(recipe: Recipe, records: Sequence[Record]) -> str:
    """One card a step of the chain, the main split large, the others small."""
    split = main_split(recipe)
    by_step: dict[str, dict[str, Record]] = {}
    for record in records:
        if record["miou"] is not None:
            by_step.setdefault(record["what"], {})[record["split"]] = record
    if not by_step:
        return ""
    cards = "".join(_card(what, splits, split) for what, splits in by_step.items())
    n_rows = len(next(iter(next(iter(by_step.values())).values()))["iou"])
    scored = "all classes" if recipe.data.scored_classes is None else ", ".join(recipe.data.scored_classes)
    note = (
        f"mIoU in percent, mean over {n_rows} rows (background and {escape(scored)}); large: split "
        f"<b>{escape(split)}</b>. {_ratio(by_step, split)}A figure marked <em class='oracle'>oracle</em> chose its "
        "threshold by the true masks that it is measured on: a bound, not a result."
    )
    return f'<section><h2>How good it is</h2><div class="chain">{cards}</div><p class="note">{note}</p></section>'


def _card(what: str, splits: dict[str, Record], split: str) -> str:
    main = splits.get(split) or next(iter(splits.values()))
    others = [record for record in splits.values() if record is not main]
    threshold, oracle = main["threshold"], main["oracle"]
    facts = [f"{record['split']} {_percent(record['miou'])}" for record in others]
    facts.append("tags given" if main["tags"] == "given" else "no tags")
    if threshold is not None:
        facts.append(f"t = {threshold['t']:.2f}, {_rule(threshold['rule'])}")
    lines = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    if oracle is not None:
        lines += f'<li><em class="oracle">oracle</em> {_percent(oracle["miou"])} at {oracle["t"]:.2f}</li>'
    aside = " aside" if what.startswith("segmentation_full") else ""
    where = "" if main["split"] == split else f" <small>{escape(main['split'])}</small>"
    return (
        f'<article class="card {what}{aside}"><h3>{NAMES[what]}</h3>'
        f'<p class="figure">{_percent(main["miou"])}{where}</p><ul>{lines}</ul></article>'
    )


def _ratio(by_step: dict[str, dict[str, Record]], split: str) -> str:
    weak, full = (by_step.get(what, {}).get(split) for what in ("segmentation", "segmentation_full"))
    if weak is None or full is None or not full["miou"]:
        return ""
    return (
        f"Weak supervision reaches <b>{weak['miou'] / full['miou']:.2f}</b> of full supervision "
        "(same network, budget and seed). "
    )


def _pictures(pictures: Pictures, folder: Path) -> str:
    if not pictures.shown:
        return ""
    if pictures.ranked_by is None:
        how = f"{len(pictures.shown)} of {pictures.n_images} images, evenly spaced: there is nothing to rank them by."
    else:
        how = (
            f"The best, the median and the worst of {pictures.n_ranked} images with a class in them, by the mean IoU "
            f"of their foreground classes ({pictures.ranked_by} against truth), not by how they look."
        )
    layers = [name for name in LAYERS if any(one.layers[name] for one in pictures.shown)]
    legend = "".join(
        f'<li><i class="swatch" style="background:{css(colour)}"></i>{escape(pictures.classes.names[c])}</li>'
        for c, colour in pictures.colours.items()
    )
    columns = "".join(f'<span title="{LAYER_HELP[name]}">{name}</span>' for name in layers)
    rows = "".join(_rows(pictures.shown, layers))
    return (
        f'<section class="pictures" style="--n:{len(layers) + 1}"><h2>What comes out</h2>'
        f'<p class="note">Split <b>{escape(pictures.split)}</b>. {how}{_line_drawn(folder)}</p>'
        f'<div class="tools"><ul class="key">{legend}<li><i class="swatch ignore"></i>ignored</li></ul>'
        '<label>overlay <input type="range" id="overlay" min="0" max="100" value="90" '
        'aria-label="opacity of heatmaps and masks"></label></div>'
        f'<div class="columns" aria-hidden="true"><span>photograph</span>{columns}</div>{rows}</section>'
    )


def _line_drawn(folder: Path) -> str:
    """What the white line in the CAMs is, and who chose it."""
    path = folder / "pseudo_label" / "threshold.json"
    if not path.is_file():
        return ""
    chosen = read_json(path)
    return f" White line: t = {chosen['t']:.2f}, {_rule(chosen['rule'])}: {escape(chosen['provenance'])}."


def _rows(shown: Sequence[Picture], layers: Sequence[str]) -> Iterator[str]:
    group = None
    for i, one in enumerate(shown):
        if one.group != group:
            group = one.group
            yield f'<h3 class="group">{escape(str(group))}</h3>'
        tags = ", ".join(one.tags) or "no tags"
        ratio = f"--r:{one.width / one.height:.4f}"
        cells = f'<div class="cell p{i}" style="{ratio}" role="img" aria-label="photograph of {escape(tags)}"></div>'
        for name in layers:
            uri = one.layers[name]
            over = f'<img src="{uri}" alt="{name}: {escape(tags)}">' if uri else ""
            absent = "" if uri else " absent"
            cells += f'<div class="cell p{i}{absent}" style="{ratio}">{over}<span class="chip">{name}</span></div>'
        iou = "" if one.iou is None else f'<span class="iou">IoU <b>{_percent(one.iou)}</b></span>'
        yield (
            f'<figure class="row"><div class="cells">{cells}</div><figcaption><code>{escape(one.id)}</code>'
            f"<span>{escape(tags)}</span>{iou}</figcaption></figure>"
        )


def _walks(folder: Path) -> str:
    paths = sorted(walk_pictures(folder).glob("*.webp"))
    if not paths:
        return ""
    shown = "".join(
        f'<figure><img src="data:image/webp;base64,{b64encode(path.read_bytes()).decode()}" alt="">'
        f"<figcaption>{escape(path.stem)}</figcaption></figure>"
        for path in paths
    )
    return (
        '<section><h2>Random walk</h2><p class="note">Left: the cell where the class is strongest, and how strongly '
        "scores flow from it to its neighbours, beside the strongest of them. Then the class's share "
        f'of each pixel, before the walk and after some of its steps.</p><div class="walks">{shown}</div></section>'
    )


def _classes(recipe: Recipe, records: Sequence[Record], pictures: Pictures) -> str:
    """A tab an evaluation of the main split: IoU, false negatives and false positives of each class sum to 1."""
    split = main_split(recipe)
    usable = [record for record in records if record["split"] == split and record["miou"] is not None]
    if not usable:
        return ""
    colours = {pictures.classes.names[c]: css(colour) for c, colour in pictures.colours.items()}
    first = next((i for i, record in enumerate(usable) if record["what"] == "segmentation"), len(usable) - 1)
    tabs, panels = [], []
    for i, record in enumerate(usable):
        checked = " checked" if i == first else ""
        tabs.append(
            f'<input type="radio" name="classes" id="tab{i}"{checked}>'
            f'<label for="tab{i}">{NAMES[record["what"]]}</label>'
        )
        panels.append(f'<div class="panel">{shares([_share(name, record, colours) for name in record["iou"]])}</div>')
    key = (
        '<ul class="key"><li><i class="swatch iou"></i>IoU</li><li><i class="swatch fn"></i>missed</li>'
        '<li><i class="swatch fp"></i>too much</li></ul>'
    )
    return (
        f'<section><h2>Class by class</h2><p class="note">Split <b>{escape(split)}</b>. Of the union of the true '
        "and the predicted pixels of a class: the part in both, the part missed, the part that is too much.</p>"
        f'{key}<div class="tabs">{"".join(tabs)}{"".join(panels)}</div></section>'
    )


def _share(name: str, record: Record, colours: dict[str, str]) -> tuple[str, str, list[tuple[str, float, str]]]:
    parts = [(said, record[key][name], key) for said, key in (("IoU", "iou"), ("missed", "fn"), ("too much", "fp"))]
    scored = all(share is not None for _, share, _ in parts)
    return name, colours.get(name, "var(--muted)"), parts if scored else []


def _curves(folder: Path, records: Sequence[Record]) -> str:
    classifier, weak, full = (read_metrics(folder, stage) for stage in ("train", "train_seg", "train_seg_full"))
    names = [key for key in (classifier[-1] if classifier else {}) if key.startswith("loss/")]
    parts = {key.removeprefix("loss/"): (classifier, key) for key in names} if len(names) > 1 else {}
    charts = [
        _threshold_chart(records),
        _loss_chart("Loss of the classifier", {"loss": (classifier, "loss")} | parts),
        _loss_chart("Loss of the segmentation network", {"pseudo-masks": (weak, "loss"), "true masks": (full, "loss")}),
    ]
    shown = "".join(chart for chart in charts if chart)
    return f'<section><h2>Threshold and training</h2><div class="charts">{shown}</div></section>' if shown else ""


def _threshold_chart(records: Sequence[Record]) -> str:
    cams = [record for record in records if record["curve"] is not None and record["miou"] is not None]
    if not cams:
        return ""
    series, marks = [], []
    for i, record in enumerate(cams):
        curve = record["curve"]
        points = [(t, v) for t, v in zip(curve["t"], curve["miou"], strict=True) if v is not None]
        series.append(Series(record["split"], [t for t, _ in points], [v for _, v in points], f"s{i + 1}"))
        marks.append(Mark("chosen", record["threshold"]["t"], record["miou"], "chosen"))
        if record["oracle"] is not None:
            marks.append(Mark("oracle", record["oracle"]["t"], record["oracle"]["miou"], "oracle"))
    rule = cams[0]["threshold"]
    chart = line_chart(
        series, x="threshold t", y="mIoU, %", title="mIoU of the CAMs by threshold", marks=marks, percent=True
    )
    return (
        f'<div class="box"><h3>mIoU of the CAMs by threshold</h3>{chart}<p class="note">t = {rule["t"]:.2f}, '
        f"{_rule(rule['rule'])}.</p></div>"
    )


def _loss_chart(title: str, lines: dict[str, tuple[list[Record], str]]) -> str:
    """lines: {name: (rows of metrics.jsonl, key)}; a line of fewer than two points is left out."""
    lines = {name: line for name, line in lines.items() if len(line[0]) > 1}
    if not lines:
        return ""
    series = [
        Series(name, [row["step"] for row in rows], [row[key] for row in rows], f"s{i + 1}")
        for i, (name, (rows, key)) in enumerate(lines.items())
    ]
    rows = next(iter(lines.values()))[0]
    rate = sorted(row["images_per_s"] for row in rows)[len(rows) // 2]
    return (
        f'<div class="box"><h3>{title}</h3>{line_chart(series, x="step", y="loss", title=title)}'
        f'<p class="note">{rows[-1]["epoch"] + 1} epochs at {rate:.1f} images/s (median).</p></div>'
    )


def _timings(folder: Path) -> str:
    done = read_timings(folder, list(STAGES))
    if not done:
        return ""
    rows = []
    for name, record in done.items():
        rate, cpu = rate_text(record), record.get("cpu_seconds")
        known = cpu and record["seconds"]  # of a stage with nothing to do it may be 0, rounded
        beside = [f"{rate} images/s" if rate else "", f"{cpu / record['seconds']:.1f} cores" if known else ""]
        rows.append(
            (name.replace("_", " "), record["seconds"], duration(record["seconds"]), " · ".join(filter(None, beside)))
        )
    total = duration(sum(record["seconds"] for record in done.values()))
    return f'<section><h2>Where the time went</h2><p class="note">{total} in all.</p>{bars(rows)}</section>'


def _all_figures(records: Sequence[Record]) -> str:
    if not records:
        return ""
    head = ("of", "split", "images", "tags", "threshold", "CRF", "scales", "mIoU", "oracle", "boundary F", "coverage")
    rows = []
    for r in records:
        t = r["threshold"]
        cells = [
            NAMES[r["what"]],
            r["split"],
            f"{r['n_images']:,}",
            r["tags"],
            "–" if t is None else f"{t['t']:.2f}, {_rule(t['rule'])}",
            "–" if r["crf"] is None else "yes",
            ", ".join(f"{scale:g}" for scale in r["scales"]) + (" + flip" if r["flip"] else ""),
            _percent(r["miou"]),
            "–" if r["oracle"] is None else f"{_percent(r['oracle']['miou'])} at {r['oracle']['t']:.2f}",
            _percent(r["boundary_f"]),
            _percent(r["coverage"]),
        ]
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{name}</th>" for name in head)
    return (
        '<section><h2>Every figure, with how it was made</h2><div class="scroll"><table class="figures">'
        f"<thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _settings(recipe: Recipe, folder: Path) -> str:
    """The recipe, section by section, what differs from the default in bold; and the environment."""
    config, default = to_json(recipe), to_json(Recipe(name=recipe.name))
    plain = {key: value for key, value in config.items() if not isinstance(value, dict)}
    blocks = [_block("run", plain, default)]
    blocks += [_block(key, value, default[key]) for key, value in config.items() if isinstance(value, dict)]
    if (folder / "environment.json").is_file():
        environment = read_json(folder / "environment.json")
        blocks.append(_block("environment", environment, environment))
    return (
        '<section><h2>Recipe and environment</h2><p class="note">Bold: not the default.</p>'
        f'<div class="blocks">{"".join(blocks)}</div></section>'
    )


def _block(name: str, values: Record, default: Record | None) -> str:
    before = dict(_flat(default or {}))  # a section that the default recipe does not have
    items = "".join(
        f"<dt>{escape(key)}</dt><dd{'' if before.get(key) == value else ' class=changed'}>{escape(value)}</dd>"
        for key, value in _flat(values)
    )
    return f"<details open><summary>{escape(name)}</summary><dl>{items}</dl></details>"


def _flat(values: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of nested dictionaries."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield prefix + key, " ".join(str(item) for item in value) or "–"
        else:
            yield prefix + key, "–" if value is None else str(value)


def duration(seconds: float) -> str:
    """8.4 s · 3 min 20 s · 1 h 5 min"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def _rule(rule: str) -> str:
    return rule.replace("_", " ")
