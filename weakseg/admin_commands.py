"""`weakseg admin load|unload|reload|log-level`: what an operator does to a server that runs, at its admin port."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from weakseg.channel import TOKEN_VARIABLE, AccessOptions, credentials, metadata
from weakseg.errors import ConfigError, UsageError
from weakseg.text import table
from weakseg.v1 import admin_service_pb2 as pb
from weakseg.v1 import admin_service_pb2_grpc as pb_grpc
from weakseg.v1.segmentation_service_pb2 import ModelState
from weakseg.wire_errors import error_from_rpc

LEVELS = ("debug", "info", "warning", "error")
TIMEOUT_S = 600.0  # a large model is read, checked and run first

Ask = Callable[..., Any]  # method and fields of its request -> response


def main(argv: Sequence[str]) -> int:
    """Returns 0; raises what the server answers otherwise."""
    args = _parser().parse_args(argv)
    access = _access(args)
    secret = credentials(access)
    sent = metadata(access, args.endpoint, encrypted=secret is not None)
    with grpc.secure_channel(args.endpoint, secret) if secret else grpc.insecure_channel(args.endpoint) as channel:
        stub = pb_grpc.AdminServiceStub(channel)

        def ask(method: str, **fields: Any) -> Any:
            request = getattr(pb, f"{method}Request")(**fields)
            try:
                return getattr(stub, method)(request, timeout=args.timeout_s, metadata=sent)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    hint = "it is the one of `weakseg serve --admin-port`"
                    raise UsageError(f"expected the admin port of a server, got {args.endpoint}: {hint}") from error
                raise error_from_rpc(error, args.endpoint) from error

        answer, text = args.run(args, ask)
    print(json.dumps(MessageToDict(answer, preserving_proto_field_name=True)) if args.json else text)
    return 0


def load(args: argparse.Namespace, ask: Ask) -> tuple[Any, str]:
    answer = ask("LoadModel", **_named(args.model))
    return answer, f"{args.model} is ready, sha256 {answer.model.sha256}"


def unload(args: argparse.Namespace, ask: Ask) -> tuple[Any, str]:
    answer = ask("UnloadModel", **_named(args.model), force=args.force)
    return answer, f"{args.model} is out of service: `weakseg admin load {args.model}` brings it back"


def reload(_: argparse.Namespace, ask: Ask) -> tuple[Any, str]:
    answer = ask("ReloadModels")
    states = [(one, ModelState.Name(one.state).removeprefix("MODEL_STATE_").lower()) for one in answer.models]
    rows = [[f"{one.name}/{one.version}", state, one.failure] for one, state in states]
    rows += [[f"{one.name}/{one.version}", "unloaded", ""] for one in answer.unloaded]
    return answer, table(["model", "state", "failure"], rows)


def log_level(args: argparse.Namespace, ask: Ask) -> tuple[Any, str]:
    if args.level is None:
        answer = ask("GetLogLevel")
        return answer, _level_name(answer.level)
    answer = ask("SetLogLevel", level=f"LOG_LEVEL_{args.level.upper()}")
    return answer, f"{args.level}; it was {_level_name(answer.previous_level)}"


def _named(model: str) -> dict[str, str]:
    name, _, version = model.partition("/")
    if not name or not version:
        raise UsageError(f"expected NAME/VERSION, got {model!r}: `weakseg admin reload` lists what there is")
    return {"name": name, "version": version}


def _level_name(level: pb.LogLevel.ValueType) -> str:
    return pb.LogLevel.Name(level).removeprefix("LOG_LEVEL_").lower()


def _access(args: argparse.Namespace) -> AccessOptions:
    names = ("tls", "ca", "cert", "key", "plaintext_token")
    access: Any = {name: getattr(args, name) for name in names if getattr(args, name)}
    try:
        token = args.token_file.read_text().strip() if args.token_file else os.environ.get(TOKEN_VARIABLE)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected a file with a token at {args.token_file}, got: {error}") from error
    if token:
        access["token"] = token
    checked: AccessOptions = access
    return checked


def _parser() -> argparse.ArgumentParser:
    about = "Change a server that runs: one of `weakseg serve --admin-port`."
    parser = argparse.ArgumentParser(prog="weakseg admin", description=about, allow_abbrev=False)
    actions = parser.add_subparsers(required=True, metavar="load|unload|reload|log-level")
    action = _action(actions, load, "load a version of the server's folders, or once more one that failed")
    action.add_argument("model", metavar="NAME/VERSION")
    action = _action(actions, unload, "take a version out of service until it is loaded or the server starts anew")
    action.add_argument("model", metavar="NAME/VERSION")
    action.add_argument("--force", action="store_true", help="also if it has a label, or is the last that answers")
    _action(actions, reload, "let the server look at its folders now, and show what came of it")
    action = _action(actions, log_level, "show the log level, or set it until the server starts anew")
    action.add_argument("level", nargs="?", choices=LEVELS)
    return parser


def _action(actions: Any, run: Callable[..., tuple[Any, str]], text: str) -> argparse.ArgumentParser:
    name = run.__name__.replace("_", "-")
    action: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
    action.set_defaults(run=run)
    action.add_argument("--endpoint", metavar="HOST:PORT", required=True, help="the admin port of the server")
    action.add_argument("--token-file", type=Path, help=f"file of a token; without it that of {TOKEN_VARIABLE} is sent")
    action.add_argument("--tls", action="store_true", help="speak TLS, trusting gRPC's own list of authorities")
    action.add_argument("--ca", type=Path, help="PEM file: speak TLS, trusting these instead")
    action.add_argument("--cert", type=Path, help="PEM file: the certificate to show (mTLS)")
    action.add_argument("--key", type=Path, help="PEM file: the key of this certificate")
    action.add_argument("--plaintext-token", action="store_true", help="send it without TLS: the network encrypts")
    action.add_argument("--timeout-s", type=float, default=TIMEOUT_S, help="how long to wait; default %(default)g")
    action.add_argument("--json", action="store_true", help="print the answer as JSON, and nothing else")
    return action
