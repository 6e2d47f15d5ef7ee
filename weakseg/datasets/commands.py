"""`weakseg data make-synthetic | check | stats`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from weakseg.datasets.check import check
from weakseg.datasets.read import read
from weakseg.datasets.stats import stats
from weakseg.datasets.synthetic import make_synthetic
from weakseg.progress import Progress
from weakseg.recipe import DataConfig


@dataclass(frozen=True)
class _Data(DataConfig):
    """The same settings, the root without a flag."""

    root: tyro.conf.Positional[str] = DataConfig.root


def _make_synthetic(
    root: tyro.conf.Positional[str] = DataConfig.root,
    n_train: int = 500,
    n_val: int = 150,
    n_tune: int = 50,
    size_px: int = 160,
    seed: int = 0,
    workers: int = 1,
    json: bool = False,
) -> int:
    """Generate the synthetic dataset. Does nothing if it is already there.

    Args:
        root: folder to create.
        n_train: training images.
        n_val: validation images.
        n_tune: so many of the training ids also form the list `tune`.
        size_px: long side of the images, up to 1.2 times as much.
        seed: other pictures of the same kind.
        workers: processes.
        json: one JSON object instead of text.
    """
    made = make_synthetic(
        root,
        n_train,
        n_val,
        n_tune=n_tune,
        size_px=size_px,
        seed=seed,
        workers=workers,
        progress=_progress(json),
    )
    result = {"root": root, "made": made, "n_train": n_train, "n_val": n_val, "n_tune": n_tune, "seed": seed}
    _say(result if json else f"{root}: {n_train} + {n_val} images {'written' if made else 'were already there'}")
    return 0


def _check(
    data: Annotated[_Data, tyro.conf.OmitArgPrefixes], strict: bool = False, workers: int = 1, json: bool = False
) -> int:
    """List everything that is wrong with a dataset. Changes nothing; exit code 1 if there are errors.

    Args:
        data: the dataset.
        strict: exit code 1 for warnings too.
        workers: processes that decode.
        json: one JSON object instead of text.
    """
    findings = check(data, workers=workers, progress=_progress(json))
    count = Counter(finding.level for finding in findings)
    if json:
        _say({"errors": count["error"], "warnings": count["warning"], "findings": [asdict(f) for f in findings]})
    else:
        for finding in findings:
            print(f"{finding.level}: {finding.where}: {finding.message}")
        print(f"{data.root}: {count['error']} errors, {count['warning']} warnings")
    return 1 if count["error"] or (strict and count["warning"]) else 0


def _stats(
    data: Annotated[_Data, tyro.conf.OmitArgPrefixes], splits: tuple[str, ...] | None = None, json: bool = False
) -> int:
    """Class counts, what occurs together, tags per image and image sizes.

    Args:
        data: the dataset.
        splits: default: train and val.
        json: one JSON object instead of text.
    """
    found = [stats(read(data, split)) for split in splits or (data.train, data.val)]
    _say([item.as_json() for item in found] if json else "\n\n".join(item.as_text() for item in found))
    return 0


def main(argv: list[str]) -> int:
    """Run `weakseg data <argv>`; returns the exit code. A wrong flag ends in SystemExit(2), data errors are raised."""
    code: int = tyro.extras.subcommand_cli_from_dict(
        {"make-synthetic": _make_synthetic, "check": _check, "stats": _stats},
        prog="weakseg data",
        description=__doc__,
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return code


def _progress(quiet: bool) -> Progress:
    return Progress("silent" if quiet else "auto")


def _say(result: object) -> None:
    print(result if isinstance(result, str) else json.dumps(result, indent=2))
