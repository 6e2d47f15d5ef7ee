"""`weakseg <verb>`: finds the module of a verb by name and turns errors into messages and exit codes.

Modules are named, not imported: `weakseg predict` loads no torch, and `weakseg` depends on none of the stages above it.
Each module has `main(argv) -> int`. Exit codes: 0 ok, 1 failure, 2 usage, 3 partial, 130 interrupted.
"""

from __future__ import annotations

import difflib
import errno
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from weakseg.errors import UsageError, WeaksegError
from weakseg.version import __version__


@dataclass(frozen=True)
class Verb:
    """`before` goes in front of the user's arguments."""

    module: str
    help: str
    before: tuple[str, ...] = ()


VERBS = {
    "demo": Verb("weakseg.demo", "synthetic photographs, every stage, a served model, a report: in minutes"),
    "data": Verb("weakseg.datasets.commands", "make-synthetic, check, stats"),
    "run": Verb("weakseg.run", "all stages of a recipe; skips what is done, resumes what was killed"),
    "train": Verb("weakseg.run", "one stage of a recipe: the classifier", ("--only", "train")),
    "cam": Verb("weakseg.run", "one stage: class activation maps", ("--only", "cam")),
    "pseudo-label": Verb("weakseg.batch.commands", "masks of many images, resumable; of a recipe: that stage"),
    "train-seg": Verb("weakseg.run", "one stage: the segmentation network", ("--only", "train_seg")),
    "evaluate": Verb("weakseg.run", "one stage: scores against true masks", ("--only", "evaluate")),
    "compare": Verb("weakseg.compare", "scores of several runs beside each other"),
    "report": Verb("weakseg.report.commands", "a run folder as one HTML page"),
    "submission": Verb("weakseg.submission", "predictions as the archive that the PASCAL VOC test server takes"),
    "export": Verb("export.commands", "trained networks to a model bundle"),
    "bundle": Verb("weakseg.bundle_commands", "look into a model bundle: show, verify, diff; fetch it, sign it"),
    "serve": Verb("serve.commands", "model bundles over gRPC"),
    "doctor": Verb("serve.doctor.commands", "is this machine, or this pod, fit to serve: what to mend"),
    "admin": Verb("weakseg.admin_commands", "a server that runs: load and unload its models, set its log level"),
    "predict": Verb("weakseg.predict", "masks of images, by a bundle or a server"),
}
STAGES = ("training", "export", "serve")  # top-level packages of ours whose names others use, too
EXTRAS = {  # top-level import name -> the extra that brings it
    "torch": "train",
    "tensorboard": "train",
    "safetensors": "train",
    "transformers": "hf",
    "numba": "refine",
    "llvmlite": "refine",
    "pydensecrf": "crf",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "serve",
    "grpc": "client",
    "google": "client",
    "grpc_health": "serve",
    "grpc_reflection": "serve",
    "grpc_status": "serve",
    "prometheus_client": "serve",
    "fsspec": "batch",
    "pyarrow": "batch",
    "ray": "ray",
    "cryptography": "sign",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. `argv` is without the program's name, None = the command line's."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args)
    except WeaksegError as error:
        return _fail(args, error.reason, str(error), error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in STAGES:
            return _fail(args, "NAME_CLASH", _clash_message(package, error.name or package), 1)
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        message = f"this needs the package {package}, which is not installed: pip install 'weakseg[{extra}]'"
        return _fail(args, "MISSING_PACKAGE", message, 1)
    except OSError as error:
        return _fail(args, "OS", _os_message(error), 1)
    except KeyboardInterrupt:
        return _fail(args, "INTERRUPTED", "interrupted; what was finished is kept", 130)


def usage() -> str:
    """The text of `weakseg --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: weakseg VERB [arguments]",
            "",
            "Image-level labels in, pixel masks out, served.",
            "",
            *lines,
            "",
            "`weakseg VERB --help` says more; every verb takes --json. `weakseg --version` prints the version.",
        ]
    )


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else UsageError.exit_code
    if args[0] in ("-V", "--version"):
        print(__version__)
        return 0
    if args[0] not in VERBS:
        near = difflib.get_close_matches(args[0], VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(VERBS)}"
        raise UsageError(f"unknown verb {args[0]!r}: {hint}")
    verb = VERBS[args[0]]
    return int(import_module(verb.module).main([*verb.before, *args[1:]]))


def _fail(args: Sequence[str], reason: str, message: str, code: int) -> int:
    if "--json" in args:
        print(json.dumps({"error": {"reason": reason, "message": message}}))
    else:
        print(f"error: {message}", file=sys.stderr)
    return code


def _clash_message(package: str, missing: str) -> str:
    found = find_spec(package)
    folder = found and (next(iter(found.submodule_search_locations or ()), None) or found.origin)
    where = f"another package {package} at {folder}" if folder else f"no package {package}"
    return (
        f"expected weakseg's {missing}, got {where}: install weakseg into an environment of its own, and start it "
        f"where no other {package} comes first on Python's path (PYTHONPATH, the current folder of `python -m weakseg`)"
    )


def _os_message(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    message = f"{where}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message += ". Free some space and run the same command again: finished work is kept, no file is half-written"
    return message
