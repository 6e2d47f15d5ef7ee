"""R21: what clients rely on stays. `make proto-check` asks `buf breaking`; here is that it would find something.

`make proto-freeze` takes today's contract and messages as the frozen ones.
"""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2

from serve.inference import grpc_inference_service_pb2 as oip
from weakseg.v1 import admin_service_pb2 as admin
from weakseg.v1 import segmentation_service_pb2 as pb

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "proto" / "contract.binpb"
MESSAGES = json.loads((ROOT / "tests" / "data" / "messages.json").read_text())
OURS = {module.DESCRIPTOR.package for module in (pb, admin, oip)}
BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")


@pytest.fixture
def contract():
    """The frozen contract."""
    return descriptor_pb2.FileDescriptorSet.FromString(CONTRACT.read_bytes())


@pytest.fixture
def breaks(tmp_path):
    """A function: what `buf breaking` says of a contract against the frozen one; it is what `make proto-check` asks."""
    if BUF is None:
        pytest.skip("no buf: pip install buf-bin")

    def told(changed):
        image = tmp_path / "image.binpb"
        image.write_bytes(changed.SerializeToString())
        command = [BUF, "breaking", image, "--against", CONTRACT, "--config", ROOT / "proto" / "buf.yaml"]
        command += ["--path", "weakseg", "--path", "inference"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode in (0, 100) and not done.stderr, done.stderr
        return done.stdout

    return told


def message_of(contract, name):
    return next(one for file in contract.file for one in file.message_type if one.name == name)


def renamed(contract):
    message_of(contract, "SegmentRequest").field[0].name = "request_name"


def renumbered(contract):
    message_of(contract, "ModelInferRequest").field[0].number = 99


def retyped(contract):
    message_of(contract, "Mask").field[0].type = descriptor_pb2.FieldDescriptorProto.TYPE_UINT64


def removed(contract):
    del message_of(contract, "SegmentResponse").field[-1]


def renumbered_value(contract):
    next(one for file in contract.file for one in file.enum_type if one.name == "MaskEncoding").value[1].number = 77


def renamed_method(contract):
    next(one for file in contract.file for one in file.service if one.name == "SegmentationService").method[
        0
    ].name = "Do"


@pytest.mark.parametrize("change", [renamed, renumbered, retyped, removed, renumbered_value, renamed_method])
def test_what_would_break_clients_is_found(contract, breaks, change):
    change(contract)
    assert breaks(contract) != ""


def test_what_is_added_breaks_nobody(contract, breaks):
    message = message_of(contract, "SegmentRequest")
    field = message.field.add(name="fresh", number=999, json_name="fresh")
    field.type, field.label = field.TYPE_BOOL, field.LABEL_OPTIONAL
    assert breaks(contract) == ""


@pytest.mark.parametrize("index", range(len(MESSAGES)), ids=lambda index: MESSAGES[index]["type"])
def test_recorded_messages_say_what_they_said(index):
    recorded = MESSAGES[index]
    assert error_details_pb2.ErrorInfo.DESCRIPTOR is not None  # registered: a recorded error has one
    kind = descriptor_pool.Default().FindMessageTypeByName(recorded["type"])
    message = GetMessageClass(kind).FromString(base64.b64decode(recorded["bytes"]))
    assert json_format.MessageToDict(message, preserving_proto_field_name=True) == recorded["content"]


def test_every_field_of_the_contract_is_recorded(contract):
    names = {name for recorded in MESSAGES for name in keys(recorded["content"])}
    services = [one for file in contract.file if file.package in OURS for one in file.service]
    types = {kind for one in services for method in one.method for kind in (method.input_type, method.output_type)}
    assert {recorded["type"] for recorded in MESSAGES} == {kind.removeprefix(".") for kind in types}
    ours = [one for file in contract.file if file.package in OURS for one in file.message_type]
    entries = [one for message in ours for one in message.nested_type if not one.options.map_entry]
    assert {field.name for message in [*ours, *entries] for field in message.field} <= names


def keys(content):
    """The names of all fields in a content."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield name
            yield from keys(value)
    elif isinstance(content, list):
        for value in content:
            yield from keys(value)


def test_the_contract_brings_the_details_of_errors_with_it(contract):
    """Clients whose language reads descriptors need no other file: examples/node."""
    assert {"google/rpc/status.proto", "google/rpc/error_details.proto"} <= {file.name for file in contract.file}
