"""`weakseg doctor`: the command. It imports what may be missing only once it has found that it is there."""

from __future__ import annotations

import json
import platform
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module

from serve.doctor.finding import Finding, failed, ok
from weakseg.environment import package_version
from weakseg.version import __version__

NEEDED = (  # a server imports nothing that can be missing beyond these
    "weakseg.v1.segmentation_service_pb2_grpc",
    "serve.inference.grpc_inference_service_pb2_grpc",
    "serve.server",
)
PACKAGES = ("grpcio", "protobuf", "onnxruntime", "onnxruntime-gpu", "numpy")
MARKS = {"ok": "ok", "warning": "WARNING", "failed": "FAILED"}


def main(argv: Sequence[str]) -> int:
    """0: all is well, or there are warnings; 1: something has failed."""
    findings, as_json = [packages()], "--json" in argv
    if findings[0].status == "ok":
        from serve.doctor.examination import examine

        findings += examine(argv)
    n_failed = sum(one.status == "failed" for one in findings)
    if as_json:
        print(json.dumps({"ok": not n_failed, "checks": [asdict(one) for one in findings]}))
    else:
        print(text(findings))
    return 1 if n_failed else 0


def packages() -> Finding:
    """Whether a server can be imported: generated code refuses runtimes that are older than it."""
    versions = [f"weakseg {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {found}" for name in PACKAGES if (found := package_version(name))]
    try:
        for module in NEEDED:
            import_module(module)
    except Exception as error:  # grpc and protobuf have their own for versions that do not fit
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        todo = "pip install --upgrade 'weakseg[serve]', in an environment of its own"
        return failed("packages", f"{what} ({', '.join(versions)})", todo)
    return ok("packages", ", ".join(versions))


def text(findings: Sequence[Finding]) -> str:
    """A line for each check and, where there is something to do, one below it; wrapped for the terminal."""
    columns = shutil.get_terminal_size((120, 0)).columns
    left = max(len(one.check) for one in findings)
    lines = []
    for one in findings:
        begin = f"{MARKS[one.status]:<7}  {one.check:<{left}}  "
        lines += _wrapped(one.found, begin, columns)
        if one.todo:
            lines += _wrapped(one.todo, f"{'':<{left + 9}}→ ", columns)
    counts = [f"{sum(one.status == status for one in findings)} {status}" for status in MARKS]
    return "\n".join([*lines, ", ".join(counts)])


def _wrapped(said: str, begin: str, columns: int) -> list[str]:
    """Lines that go on below their own beginning; names of files are not broken."""
    below = " " * len(begin)
    return textwrap.wrap(
        " ".join(said.split()),
        max(columns, len(begin) + 40),
        initial_indent=begin,
        subsequent_indent=below,
        break_long_words=False,
        break_on_hyphens=False,
    )
