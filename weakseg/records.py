"""Frozen dataclasses from JSON and back, checked against their own annotations."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


class RecordError(ValueError):
    """A value does not fit its annotation; the message begins with the path of the field."""


def to_json(value: Any) -> Any:
    """Dataclasses become dicts in field order, tuples lists; the rest must be JSON already."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], value: Any, where: str) -> T:
    """Build a dataclass from parsed JSON.

    Understood annotations: str, int, float (takes whole numbers too), bool, Any, Literal, unions, dict[str, X],
    tuple[X, ...], tuple[X, Y, Z] and dataclasses of these. A field with a default may be missing; unknown keys may not
    be there.

    Args:
        where: path of the value, which every message begins with.
    Raises:
        RecordError: a key is missing or unknown, or a value has another type.
        Whatever the dataclass itself raises on values it does not take.
    """
    if not isinstance(value, dict):
        raise _mismatch(where, "an object", value)
    fields = {field.name: field for field in dataclasses.fields(cast(Any, kind))}
    for key in value:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            raise RecordError(f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    hints = get_type_hints(kind)
    arguments = {}
    for name, field in fields.items():
        if name in value:
            arguments[name] = _value(hints[name], value[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecordError(f"{where}: the key {name!r} is missing")
    return kind(**arguments)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return from_json(cast(type, hint), value, where)
    if origin is Literal:
        if value not in parts:
            raise _mismatch(where, " or ".join(map(repr, parts)), value)
        return value
    if origin in (Union, types.UnionType):
        return _union(parts, value, where)
    if origin is tuple:
        return _tuple(parts, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        return {key: _value(parts[1], item, f"{where}.{key}") for key, item in value.items()}
    return _scalar(hint, value, where)


def _union(parts: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in parts:
        return None
    others = [part for part in parts if part is not type(None)]
    for part in others[:-1]:
        try:
            return _value(part, value, where)
        except RecordError:
            continue
    return _value(others[-1], value, where)


def _tuple(parts: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _mismatch(where, "a list", value)
    if len(parts) == 2 and parts[1] is ...:
        return tuple(_value(parts[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(parts) != len(value):
        raise _mismatch(where, f"a list of {len(parts)}", value)
    return tuple(_value(part, item, f"{where}[{i}]") for i, (part, item) in enumerate(zip(parts, value, strict=True)))


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _mismatch(where, hint.__name__, value)
    return value


def _mismatch(where: str, expected: str, value: Any) -> RecordError:
    shown = repr(value)
    return RecordError(f"{where} must be {expected}, got {shown if len(shown) <= 60 else shown[:57] + '...'}")
