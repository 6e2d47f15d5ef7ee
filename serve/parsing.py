"""Bytes to messages, before any of our handlers sees them: what cannot be parsed, or would unfold, is refused.

gRPC bounds the bytes of a message, not what becomes of them: two bytes may be an empty sub-message, which takes some
eighty, and a second for every ten million of them, in which nobody is answered.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

from weakseg.errors import InvalidRequestError, OutOfMemoryError, ServiceError
from weakseg.memory import lacks_memory

# Fields, and bytes of packed numbers: enough for the ids of every class of the largest tables.
MAX_PARTS = 100_000
# The elements of a tensor, packed: as many as there are pixels.
BULK = frozenset({"inference.InferTensorContents"})

_PACKABLE = frozenset(range(1, 19)) - {
    FieldDescriptor.TYPE_STRING,
    FieldDescriptor.TYPE_GROUP,
    FieldDescriptor.TYPE_MESSAGE,
    FieldDescriptor.TYPE_BYTES,
}
_FIXED = {1: 8, 5: 4}  # bytes by wire type

# Of the message that the running task has read last: to ask a message for its size costs as much as to serialise it.
MESSAGE_BYTES: ContextVar[int] = ContextVar("message_bytes", default=2**31)


@dataclass(frozen=True)
class Unreadable:
    """Stands in for a message that was refused, or never came: a deserialiser that raises would end its call in words
    of gRPC's own, without a reason."""

    error: ServiceError


def deserializer(path: str, parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """`parse` of the method `/<service>/<method>`, which gives Unreadable instead of raising."""
    method = descriptor_pool.Default().FindMethodByName(path.strip("/").replace("/", "."))

    def checked(data: bytes) -> Any:
        MESSAGE_BYTES.set(len(data))
        try:
            # Every part takes a byte at least.
            if len(data) > MAX_PARTS and count_parts(data, method.input_type, MAX_PARTS) > MAX_PARTS:
                return Unreadable(InvalidRequestError(f"expected at most {MAX_PARTS} fields in a message, got more"))
            return parse(data)
        except (DecodeError, MemoryError) as error:
            if lacks_memory(error):
                return Unreadable(OutOfMemoryError(f"the server has no memory for {len(data)} bytes: try again later"))
            name = method.input_type.full_name
            return Unreadable(InvalidRequestError(f"expected a {name}, got {len(data)} bytes that are none"))

    return checked


def readable(request: Any) -> Any:
    """What a handler is given, if it is not Unreadable: then the error of that is raised."""
    if isinstance(request, Unreadable):
        raise request.error
    return request


def count_parts(data: bytes, message: Descriptor, limit: int) -> int:
    """Fields of a serialised message and of those in it, and bytes of its packed numbers; stops above `limit`.

    It also stops where the bytes are no protobuf: there the parser stops, too.
    """
    fields_by_type: dict[str, dict[int, FieldDescriptor]] = {}
    todo = [(0, len(data), message)]
    n_parts = 0
    while todo:
        at, end, kind = todo.pop()
        known = fields_by_type.setdefault(kind.full_name, dict(kind.fields_by_number))
        while at < end:
            n_parts += 1
            if n_parts > limit:
                return n_parts
            key, at = _varint(data, at, end)
            wire, field = key & 7, known.get(key >> 3)
            if wire == 0:
                _, at = _varint(data, at, end)
            elif wire in _FIXED:
                at += _FIXED[wire]
            elif wire == 2:
                length, at = _varint(data, at, end)
                if field is not None and field.message_type is not None and at + length <= end:
                    todo.append((at, at + length, field.message_type))
                elif field is not None and field.type in _PACKABLE and kind.full_name not in BULK:
                    n_parts += length
                at += length
            elif wire > 5:
                return n_parts
            # 3 and 4 enclose a group: its fields are counted as if they were this message's own
    return n_parts


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """(value, position behind it); a position beyond `end` where there is none."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    return value, end + 1
