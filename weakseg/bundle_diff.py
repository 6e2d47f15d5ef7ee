"""What differs between two bundles: fields of the manifest by path, figures side by side, files by hash and size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weakseg.bundle import Bundle
from weakseg.records import to_json
from weakseg.text import size_text, table

# Lists of records, with the keys that tell their records apart; the rest of the manifest is compared by path.
RECORDS = {"metrics": ("what", "split", "tags"), "parity": ("graph", "runtime", "precision")}
LONG = 60  # characters of a value


@dataclass(frozen=True)
class Change:
    """A value at a path such as `background.t`, in the first and in the second bundle; None = not there."""

    path: str
    first: Any
    second: Any


def diff(first: Bundle, second: Bundle) -> dict[str, Any]:
    """What differs, ready for JSON; all of it is empty where nothing does.

    Returns:
        {"fields": [{"path", "first", "second"}], "metrics": [{"what", "split", "tags", "figure", "first", "second",
        "difference"}], "parity": the same with "graph", "runtime" and "precision", "files": [{"file", "first",
        "second"}], which are {"bytes", "sha256"}}; null = not there.
    """
    ours, theirs = to_json(first.manifest), to_json(second.manifest)
    plain = [{k: v for k, v in m.items() if k not in (*RECORDS, "files")} for m in (ours, theirs)]
    return {
        "fields": [vars(change) for change in changes(plain[0], plain[1])],
        **{name: _records(ours[name], theirs[name], keys) for name, keys in RECORDS.items()},
        "files": _files(first, second),
    }


def shown(first: Bundle, second: Bundle, found: Mapping[str, Any]) -> str:
    """The result of `diff` as text."""
    parts = [
        "\n".join(
            f"{which:<6}  {bundle.manifest.id}  {bundle.folder}  sha256 {bundle.sha256[:12]}…"
            for which, bundle in (("first", first), ("second", second))
        )
    ]
    if not any(found.values()):
        return "\n\n".join([*parts, "nothing differs"])
    if found["fields"]:
        rows = [[row["path"], *_pair(row["first"], row["second"])] for row in found["fields"]]
        parts.append(table(["field", "first", "second"], rows))
    for name, keys in RECORDS.items():
        if found[name]:
            rows = [
                [
                    *(str(row[key]) for key in keys),
                    row["figure"],
                    _value(row["first"]),
                    _value(row["second"]),
                    "-" if row["difference"] is None else f"{row['difference']:+.4g}",
                ]
                for row in found[name]
            ]
            parts.append(table([*keys, name, "first", "second", "difference"], rows))
    if found["files"]:
        rows = [[row["file"], _file(row["first"]), _file(row["second"])] for row in found["files"]]
        parts.append(table(["file", "first", "second"], rows))
    return "\n\n".join(parts)


def changes(first: Any, second: Any, path: str = "") -> Iterator[Change]:
    """Differing values of two JSON values, by path: into objects, and into lists of equal length."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in dict.fromkeys([*first, *second]):
            yield from changes(first.get(key), second.get(key), f"{path}.{key}" if path else key)
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for i, (ours, theirs) in enumerate(zip(first, second, strict=True)):
            yield from changes(ours, theirs, f"{path}[{i}]")
    elif first != second:
        yield Change(path, first, second)


def _records(first: list[dict[str, Any]], second: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Differing figures and conditions of records of the same thing; of a record on one side only its figures."""
    ours, theirs = ({tuple(str(r.get(key)) for key in keys): r for r in records} for records in (first, second))
    rows = []
    for which in dict.fromkeys([*ours, *theirs]):
        one_sided = which not in ours or which not in theirs
        for change in changes(ours.get(which, {}), theirs.get(which, {})):
            if one_sided and not isinstance(change.second if change.first is None else change.first, float):
                continue
            numbers = [v for v in (change.first, change.second) if type(v) in (int, float)]
            difference = numbers[1] - numbers[0] if len(numbers) == 2 else None
            row = dict(zip(keys, which, strict=True)) | {"figure": change.path}
            rows.append(row | {"first": change.first, "second": change.second, "difference": difference})
    return rows


def _files(first: Bundle, second: Bundle) -> list[dict[str, Any]]:
    rows = []
    for name in sorted({*first.manifest.files, *second.manifest.files}):
        ours, theirs = (_described(bundle, name) for bundle in (first, second))
        if ours != theirs:
            rows.append({"file": name, "first": ours, "second": theirs})
    return rows


def _described(bundle: Bundle, name: str) -> dict[str, Any] | None:
    digest = bundle.manifest.files.get(name)
    return None if digest is None else {"bytes": (bundle.folder / name).stat().st_size, "sha256": digest}


def _pair(first: Any, second: Any) -> tuple[str, str]:
    """Two values as text; of lists what the other one lacks."""
    if isinstance(first, list) and isinstance(second, list):
        first, second = [v for v in first if v not in second], [v for v in second if v not in first]
    return _value(first), _value(second)


def _value(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONG else text[: LONG - 1] + "…"


def _file(described: Mapping[str, Any] | None) -> str:
    return "-" if described is None else f"{size_text(described['bytes'])}, {described['sha256'][:12]}…"
