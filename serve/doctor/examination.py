"""The checks, in the order in which they are shown, of the settings that a server here would have."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from serve.doctor import host, models, network
from serve.doctor.finding import Finding, failed, ok
from serve.settings import ServeConfig, read_config, telling
from weakseg.errors import ConfigError


@dataclass(frozen=True)
class Arguments:
    """Check this machine, or this pod, for `weakseg serve` with the same flags, variables and file; say what to mend.

    Exit code 0: all is well, or there are warnings. 1: something has failed.
    """

    settings: Annotated[ServeConfig, tyro.conf.arg(name="")] = field(default_factory=ServeConfig)
    config: Path | None = None  # TOML file of settings; also WEAKSEG_CONFIG
    clock: str | None = None  # URL whose Date the clock is compared with, such as /livez of another server
    json: bool = False  # print one JSON object, {"ok", "checks": [{"check", "status", "found", "todo"}]}


def examine(argv: Sequence[str]) -> list[Finding]:
    """Raises ConfigError for flags that cannot be used: those are of this command, too."""
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    file = first.parse_known_args(argv)[0].config
    try:
        given, settings = read_config(file), ok("settings", "file and variables are understood")
    except ConfigError as error:
        given, settings = (
            ServeConfig(),
            failed("settings", str(error), "mend them; what follows is of flags and defaults"),
        )
    default = Arguments(settings=given, config=file)
    with telling({name: "--" + name.replace("_", "-") for name in ServeConfig.model_fields}):
        arguments = tyro.cli(Arguments, args=list(argv), default=default, prog="weakseg doctor")
    return [settings, *checks(arguments.settings, arguments.clock)]


def checks(config: ServeConfig, clock: str | None = None, root: Path = Path("/")) -> Iterator[Finding]:
    """root: where /proc and /sys/fs/cgroup are found."""
    yield host.cores(config, root)
    yield from host.folders(config)
    if clock is not None:
        yield host.clock(clock)
    yield from network.ports(config)
    yield from network.certificates(config)
    yield network.tokens(config)
    yield models.gpu(config)
    yield models.runtime(config)
    with models.opened(config) as found:
        yield from found
        yield host.refinement()
        yield host.memory(config, root)
