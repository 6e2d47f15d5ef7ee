"""`weakseg bundle show|verify PATH`: look into a model bundle. Both verify it first."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weakseg.bundle import Bundle, open_bundle
from weakseg.records import to_json
from weakseg.text import table

SHOWN_CLASSES = 30


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    opened = open_bundle(args.path)
    if args.json:
        print(json.dumps({"folder": str(opened.folder), "sha256": opened.sha256, "manifest": to_json(opened.manifest)}))
    elif args.action == "show":
        print(shown(opened))
    else:
        n_files = len(opened.manifest.files)
        print(f"{opened.folder}: {opened.manifest.id} is whole: {n_files} files as listed, sha256 {opened.sha256}")
    return 0


def shown(opened: Bundle) -> str:
    """What a person wants to know of a bundle, as text."""
    m = opened.manifest
    more = ", …" if len(m.classes) > SHOWN_CLASSES else ""
    policy = "scaled down" if m.input.policy == "fit" else "refused"
    crf = "dense CRF" if m.pseudo_label.crf else "no CRF"
    facts = [
        ("model", m.id),
        ("folder", str(opened.folder)),
        ("sha256", opened.sha256),
        ("classes", f"{len(m.classes)}: {', '.join(m.classes[:SHOWN_CLASSES])}{more}"),
        ("outputs", ", ".join(m.outputs)),
        ("input", f"at most {m.input.max_side} pixels a side, larger ones are {policy}"),
        ("present", f"score >= {m.presence:g}"),
        ("background", f"{m.background.t:g} (rule {m.background.rule}: {m.background.provenance})"),
        ("pseudo-masks", f"{crf}, band {m.pseudo_label.band:g}"),
        ("method", f"{m.method}, maps by {m.cam.method} at scales {_listed(m.cam.scales)}{' and flips' * m.cam.flip}"),
        ("made by", _provenance(opened)),
        ("licences", f"data: {m.licences.data}; weights: {m.licences.weights}"),
    ]
    width = max(len(name) for name, _ in facts)
    parts = ["\n".join(f"{name:<{width}}  {value}" for name, value in facts)]
    files = [[name, _size((opened.folder / name).stat().st_size), digest] for name, digest in m.files.items()]
    parts.append(table(["file", "size", "sha256"], files))
    if m.metrics:
        parts.append(table(["measured", "split", "tags", "mIoU"], [_metric(record) for record in m.metrics]))
    return "\n\n".join(parts)


def _provenance(opened: Bundle) -> str:
    p = opened.manifest.provenance
    named = {"weakseg": p.weakseg, "torch": p.torch, "recipe": p.recipe, "seed": p.seed, "commit": p.commit}
    return ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)


def _metric(record: dict[str, Any]) -> list[str]:
    miou = record.get("miou")
    shown_miou = f"{100 * miou:.1f}" if isinstance(miou, (int, float)) else "-"
    return [str(record.get(key, "-")) for key in ("what", "split", "tags")] + [shown_miou]


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.1f} KiB"


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weakseg bundle", description="Look into a model bundle.", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="show|verify")
    for name, text in {"show": "what the model is, can do and was made from", "verify": "whether it is whole"}.items():
        action = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        action.add_argument(
            "path", metavar="PATH", type=Path, help="a bundle, a model's folder or a folder of one model"
        )
        action.add_argument("--json", action="store_true", help="print the manifest as JSON, and nothing else")
    return parser
