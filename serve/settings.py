"""What the server is told: flags over `WEAKSEG_*` environment variables over defaults."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weakseg.errors import ConfigError
from weakseg.image import MAX_PIXELS

ENV_PREFIX = "WEAKSEG_"


@dataclass(frozen=True)
class ServeConfig:
    """Each field is a flag, `--max-batch 4`, and an environment variable, `WEAKSEG_MAX_BATCH=4`."""

    bundle: tuple[Path, ...] = ()  # bundle folders, <name>/<version>
    models: Path | None = None  # a folder of bundles: <models>/<name>/<version>
    host: str = "0.0.0.0"
    port: int = 8500  # gRPC; 0 = a free one
    metrics_port: int = 9464  # HTTP: /metrics, /livez, /readyz; 0 = a free one
    max_batch: int = 8  # images that go through a network together
    max_delay_ms: float = 2.0  # longest wait for a batch to fill
    queue_limit: int = 64  # requests in the server beyond one batch; one more is refused
    stream_in_flight: int = 8  # requests of one stream that are worked on at once
    threads: int | None = None  # for the network, and as many again for decoding and masks; None = all that may be used
    runtime: str = "onnxruntime"
    provider: str | None = None  # of the runtime: onnxruntime's cpu, cuda or tensorrt; None = its own choice
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"  # of the graphs that have it; others stay fp32
    public_key: Path | None = None  # PEM file: one of its keys must have signed each bundle; None = unsigned ones, too
    max_message_bytes: int = 32 * 2**20  # largest request and response
    max_pixels: int = MAX_PIXELS  # an image with more is refused before it is decoded
    reflection: bool = False  # let grpcurl and others list the services
    drain_delay_s: float = 5.0  # after SIGTERM: how long to go on as before while load balancers notice
    drain_grace_s: float = 30.0  # how long requests in the server may then take to finish
    log_format: Literal["json", "text"] = "json"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        at_least = {
            "port": 0,
            "metrics_port": 0,
            "max_batch": 1,
            "max_delay_ms": 0,
            "queue_limit": 1,
            "stream_in_flight": 1,
            "max_message_bytes": 1024,
            "max_pixels": 1,
            "drain_delay_s": 0,
            "drain_grace_s": 0,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}: leave it out for all that may be used")
        for name in ("port", "metrics_port"):
            if getattr(self, name) > 65535:
                raise ConfigError(f"{name} must be at most 65535, got {getattr(self, name)}")
        if self.max_message_bytes >= 2**31:
            raise ConfigError(f"max_message_bytes must be below 2 GiB, got {self.max_message_bytes}")


def config_from_env(env: Mapping[str, str] = os.environ) -> ServeConfig:
    """Defaults, overridden by `WEAKSEG_<FIELD>`; several bundles are joined by `:` (the path separator).

    Raises:
        ConfigError: a value of the wrong type or range; the message names the variable.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(ServeConfig):
        variable = ENV_PREFIX + field.name.upper()
        if variable in env:
            values[field.name] = _value(variable, env[variable], str(field.type))
    return ServeConfig(**values)


def _value(variable: str, text: str, kind: str) -> Any:
    """`text` as the annotation `kind` of a field asks for it."""
    if kind.startswith("Literal"):
        options = [option.strip(" '\"") for option in kind[len("Literal[") : -1].split(",")]
        if text not in options:
            raise ConfigError(f"{variable} must be one of {', '.join(options)}, got {text!r}")
        return text
    if kind == "bool":
        if text.lower() not in ("1", "true", "0", "false"):
            raise ConfigError(f"{variable} must be true or false, got {text!r}")
        return text.lower() in ("1", "true")
    if kind == "tuple[Path, ...]":
        return tuple(Path(part) for part in text.split(os.pathsep) if part)
    parse = {"str": str, "str | None": str, "int": int, "float": float, "Path | None": Path, "int | None": int}[kind]
    try:
        return parse(text)
    except ValueError:
        raise ConfigError(f"{variable} must be {kind.removesuffix(' | None')}, got {text!r}") from None
