"""The model card: README.md of a bundle in the form that Hugging Face reads, made from the manifest alone.

Front matter: https://huggingface.co/docs/hub/model-cards. The same manifest gives the same text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weakseg.classes import MAX_CLASSES_U8
from weakseg.manifest import SEGMENTATION, Manifest

# Identifiers of https://huggingface.co/docs/hub/repositories-licenses that are whole licences; others are "other".
HUB_LICENCES = frozenset(
    {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"}
)
SHOWN_CLASSES = 300
FEW_IMAGES = 20  # of a class in training: too few to count on
MEASURED = {
    "cam": "class activation maps",
    "cam_crf": "class activation maps, dense CRF",
    "random_walk": "class activation maps, random walk",
    "pseudo_mask": "pseudo-masks",
    "segmentation": "segmentation network",
    "segmentation_crf": "segmentation network, dense CRF",
    "segmentation_full": "another network, trained on true masks",
    "segmentation_full_crf": "another network, trained on true masks, dense CRF",
}
OTHER_NETWORK = "segmentation_full"  # measured beside it; not in the bundle
GIVES = {
    "segmentation": "a class for every pixel of any image",
    "pseudo_mask": "heatmaps made into a mask, for images whose classes are known; undecided pixels are IGNORE",
    "cam": "a heatmap in [0, 1] of each class that is present, and a score of every class",
}


def card(manifest: Manifest) -> str:
    """The whole text of README.md."""
    sections = [
        _title(manifest),
        _use(manifest),
        _classes(manifest),
        _metrics(manifest),
        _limits(manifest),
        _data(manifest),
        _graphs(manifest),
    ]
    return "---\n" + "\n".join(_front_matter(manifest)) + "\n---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(m: Manifest) -> Iterator[str]:
    """YAML lines. Texts are written as JSON strings, which YAML reads."""
    licence = _licence(m)
    yield f"license: {licence}"
    if licence == "other":
        yield "license_name: see-model-card"
    yield "library_name: weakseg"
    yield "pipeline_tag: image-segmentation"
    yield "tags:"
    yield from (f"- {tag}" for tag in ("weakly-supervised", "semantic-segmentation", "class-activation-map", "onnx"))
    records = [record for record in _quotable(m) if not record["what"].startswith(OTHER_NETWORK)]
    if records:
        yield "model-index:"
        yield f"- name: {_yaml(m.id)}"
        yield "  results:"
    for record in records:
        yield "  - task:"
        yield "      type: image-segmentation"
        yield "    dataset:"
        yield f"      type: {_yaml(m.provenance.recipe or 'unnamed')}"
        yield f"      name: {_yaml(m.provenance.recipe or 'unnamed')}"
        yield f"      split: {_yaml(record['split'])}"
        yield "    metrics:"
        yield "    - type: mean_iou"
        yield f"      name: {_yaml(f'mIoU of {_measured(record)}, {_conditions(record)}')}"
        yield f"      value: {round(record['miou'], 4)}"


def _title(m: Manifest) -> str:
    what = "class" if len(m.classes) == 1 else "classes"
    lines = [
        "<!-- Made by weakseg from manifest.json, which lists this file's hash: edited, the bundle is damaged. -->",
        "",
        f"# {m.name}, version {m.version}",
        "",
        f"Marks {len(m.classes)} {what} in images, pixel by pixel. It was trained by weakseg from image-level labels:",
        "what is in an image was known, where it is was not.",
        "",
        *(f"- `{kind}`: {text}" for kind, text in GIVES.items() if kind in m.outputs),
    ]
    return "\n".join(lines)


def _use(m: Manifest) -> str:
    path = f"models/{m.id}"
    shown = "result.mask" if "segmentation" in m.outputs or "pseudo_mask" in m.outputs else "result.heatmaps"
    form = "(height, width), values as below" if shown == "result.mask" else "{class: (height, width) in [0, 1]}"
    larger = "scaled down to it" if m.input.policy == "fit" else "refused"
    extras = "serve" if m.pseudo_label.crf is None and m.walk is None else "serve,refine"
    return f"""## Use

This folder is a weakseg bundle, here at `{path}`. What runs it, without torch: `pip install "weakseg[{extras}]"`.

```python
import weakseg

with weakseg.load("{path}") as model:
    result = model.segment("photo.jpg")
{shown}  # {form}
```

```sh
weakseg predict photo.jpg --bundle {path} --output masks   # the same from a shell
weakseg serve --bundle {path}                              # or over gRPC, port 8500
weakseg bundle verify {path}                               # is it whole
```

Images with a side above {m.input.max_side} pixels are {larger}."""


def _classes(m: Manifest) -> str:
    rows = [["0", "background", _colour(m.palette[0])]]
    rows += [[str(i + 1), _md(name), _colour(m.palette[i + 1])] for i, name in enumerate(m.classes[:SHOWN_CLASSES])]
    more = len(m.classes) - SHOWN_CLASSES
    if more > 0:
        rows.append(["…", f"{more} more, in manifest.json", ""])
    if "pseudo_mask" in m.outputs:
        ignore = "255" if len(m.classes) <= MAX_CLASSES_U8 else "65535"
        rows.append([ignore, "IGNORE: undecided, in pseudo-masks only", ""])
    return "## Classes\n\n" + _table(["value", "class", "colour"], rows)


def _metrics(m: Manifest) -> str:
    records = _quotable(m)
    if not records:
        return "## Measured\n\nNothing: this bundle comes without an evaluation. Measure it on your own images first."
    rows = [
        [
            f"*{_md(_measured(record))}*" if record["what"].startswith(OTHER_NETWORK) else _md(_measured(record)),
            _md(record["split"]),
            str(record.get("n_images", "-")),
            _md(record["tags"]),
            _md(_threshold(record)),
            str(_n_views(record)),
            *(_percent(record.get(key)) for key in ("coverage", "boundary_f", "miou")),
        ]
        for record in records
    ]
    header = ["of", "split", "images", "tags", "threshold", "views", "decided pixels", "boundary F", "mIoU"]
    parts = [
        "## Measured",
        "In percent, against true masks, by torch before the export. Tags *given*: it was told the classes of each "
        "image; *none*: it had the image alone. Views are scales and mirror images whose maps are summed. Where not "
        "all pixels are decided, mIoU is over those that are.",
        _table(header, rows),
        *_remarks(m, records),
        *_per_class(records),
    ]
    return "\n\n".join(parts)


def _remarks(m: Manifest, records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    scored = _scored(records[-1])
    if 0 < len(scored) < len(m.classes):
        names = ", ".join(map(_md, scored))
        yield f"mIoU is over the background and {len(scored)} of the {len(m.classes)} classes: {names}."
    if any(record["what"].startswith(OTHER_NETWORK) for record in records):
        yield "The network trained on true masks is not in this bundle; it shows what their lack costs."
    views = m.graphs[SEGMENTATION].views if SEGMENTATION in m.graphs else 0
    if any(record["what"].startswith("segmentation") and _n_views(record) > views > 0 for record in records):
        of = "one view" if views == 1 else f"{views} views"
        yield f"The segmentation graph of this bundle looks at {of}: expect a little less than was measured."


def _per_class(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """IoU by class of what the bundle ends with."""
    own = [r for r in records if not r["what"].startswith(OTHER_NETWORK) and isinstance(r.get("iou"), dict)]
    plain = [record for record in own if record["what"] == "segmentation"] or own
    if plain:
        record = plain[-1]
        rows = [[_md(name), _percent(value)] for name, value in record["iou"].items()]
        yield f"By class, {_md(_measured(record))} on {_md(record['split'])}:\n\n" + _table(["class", "IoU"], rows)


def _limits(m: Manifest) -> str:
    lines = [
        "Training saw no true mask. Expect the parts that give a class away (a head, a wheel) to be found before the "
        "rest, and things that mostly occur together (a boat and water) to run into each other. Boundaries "
        "are approximate.",
        "What is none of these classes becomes background or the class that it looks most like. Instances are not told "
        "apart.",
        f"Without tags, a class counts as present when its score is at least {m.presence:g}; heatmaps and pseudo-masks "
        "show no other class.",
        f"In pseudo-masks a pixel is background where no map reaches {m.background.t:.3g} (rule "
        f"{_md(m.background.rule)}: {_md(m.background.provenance)}). Other images may need another value.",
        "Maps have one cell for 4 x 4 pixels: what is no larger than a few cells is lost, also when a large image is "
        "scaled down.",
    ]
    if m.training is not None:
        few = [name for name in m.classes if m.training.class_frequency.get(name, 0) * m.training.n_images < FEW_IMAGES]
        lines.append(
            f"Images unlike those of training give worse results without notice. Those had a mean brightness of "
            f"{m.training.brightness_mean:.2f} ± {m.training.brightness_std:.2f} of 1; manifest.json "
            "says how often each class occurred. Compare yours with both."
        )
        if few:
            shown = ", ".join(map(_md, few[:SHOWN_CLASSES]))
            lines.append(f"Hardly trained, on fewer than {FEW_IMAGES} images each: {shown}.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _data(m: Manifest) -> str:
    p = m.provenance
    crf = "not refined" if m.pseudo_label.crf is None else "refined by a dense CRF"
    refined = crf if m.walk is None else "refined by a random walk"
    facts = [
        ("training images", "unknown number" if m.training is None else str(m.training.n_images)),
        ("licence of the training images", _md(m.licences.data)),
        ("licence of the weights that training started from", _md(m.licences.weights)),
        ("method", f"{_md(m.method)}, maps by {_md(m.cam.method)}, {refined}"),
        ("recipe, seed", f"{_md(p.recipe or 'unknown')}, {'unknown' if p.seed is None else p.seed}"),
        (
            "made by",
            f"weakseg {_md(p.weakseg)}, torch {_md(p.torch or 'unknown')}, commit {_md(p.commit or 'unknown')}",
        ),
    ]
    after = "Whether and under which terms this model may be used and passed on follows from both licences."
    return "## Training and licences\n\n" + "\n".join(f"- {what}: {is_}" for what, is_ in facts) + "\n\n" + after


def _graphs(m: Manifest) -> str:
    rows = [
        [_md(name), _md(graph.file), ", ".join(graph.files()), _md(", ".join(graph.outputs)), str(graph.views)]
        for name, graph in m.graphs.items()
    ]
    parts = [
        "## Graphs",
        "ONNX; input `images`, uint8 (batch, height, width, 3) RGB of any size.",
        _table(["graph", "file", "precisions", "outputs", "views"], rows),
    ]
    if m.parity:
        keys = list(dict.fromkeys(key for record in m.parity for key in record))
        parts.append(
            "Largest difference from torch, measured when the graph was made; `labels` is the share of equal pixels:"
        )
        parts.append(
            _table([_md(key) for key in keys], [[_cell(record.get(key)) for key in keys] for record in m.parity])
        )
    return "\n\n".join(parts)


def _licence(m: Manifest) -> str:
    """An identifier of the hub only where images and weights have the same; what else holds is for people to say."""
    names = {m.licences.data.lower(), m.licences.weights.lower()}
    return names.pop() if len(names) == 1 and names <= HUB_LICENCES else "other"


def _quotable(m: Manifest) -> list[dict[str, Any]]:
    """Records that say what was measured, on which split and whether tags were given: no figure goes without."""
    return [
        record
        for record in m.metrics
        if isinstance(record.get("miou"), float)
        and all(isinstance(record.get(k), str) for k in ("what", "split", "tags"))
    ]


def _measured(record: Mapping[str, Any]) -> str:
    return MEASURED.get(record["what"], str(record["what"]))


def _conditions(record: Mapping[str, Any]) -> str:
    """All that a figure depends on, in words."""
    n_views, coverage, scored = _n_views(record), record.get("coverage"), _scored(record)
    said = [
        f"tags {record['tags']}",
        *([f"threshold {_threshold(record)}"] if record.get("threshold") else []),
        "1 view" if n_views == 1 else f"{n_views} views",
        *([f"background and {len(scored)} classes"] if scored else []),
        *([f"over {_percent(coverage)} % of the pixels"] if isinstance(coverage, float) and coverage < 1 else []),
    ]
    return ", ".join(said)


def _threshold(record: Mapping[str, Any]) -> str:
    threshold = record.get("threshold")
    return f"{threshold['t']:.3g} ({threshold['rule']})" if isinstance(threshold, dict) else "-"


def _n_views(record: Mapping[str, Any]) -> int:
    return len(record.get("scales") or [1.0]) * (2 if record.get("flip") else 1)


def _scored(record: Mapping[str, Any]) -> list[str]:
    return record.get("scored_classes") or []


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}" if isinstance(value, (int, float)) else "-"


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else _md(str(value))


def _colour(rgb: Sequence[int]) -> str:
    return f"#{bytes(rgb).hex()}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def _yaml(text: str) -> str:
    return json.dumps(_plain(text), ensure_ascii=False)


def _md(text: str) -> str:
    """Text as itself, without what Markdown or HTML would take for its own."""
    return re.sub(r"([\\`*_\[\]<>|&#])", r"\\\1", _plain(text))


def _plain(text: str) -> str:
    """One line of printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
