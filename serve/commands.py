"""`weakseg serve`: model bundles over gRPC."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro

from serve.access import Access
from serve.allocator import return_large_blocks
from serve.logs import set_up
from serve.repository import BundleFolder, find_bundles, find_labels, missing_versions
from serve.server import Server, loader, open_tracing, serve
from serve.settings import ServeConfig, read_config, telling, toml_from_config
from serve.tls import Certificates
from weakseg.bundle import MANIFEST
from weakseg.errors import WeaksegError

DEMO_BUNDLES = Path("runs/demo/bundle")


@dataclass(frozen=True)
class Arguments:
    """Serve model bundles over gRPC (weakseg.v1.SegmentationService), with health, reflection and metrics.

    Every flag below but --demo, --check and --json is also an environment variable, and a key of the file that --config
    names: --max-batch 4 is WEAKSEG_MAX_BATCH=4 and max_batch = 4. Flags win over variables, these over the file.
    """

    settings: Annotated[ServeConfig, tyro.conf.arg(name="")] = field(default_factory=ServeConfig)
    config: Path | None = None  # TOML file of settings; also WEAKSEG_CONFIG
    demo: bool = False  # serve the bundle of `weakseg demo`; trains it first where there is none
    check: bool = False  # verify the bundles, print the settings as such a file, and exit
    json: bool = False  # print one JSON object, about ports and models once they are open or for --check, to stdout


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT; the exit code is 1 when requests inside were cut off, or executions hung."""
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    file = first.parse_known_args(argv)[0].config
    default = Arguments(settings=read_config(file), config=file)
    with telling({name: "--" + name.replace("_", "-") for name in ServeConfig.model_fields}):
        arguments = tyro.cli(Arguments, args=list(argv), default=default, prog="weakseg serve")
    config = arguments.settings
    if arguments.demo:
        config = config.model_copy(update={"bundle": (*config.bundle, demo_bundle(DEMO_BUNDLES))})
    scan = partial(find_bundles, config.bundle, config.models)
    folders = scan()
    if arguments.check:
        return check(config, folders, as_json=arguments.json)
    return_large_blocks()
    set_up(config.log_format, config.log_level)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        as_it_should = runner.run(serve(config, scan, print_json if arguments.json else print_hint))
    code = 0 if as_it_should else 1
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        # An execution hangs, and Python would wait for its thread.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    return code


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed; None = asyncio's own."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return None
    return new_event_loop


def check(config: ServeConfig, folders: Sequence[BundleFolder], *, as_json: bool) -> int:
    """Open what a server would, but its ports, then print what it would be told; 1 when a bundle cannot be loaded, or
    a label names none.

    Raises:
        ConfigError: certificates, tokens, labels or tracing that cannot be used.
    """
    Access(config.tokens)
    if config.tls is not None:
        Certificates(config.tls)
    if config.tracing:
        open_tracing().close()
    failures = missing_versions(folders, find_labels(folders))
    for folder in folders:
        try:
            loader(config)(folder.path).close()
        except WeaksegError as error:
            failures[f"{folder.name}/{folder.version}"] = str(error)
    if as_json:
        models = [f"{folder.name}/{folder.version}" for folder in folders]
        print(json.dumps({"settings": config.model_dump(mode="json"), "models": models, "failures": failures}))
    else:
        print(toml_from_config(config), end="")
    for model, failure in failures.items():
        print(f"{model}: {failure}", file=sys.stderr)
    return 1 if failures else 0


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
    host = f"[{host}]" if ":" in host else host
    print(
        f"gRPC on port {server.port}, metrics on http://{host}:{server.metrics_port}/metrics; try:\n"
        f"  weakseg predict IMAGE --endpoint {host}:{server.port} --output masks",
        file=sys.stderr,
    )


def print_json(server: Server) -> None:
    models = [f"{entry.name}/{entry.version}" for entry in server.models.entries()]
    ports = {"port": server.port, "metrics_port": server.metrics_port, "admin_port": server.admin_port}
    print(json.dumps(ports | {"models": models}), flush=True)
