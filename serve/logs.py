"""Log lines: one JSON object each, or plain text. Fields come through `extra={"fields": {...}}`; never image bytes."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

LOGGERS = ("serve", "weakseg", "opentelemetry")  # ours, and that of the exporter of traces
AUDIT = "serve.audit"  # who was denied, and what operators have done


class JsonFormatter(logging.Formatter):
    """`{"time": …, "level": …, "logger": …, "message": …, <fields>}`; a traceback stands under `trace`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """`12:30:01 info serve: message key=value …`."""

    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields = "".join(
            f" {key}={json.dumps(value, default=str)}" for key, value in getattr(record, "fields", {}).items()
        )
        line = f"{clock} {record.levelname.lower()} {record.name}: {record.getMessage()}{fields}"
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def set_up(log_format: str, level: str) -> None:
    """Send the logs of LOGGERS to stderr in this format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    set_level(level)
    logging.getLogger(AUDIT).setLevel(logging.INFO)  # its own: who may change the level could hide what he does next


def level() -> str:
    """`debug`, `info`, `warning` or `error`: from what on there are lines in the log."""
    return logging.getLevelName(logging.getLogger(LOGGERS[0]).getEffectiveLevel()).lower()


def set_level(level: str) -> None:
    """At once, for every thread."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(level.upper())
