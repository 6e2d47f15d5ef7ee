"""`weakseg run RECIPE`: the stages of a recipe in order; what is done is skipped, what was killed goes on.

A stage is done when `<stage>/done.json` is there with the stage's key. It is written last. `<stage>/started.json` holds
the key of an attempt under way: another key there means that the folder holds results of other settings, and it is
emptied before the stage runs.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from weakseg import crf, processes
from weakseg.datasets import read
from weakseg.environment import describe
from weakseg.errors import UsageError
from weakseg.files import write_json_atomic
from weakseg.locks import locked
from weakseg.masks.corrections import corrections_of
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.recipe_loading import load_recipe, override, recipe_names
from weakseg.run_folder import rate_text, read_evaluations, read_json
from weakseg.stages import STAGES, plan, stage_keys
from weakseg.text import table

LOCK = ".lock"  # in the run folder


def main(argv: Sequence[str]) -> int:
    """Entry of `weakseg run` and of the verbs that run one stage."""
    parser = _parser()
    args, overrides = parser.parse_known_args(argv)
    if args.recipe is None:
        parser.print_help()
        return 0 if args.help else UsageError.exit_code
    overrides += ["--train_seg.corrections", args.corrections] if args.corrections is not None else []
    overrides += ["--help"] if args.help else []
    recipe = override(load_recipe(args.recipe), overrides, prog=f"weakseg run {args.recipe}")
    folder = args.folder or Path("runs") / recipe.name
    silent = args.json or processes.rank() > 0
    progress = Progress("silent" if silent else "auto")
    done = run(recipe, folder, only=args.only, first=args.first, last=args.last, progress=progress)
    if processes.rank() > 0:
        return 0
    if args.json:
        print(json.dumps({"folder": str(folder), "recipe": recipe.name, "stages": done}))
    else:
        print(summary(folder, done))
        if "report" in done:
            print(f"\nreport: {folder / 'report.html'}")
    return 0


def run(
    recipe: Recipe,
    folder: Path,
    *,
    only: str | None = None,
    first: str | None = None,
    last: str | None = None,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Run the stages that are not done; returns {stage: done.json}. Of several processes the first alone; others help.

    Args:
        only: this stage alone; its inputs must be done.
        first: this stage and all after it that are to run do so anew, done or not.
        last: the run ends after this stage.
    Raises:
        UsageError: an unknown stage, `only` with `last`, a `first` that is none of those to run, an input of `only`
        that is not done.
        InUseError: another process runs in the folder.
    """
    names = _chosen(recipe, only, first, last)
    if processes.rank() > 0:
        processes.follow(lambda name: _run(name, recipe, folder, progress))
        return {}
    keys = stage_keys(recipe)
    if only is not None:
        _require_inputs(only, folder, keys)
    _check_crf(recipe, names)
    _check_corrections(recipe, folder, names, keys)
    with locked(folder / LOCK), processes.leading():
        write_json_atomic(folder / "config.json", asdict(recipe))
        write_json_atomic(folder / "environment.json", describe(recipe.seed))
        for name in names[names.index(first) :] if first is not None else []:
            shutil.rmtree(folder / name, ignore_errors=True)
        return {name: run_stage(name, recipe, folder, keys[name], progress) for name in names}


def _chosen(recipe: Recipe, only: str | None, first: str | None, last: str | None) -> list[str]:
    """The stages to run, in order."""
    names = plan(recipe)
    for name in (only, first, last):
        if name is not None and name not in names:
            raise UsageError(f"expected a stage of this recipe ({', '.join(names)}), got {name!r}")
    if only is not None and last is not None:
        raise UsageError(f"--only {only} runs that stage alone, --to {last} all up to that one: give one of the two")
    if only is not None:
        names = [only]
    elif last is not None:
        names = names[: names.index(last) + 1]
    if first is not None and first not in names:
        raise UsageError(f"expected --from one of the stages to run ({', '.join(names)}), got {first!r}")
    return names


def _check_crf(recipe: Recipe, names: Sequence[str]) -> None:
    """What would otherwise fail after the training: a CRF that is not installed, or cannot be."""
    walk = None if recipe.affinity is None else recipe.affinity.walk.crf
    used = [
        (recipe.pseudo_label.crf, {"pseudo_label", "evaluate"}),
        (walk, {"random_walk"}),
        (recipe.evaluate.seg_crf, {"evaluate"}),
    ]
    for config in [config for config, stages in used if config is not None and stages & set(names)]:
        crf.check_config(config)
        crf.check_available(config.backend)


def _check_corrections(recipe: Recipe, folder: Path, names: Sequence[str], keys: dict[str, str]) -> None:
    """Corrections that cannot be used are refused before the stages that come before the one that learns from them."""
    path = None if recipe.train_seg is None else recipe.train_seg.corrections
    done = folder / "train_seg" / "done.json"
    if path is not None and "train_seg" in names[1:] and _key_of(done) != keys["train_seg"]:
        for _ in corrections_of(Path(path), read(recipe.data, recipe.data.train)):
            pass


def run_stage(name: str, recipe: Recipe, folder: Path, key: str, progress: Progress) -> dict[str, Any]:
    """One stage, unless it is done; returns its done.json."""
    done = folder / name / "done.json"
    if _key_of(done) == key:
        progress.say(f"{name}: up to date")
        return dict(read_json(done))
    started = folder / name / "started.json"
    if _key_of(started) != key:
        shutil.rmtree(folder / name, ignore_errors=True)
    done.unlink(missing_ok=True)
    write_json_atomic(started, {"key": key})
    progress.say(f"{name}: started")
    began, cpu_began = time.monotonic(), _cpu_seconds()
    if STAGES[name].parallel:
        processes.call(name)
    result = _run(name, recipe, folder, progress)
    seconds, n_images = time.monotonic() - began, result["n_images"]
    record = {
        "key": key,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(_cpu_seconds() - cpu_began, 3),
        "n_images": n_images,
        "images_per_s": round(n_images / seconds, 3) if n_images else None,
        "summary": result,
    }
    write_json_atomic(done, record)
    progress.say(f"{name}: done in {seconds:.1f} s" + (f", {rate_text(record)} images/s" if rate_text(record) else ""))
    return record


def _run(name: str, recipe: Recipe, folder: Path, progress: Progress) -> Any:
    return import_module(STAGES[name].module).run(recipe, folder, stage=name, progress=progress)


def summary(folder: Path, done: dict[str, dict[str, Any]]) -> str:
    """What a run came to: time a stage, mIoU of every evaluation."""
    times = [[name, f"{record['seconds']:.1f} s", rate_text(record)] for name, record in done.items()]
    parts = [table(["stage", "time", "images/s"], times)]
    scores = score_rows(folder)
    if scores:
        parts.append(table(["mIoU of", "split", "tags", "threshold", "mIoU"], scores))
    return "\n\n".join(parts)


def score_rows(folder: Path) -> list[list[str]]:
    """[what, split, tags, threshold rule, mIoU in %] of each evaluation of a run."""
    rows = []
    for record in read_evaluations(folder):
        threshold = record["threshold"]
        rule = "-" if threshold is None else f"{threshold['rule']} t = {threshold['t']:.2f}"
        miou = "-" if record["miou"] is None else f"{100 * record['miou']:.1f}"
        rows.append([record["what"], record["split"], record["tags"], rule, miou])
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weakseg run",
        description="Run the stages of a recipe: " + " -> ".join(STAGES),
        epilog=f"Recipes: {', '.join(recipe_names())}. Any key of a recipe can be set: --train.optim.lr 0.02; "
        "`weakseg run RECIPE --help` lists them.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a name, or a Python file that defines RECIPE")
    parser.add_argument("-h", "--help", action="store_true", help="after a recipe: every key of it")
    parser.add_argument("--folder", type=Path, help="where results go (default: runs/<recipe>)")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="run this stage and all after it anew")
    parser.add_argument("--to", dest="last", metavar="STAGE", help="stop after this stage")
    parser.add_argument("--only", metavar="STAGE", help="run this stage alone")
    parser.add_argument(
        "--corrections",
        metavar="FILE",
        help="masks that people corrected, for train_seg: of Label Studio, CVAT or COCO, or a folder of index PNGs",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
    return parser


def _require_inputs(name: str, folder: Path, keys: dict[str, str]) -> None:
    for needed in STAGES[name].inputs:
        if needed in keys and _key_of(folder / needed / "done.json") != keys[needed]:
            raise UsageError(
                f"{name} reads the results of {needed}, and {folder / needed} has none for this recipe: "
                f"run that stage first, or the whole recipe with `weakseg run`"
            )


def _key_of(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text())["key"])
    except (OSError, ValueError, KeyError):
        return None


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
