"""The record of an output: what made it (config.json) and a row for every image (manifest/part-*.jsonl).

Nothing here depends on when or where it ran: the same images, model and settings give the same bytes. Times are
written elsewhere (telemetry.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

SCHEMA = 1
CONFIG = "config.json"
FOLDER = "manifest"
SUCCESS = "_SUCCESS"  # there once every shard's part is


class Written(TypedDict):
    """One file of an image."""

    path: str  # relative to the output
    sha256: str
    bytes: int


class ClassRow(TypedDict):
    """One class of a mask, background and IGNORE left out."""

    value: int
    name: str
    area_px: int
    confidence: float | None  # mean over its pixels, see weakseg.quality


class Failure(TypedDict):
    reason: str  # of weakseg/errors.py
    message: str


class Row(TypedDict, total=False):
    """One image. Failed ones have `uri`, `key`, `status`, `size_bytes`, `error` and what is known besides."""

    uri: str
    key: str
    status: Literal["ok", "failed"]
    size_bytes: int | None  # of the image file; another size is another image
    sha256: str  # of the image file
    width: int
    height: int
    tags: list[str] | None  # as given; None = present classes are those of high score
    present: list[str]  # classes that the mask could show: the tags, or those of high score; none of a segmentation
    classes: list[ClassRow]
    scores: dict[str, float]  # of classes with at least MIN_SCORE
    quality: dict[str, float | int | None]  # confidence and entropy of the mask, pixels left undecided
    threshold: dict[str, Any] | None  # t, rule, provenance; None of a segmentation
    refined_by: str | None
    refinement_cut_short: bool  # a server had no time for it
    outputs: dict[str, Written]
    model: str
    model_sha256: str
    config_sha256: str
    error: Failure


MIN_SCORE = 0.01


def shard_name(index: int, n: int) -> str:
    return f"{index:05d}-of-{n:05d}"


def part_path(index: int, n: int) -> str:
    return f"{FOLDER}/part-{shard_name(index, n)}.jsonl"


def line_of(row: Row) -> bytes:
    """One line of JSON with its newline."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """config.json; its hash stands in every row."""
    return (json.dumps({"schema": SCHEMA, **config}, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
