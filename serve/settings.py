"""What the server is told: flags over `WEAKSEG_*` environment variables over a TOML file over defaults."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from serve.tls import TlsFiles
from weakseg.channel import TOKEN_VARIABLE, is_local
from weakseg.engines import CACHE_VARIABLE
from weakseg.errors import ConfigError
from weakseg.image import MAX_PIXELS

PREFIX = "WEAKSEG_"
FILE_VARIABLE = "WEAKSEG_CONFIG"
OF_OTHERS = {FILE_VARIABLE, CACHE_VARIABLE, TOKEN_VARIABLE, "WEAKSEG_SEALED"}
# What Kubernetes sets in every pod beside a Service whose name begins with "weakseg": no settings, though one may be
# called like one, WEAKSEG_PORT=tcp://10.0.0.1:8500.
SERVICE_LINK = re.compile(r"WEAKSEG_(\w+_)?(SERVICE_HOST|SERVICE_PORT\w*|PORT|PORT_\d+_\w+)")
SERVICE_ADDRESS = ("tcp://", "udp://", "sctp://")

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class ServeConfig(BaseModel):
    """Each field is a flag, `--max-batch 4`, an environment variable, `WEAKSEG_MAX_BATCH=4`, and a key of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: Annotated[tuple[Path, ...], NoDecode] = ()  # bundle folders, <name>/<version>
    models: Path | None = None  # a folder of bundles: <models>/<name>/<version>
    poll_s: NotNegative = 0.0  # how often to look for models that are new, changed or gone; 0 = at SIGHUP only
    load_policy: Literal["swap", "stop_first"] = "swap"  # load what is new beside what it replaces, or after it
    keep_versions: Annotated[int, Field(ge=0)] = 0  # newest versions of each model, and those with a label; 0 = all
    warm_up: Annotated[tuple[str, ...], NoDecode] = ("500x375",)  # sizes of images that a loaded model is run on first
    host: str = "0.0.0.0"  # where the ports for gRPC and metrics listen; 127.0.0.1 = for this machine alone
    port: Port = 8500  # gRPC; 0 = a free one
    share_port: bool = False  # with other servers that say so, too: the system spreads connections over them
    metrics_port: Port = 9464  # HTTP: /metrics, /livez, /readyz; 0 = a free one
    admin_port: Port | None = None  # gRPC: load and unload models, set the log level; 0 = a free one, None = closed
    admin_host: str = "127.0.0.1"  # where that port listens; other machines may only reach it with tokens
    max_batch: Positive = 8  # images that go through a network together
    max_delay_ms: NotNegative = 2.0  # longest wait for a batch to fill
    queue_limit: Positive = 64  # requests in the server beyond one batch; one more is refused
    adaptive_limit: bool = False  # admit fewer than that where requests wait more than they are worked on
    bulk_share: Share = 0.5  # of these, that bulk requests may take, at least a batch
    bulk_wait_s: NotNegative = 5.0  # bulk images give way to interactive ones that come up to so much later
    cache_mib: Annotated[int, Field(ge=0)] = 0  # of answers, for requests that are equal to earlier ones; 0 = none
    execution_timeout_s: NotNegative = 120.0  # of a batch in a network; then it is given up as hung; 0 = never
    stream_in_flight: Positive = 8  # requests of one stream that are worked on at once
    side_by_side: bool = True  # on CPUs, when busy: images go through networks on one core each; takes weights twice
    threads: Positive | None = None  # for the network (at most the usable cores), decoding, masks; None = all usable
    refine_threads: Positive | None = None  # for CRF and random walk alone; None = as many as `threads`
    refine_budget_ms: NotNegative = 0.0  # then an interactive request gets the mask without them; 0 = all they need
    runtime: str = "onnxruntime"  # or openvino, tensorrt, tensorrt-rtx; see docs/export.md
    provider: str | None = None  # of the runtime: onnxruntime's cpu, cuda or tensorrt; None = its own choice
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"  # of the graphs that have it; others stay fp32
    public_key: Path | None = None  # PEM file: one of its keys must have signed each bundle; None = unsigned ones, too
    tls_cert: Path | None = None  # PEM file: the certificate chain of the gRPC port; read again when it changes
    tls_key: Path | None = None  # PEM file: its key
    tls_client_ca: Path | None = None  # PEM file: clients need a certificate that one of these has signed (mTLS)
    tokens: Path | None = None  # TOML file of the tokens that may call, see docs/security.md; None = everybody may
    plaintext_tokens: bool = False  # take tokens without TLS from other machines: where the network encrypts
    rate_limit: NotNegative = 0.0  # images a second from one token, or else one address; 0 = any
    rate_burst: Positive = 32  # of them at once, after a pause
    max_message_bytes: Annotated[int, Field(ge=1024, lt=2**31)] = 32 * 2**20  # largest request and response
    max_pixels: Positive = MAX_PIXELS  # an image with more is refused before it is decoded
    image_memory_mib: Positive = 1024  # for pixels of images, 7 to 16 bytes each; who finds too little waits for others
    max_connection_age_s: NotNegative = 300.0  # then a client connects anew, maybe to another server; 0 = never
    reflection: bool = False  # let grpcurl and others list the services
    tracing: bool = False  # send OpenTelemetry spans to where the OTEL_* variables say; extra `tracing`
    drain_delay_s: NotNegative = 5.0  # after SIGTERM: how long to go on as before while load balancers notice
    drain_grace_s: NotNegative = 30.0  # how long requests in the server may then take to finish
    log_format: Literal["json", "text"] = "json"  # an object a line, or text for people; to stderr
    log_level: Literal["debug", "info", "warning", "error"] = "info"  # debug: every call, info: every image

    @property
    def tls(self) -> TlsFiles | None:
        if self.tls_cert is None or self.tls_key is None:
            return None
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_client_ca)

    @model_validator(mode="after")
    def _check_access(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise PydanticCustomError("tls", "tls_cert and tls_key go together: give both or none")
        if self.tls_client_ca is not None and self.tls is None:
            raise PydanticCustomError("tls", "tls_client_ca needs tls_cert and tls_key")
        is_open = not is_local(self.host) or (self.admin_port is not None and not is_local(self.admin_host))
        if self.admin_port is not None and self.tokens is None and not is_local(self.admin_host):
            raise PydanticCustomError(
                "admin",
                "admin_port without tokens is for this machine only, or anybody could unload the models: set tokens, "
                "one of which allows admin, or admin_host to 127.0.0.1",
            )
        if self.tokens is not None and self.tls is None and not self.plaintext_tokens and is_open:
            raise PydanticCustomError(
                "tokens",
                "tokens need tls_cert and tls_key, or anybody on the way could read them; where the network encrypts, "
                "set plaintext_tokens",
            )
        return self

    @property
    def warm_up_sizes(self) -> list[tuple[int, int]]:
        """(width, height) each."""
        return [(int(width), int(height)) for width, _, height in (size.partition("x") for size in self.warm_up)]

    @field_validator("warm_up")
    @classmethod
    def _check_sizes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for size in value:
            if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", size):
                raise PydanticCustomError("size", "sizes as WIDTHxHEIGHT, such as 500x375")
        return value

    @field_validator("bundle", "warm_up", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part for part in value.split(os.pathsep) if part) if isinstance(value, str) else value


class _Environment(BaseSettings, ServeConfig):
    model_config = SettingsConfigDict(env_prefix=PREFIX)


def read_config(file: Path | None = None) -> ServeConfig:
    """Defaults, overridden by a TOML file, overridden by `WEAKSEG_<FIELD>`; several bundles are joined by `:`.

    Args:
        file: None = the one that WEAKSEG_CONFIG names, if it does.
    Raises:
        ConfigError: no such file, an unknown key or variable, a value of the wrong type or range; says where it stands.
    """
    named = os.environ.get(FILE_VARIABLE)
    path = file or (Path(named) if named else None)
    of_file = {} if path is None else _read_file(path)
    of_environment = _read_environment()
    names = {key: f"{path}: {key}" for key in of_file} | {key: PREFIX + key.upper() for key in of_environment}
    with telling(names):
        return ServeConfig(**of_file | of_environment)


def toml_from_config(config: ServeConfig) -> str:
    """What `read_config` reads; settings that are None are left out."""
    values = config.model_dump(mode="json", exclude_none=True)
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())  # JSON's forms are TOML's, too


@contextmanager
def telling(names: Mapping[str, str]) -> Iterator[None]:
    """Pydantic's errors as one ConfigError of one line; `names` says what a field is called where its value stands."""
    try:
        yield
    except ValidationError as error:
        said = []
        for one in error.errors():
            if not one["loc"]:  # of several fields
                said.append(one["msg"])
                continue
            field = str(one["loc"][0])
            text = one["msg"].removeprefix("Input should be ").replace("greater than or equal to", "at least")
            said.append(f"{names.get(field, field)} must be {text}, got {one['input']!r}")
        raise ConfigError("; ".join(said)) from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"expected a TOML file of settings at {path}, got: {error}") from error
    for key in values:
        if key not in ServeConfig.model_fields:
            raise ConfigError(f"{path}: unknown key {key!r}{_nearest(key, ServeConfig.model_fields)}")
    return values


def _read_environment() -> dict[str, Any]:
    known = {PREFIX + field.upper() for field in ServeConfig.model_fields} | OF_OTHERS
    unknown = [
        f"unknown environment variable {variable}{_nearest(variable, known)}"
        for variable in sorted(os.environ)
        if variable.startswith(PREFIX) and variable not in known and not SERVICE_LINK.fullmatch(variable)
    ]
    if unknown:
        raise ConfigError("; ".join(unknown))
    found = EnvSettingsSource(_Environment)()
    return {key: value for key, value in found.items() if not str(value).startswith(SERVICE_ADDRESS)}


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {near[0]}?" if near else ": `weakseg serve --help` lists what there is"
