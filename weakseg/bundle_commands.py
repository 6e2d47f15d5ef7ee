"""`weakseg bundle show|verify|diff|fetch|sign|keygen`: look into model bundles, compare, fetch and sign them.

Whatever looks into a bundle verifies it first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from weakseg import bundle_diff, bundle_fetch, signature
from weakseg.bundle import SIGNATURE, Bundle, open_bundle, read_manifest, read_signature
from weakseg.errors import BundleError
from weakseg.files import write_bytes_atomic
from weakseg.records import to_json
from weakseg.text import size_text, table

SHOWN_CLASSES = 30


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)


def show(args: argparse.Namespace) -> int:
    opened = open_bundle(args.path, public_key=args.public_key)
    print(json.dumps(_json(opened)) if args.json else shown(opened))
    return 0


def verify(args: argparse.Namespace) -> int:
    opened = open_bundle(args.path, public_key=args.public_key)
    if args.json:
        print(json.dumps(_json(opened)))
    else:
        n_files = len(opened.manifest.files)
        print(f"{opened.folder}: {opened.manifest.id} is whole: {n_files} files as listed, sha256 {opened.sha256}")
        print(f"signature: {_signature(opened)}")
    return 0


def diff(args: argparse.Namespace) -> int:
    first, second = open_bundle(args.first), open_bundle(args.second)
    found = bundle_diff.diff(first, second)
    equal = not any(found.values())
    if args.json:
        sides = {
            name: {"folder": str(b.folder), "sha256": b.sha256} for name, b in (("first", first), ("second", second))
        }
        print(json.dumps({"equal": equal, **sides, **found}))
    else:
        print(bundle_diff.shown(first, second, found))
    return 0 if equal else 1


def fetch(args: argparse.Namespace) -> int:
    opened, came = bundle_fetch.fetch(args.source, args.models, sha256=args.sha256, public_key=args.public_key)
    if args.json:
        print(json.dumps(_json(opened) | {"fetched": came}))
    else:
        how = "fetched from" if came else "was already here, the same as at"
        print(f"{opened.folder}: {opened.manifest.id} {how} {bundle_fetch.shown(args.source)}, sha256 {opened.sha256}")
        print(f"signature: {_signature(opened)}")
    return 0


def sign(args: argparse.Namespace) -> int:
    """Sign what was verified: the manifest that is signed is the one whose files were found whole."""
    opened = open_bundle(args.path)
    manifest = read_manifest(opened.folder)
    if hashlib.sha256(manifest).hexdigest() != opened.sha256:
        raise BundleError(f"{opened.folder}: the manifest was changed while it was verified: sign it again")
    data = signature.sign(manifest, args.key)
    path = opened.folder / SIGNATURE
    write_bytes_atomic(path, data)
    key = signature.parse(data, str(path)).key
    if args.json:
        print(json.dumps({"folder": str(opened.folder), "sha256": opened.sha256, "key": key}))
    else:
        print(f"{path}: {opened.manifest.id} is signed by key {key}")
    return 0


def keygen(args: argparse.Namespace) -> int:
    public, key = signature.keygen(args.path)
    if args.json:
        print(json.dumps({"private_key": str(args.path), "public_key": str(public), "key": key}))
    else:
        print(f"{args.path}: the private key; keep it secret, whoever has it can sign as you")
        print(f"{public}: the public key {key}; give it to those who check, as --public-key or WEAKSEG_PUBLIC_KEY")
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
        ("signature", _signature(opened)),
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
    graphs = [[name, ", ".join(graph.files()), ", ".join(graph.outputs)] for name, graph in m.graphs.items()]
    parts.append(table(["graph", "precisions", "outputs"], graphs))
    files = [[name, size_text((opened.folder / name).stat().st_size), digest] for name, digest in m.files.items()]
    parts.append(table(["file", "size", "sha256"], files))
    if m.metrics:
        parts.append(table(["measured", "split", "tags", "mIoU"], [_metric(record) for record in m.metrics]))
    if m.parity:
        keys = list(dict.fromkeys(key for record in m.parity for key in record))
        rows = [[_cell(record.get(key)) for key in keys] for record in m.parity]
        parts.append("differences from torch\n" + table(keys, rows))
    return "\n\n".join(parts)


def _provenance(opened: Bundle) -> str:
    p = opened.manifest.provenance
    named = {"weakseg": p.weakseg, "torch": p.torch, "recipe": p.recipe, "seed": p.seed, "commit": p.commit}
    return ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)


def _metric(record: dict[str, Any]) -> list[str]:
    miou = record.get("miou")
    shown_miou = f"{100 * miou:.1f}" if isinstance(miou, (int, float)) else "-"
    return [str(record.get(key, "-")) for key in ("what", "split", "tags")] + [shown_miou]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _signature(opened: Bundle) -> str:
    if opened.signed_by is not None:
        return f"by key {opened.signed_by}, checked"
    made = read_signature(opened.folder)
    if made is None:
        return "none"
    return f"by key {signature.parse(made, str(opened.folder / SIGNATURE)).key}, it says: --public-key checks it"


def _json(opened: Bundle) -> dict[str, Any]:
    """`signed_by` is the key that was checked; null where none was asked for."""
    return {
        "folder": str(opened.folder),
        "sha256": opened.sha256,
        "signed_by": opened.signed_by,
        "manifest": to_json(opened.manifest),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weakseg bundle", description="Look into model bundles, compare, fetch and sign them.", allow_abbrev=False
    )
    actions = parser.add_subparsers(required=True, metavar="show|verify|diff|fetch|sign|keygen")
    _action(actions, show, "what the model is, can do and was made from", ("path",), public_key=True)
    _action(
        actions, verify, "whether it is whole, and with --public-key whether it is signed", ("path",), public_key=True
    )
    _action(
        actions,
        diff,
        "what differs: exit code 0 = nothing, 1 = something, or one cannot be opened",
        ("first", "second"),
    )
    action = _action(actions, fetch, "copy it into a folder of models, verified, whole or not at all", public_key=True)
    action.add_argument(
        "source", metavar="SOURCE", help="a bundle, or the folder of a version on http(s)://, s3:// and the like"
    )
    action.add_argument("models", metavar="MODELS", type=Path, help="it comes to MODELS/<name>/<version>")
    action.add_argument("--sha256", help="of its manifest.json, as `weakseg bundle verify` prints it")
    action = _action(actions, sign, "verify it, then write manifest.sig, which says who made it", ("path",))
    action.add_argument(
        "--key", type=Path, required=True, help="the private key, PEM; `weakseg bundle keygen` makes one"
    )
    action = _action(actions, keygen, "a new key to sign with: PATH, and PATH with the suffix .pub to check with")
    action.add_argument("path", metavar="PATH", type=Path, help="of the private key, signing.pem say")
    return parser


def _action(
    actions: Any,
    run: Callable[[argparse.Namespace], int],
    text: str,
    bundles: Sequence[str] = (),
    *,
    public_key: bool = False,
) -> argparse.ArgumentParser:
    action: argparse.ArgumentParser = actions.add_parser(run.__name__, help=text, description=text, allow_abbrev=False)
    action.set_defaults(run=run)
    for name in bundles:
        what = "a bundle, a model's folder or a folder of one model"
        action.add_argument(name, metavar=name.upper(), type=Path, help=what)
    if public_key:
        action.add_argument("--public-key", type=Path, help="PEM file of the keys of which one must have signed it")
    action.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
    return action
