"""`weakseg serve`: model bundles over gRPC."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro

from serve.logs import set_up
from serve.models import find_bundles
from serve.server import Server, serve
from serve.settings import ServeConfig, config_from_env
from weakseg.bundle import MANIFEST

DEMO_BUNDLES = Path("runs/demo/bundle")


@dataclass(frozen=True)
class Arguments:
    """Serve model bundles over gRPC (weakseg.v1.SegmentationService), with health, reflection and metrics.

    Every flag below but --demo and --json is also an environment variable: --max-batch 4 is WEAKSEG_MAX_BATCH=4.
    """

    config: Annotated[ServeConfig, tyro.conf.arg(name="")] = field(default_factory=ServeConfig)
    demo: bool = False  # serve the bundle of `weakseg demo`; trains it first where there is none
    json: bool = False  # print one JSON object about the ports and models to stdout once they are open


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    default = Arguments(config=config_from_env())
    arguments = tyro.cli(Arguments, args=list(argv), default=default, prog="weakseg serve")
    config = arguments.config
    if arguments.demo:
        config = replace(config, bundle=(*config.bundle, demo_bundle(DEMO_BUNDLES)))
    folders = find_bundles(config.bundle, config.models)
    set_up(config.log_format, config.log_level)
    asyncio.run(serve(config, folders, print_json if arguments.json else print_hint))
    return 0


def demo_bundle(bundles: Path) -> Path:
    """The newest bundle below a folder; where there is none, `weakseg demo` makes one first."""
    if not list(bundles.glob(f"*/*/{MANIFEST}")):
        print("no demo bundle yet: running `weakseg demo` first, which takes some minutes", file=sys.stderr)
        # By name, as the console command does it: training and torch are no dependency of this package.
        import_module("weakseg.demo").main([])
    found = bundles.glob(f"*/*/{MANIFEST}")
    return max(found, key=lambda manifest: manifest.stat().st_mtime).parent


def print_hint(server: Server) -> None:
    host = "localhost" if server.config.host in ("0.0.0.0", "::") else server.config.host
    print(
        f"gRPC on port {server.port}, metrics on http://{host}:{server.metrics_port}/metrics; try:\n"
        f"  weakseg predict IMAGE --endpoint {host}:{server.port} --output masks",
        file=sys.stderr,
    )


def print_json(server: Server) -> None:
    models = [f"{entry.name}/{entry.version}" for entry in server.models.entries()]
    print(json.dumps({"port": server.port, "metrics_port": server.metrics_port, "models": models}), flush=True)
