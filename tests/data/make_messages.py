"""Write messages.json beside this file: python tests/data/make_messages.py (`make proto-freeze` does)

For each request and response of our services it has messages whose every field is set, as bytes and as their content.
They are written for a release, never to make a test pass: whoever holds such bytes must be able to read them.
Several messages of a type show each member of its oneofs and each value of its enums. One message a line.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2

from serve.inference import grpc_inference_service_pb2 as oip
from weakseg.v1 import admin_service_pb2 as admin
from weakseg.v1 import segmentation_service_pb2 as pb

FILE = Path(__file__).with_name("messages.json")
N_VARIANTS = 5  # as many as the largest oneof has members, and the largest enum values but 0
FLOATS = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)


def message_types() -> list[Descriptor]:
    """The request and the response of every method of ours."""
    services = [one for module in (pb, admin, oip) for one in module.DESCRIPTOR.services_by_name.values()]
    return [kind for one in services for method in one.methods for kind in (method.input_type, method.output_type)]


def filled(kind: Descriptor, variant: int) -> Message:
    """A message with a value in every field; `variant` chooses the member of each oneof, and the value of each enum."""
    message = GetMessageClass(kind)()
    if kind.full_name == "google.protobuf.Any":
        message.Pack(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="weakseg"))  # type: ignore[attr-defined]
        return message
    for field in kind.fields:
        oneof = field.containing_oneof
        if oneof is None or oneof.fields[variant % len(oneof.fields)] is field:
            _fill(message, field, variant)
    return message


def _fill(message: Message, field: FieldDescriptor, variant: int) -> None:
    value: Any
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name["value"]
        if entry.message_type is None:
            getattr(message, field.name)["key"] = _value(entry, variant)
        else:
            getattr(message, field.name)["key"].CopyFrom(filled(entry.message_type, variant))
        return
    value = _value(field, variant) if field.message_type is None else filled(field.message_type, variant)
    if field.is_repeated:
        getattr(message, field.name).extend([value] if field.message_type is not None else [value, value])
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(value)
    else:
        setattr(message, field.name, value)


def _value(field: FieldDescriptor, variant: int) -> Any:
    if field.enum_type is not None:
        numbers = sorted(field.enum_type.values_by_number)
        return numbers[1 + variant % (len(numbers) - 1)]  # 0 would not be on the wire
    if field.cpp_type in FLOATS:
        return field.number + 0.5
    by_type = {
        FieldDescriptor.CPPTYPE_BOOL: True,
        FieldDescriptor.CPPTYPE_STRING: field.name if field.type == FieldDescriptor.TYPE_STRING else b"\0\xff\x89",
    }
    return by_type.get(field.cpp_type, 300 + field.number)


def content(message: Message) -> dict[str, Any]:
    """By the names of the .proto, as protobuf's JSON has it."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def variants(kind: Descriptor) -> Iterator[Message]:
    """Those of `filled` that differ."""
    seen: set[bytes] = set()
    for variant in range(N_VARIANTS):
        message = filled(kind, variant)
        data = message.SerializeToString(deterministic=True)
        if data not in seen:
            seen.add(data)
            yield message


def main() -> None:
    lines = [
        json.dumps(
            {
                "type": kind.full_name,
                "bytes": base64.b64encode(message.SerializeToString(deterministic=True)).decode(),
                "content": content(message),
            }
        )
        for kind in message_types()
        for message in variants(kind)
    ]
    FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
