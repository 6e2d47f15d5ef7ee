"""Bytes to messages: what is counted, and what is refused."""

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from serve.inference import grpc_inference_service_pb2 as oip
from serve.parsing import Unreadable, count_parts, deserializer, readable
from weakseg.errors import InvalidRequestError, OutOfMemoryError
from weakseg.v1 import segmentation_service_pb2 as pb

SEGMENT = "/weakseg.v1.SegmentationService/Segment"
ANY = 10**9


def parts(message):
    return count_parts(message.SerializeToString(), message.DESCRIPTOR, ANY)


def test_fields_are_counted_at_every_depth_and_packed_numbers_by_their_bytes():
    assert parts(pb.SegmentRequest()) == 0
    assert parts(pb.SegmentRequest(request_id="x" * 1000)) == 1
    assert parts(pb.SegmentRequest(image=pb.Image(encoded=bytes(10**6)))) == 2
    assert parts(pb.SegmentRequest(outputs=[pb.OutputSpec()] * 3)) == 3
    assert parts(pb.SegmentRequest(outputs=[pb.OutputSpec(kind=3, mask_encoding=1)])) == 3
    assert parts(pb.SegmentRequest(tags=pb.Tags(class_ids=[1] * 5))) == 2 + 5
    assert parts(pb.SegmentRequest(tags=pb.Tags(class_ids=[300] * 5))) == 2 + 10
    message = oip.ModelInferRequest()
    message.parameters["tags"].string_param = "red"
    assert parts(message) == 4, "the map, its key, its value, and what is in that"


def test_elements_of_a_tensor_are_as_many_as_they_must_be():
    message = oip.ModelInferRequest()
    message.inputs.add(name="image", shape=[1, 1000]).contents.uint_contents.extend([255] * 1000)
    assert parts(message) == 6 + 2, "input, name, shape and its 3 bytes, contents, elements"


def test_groups_are_no_place_to_hide():
    start, end = b"\x7b", b"\x7c"  # of the unknown field 15
    assert count_parts(start + b"\x22\0" * 10 + end, pb.SegmentRequest.DESCRIPTOR, ANY) == 12
    assert count_parts(start * 1000, pb.SegmentRequest.DESCRIPTOR, 100) == 101


@given(st.binary(max_size=200), st.integers(0, 50))
def test_any_bytes_can_be_counted(data, limit):
    n = count_parts(data, FileDescriptorProto.DESCRIPTOR, ANY)
    assert n >= 0
    assert (count_parts(data, FileDescriptorProto.DESCRIPTOR, limit) > limit) == (n > limit)


@pytest.mark.parametrize(
    ("data", "match"),
    [(b"\xff", "expected a weakseg.v1.SegmentRequest, got 1 bytes"), (b"\x22\0" * 100_001, "at most 100000 fields")],
)
def test_what_is_refused_is_told_when_it_is_read(data, match):
    parse = deserializer(SEGMENT, pb.SegmentRequest.FromString)
    good, bad = parse(b"\x0a\1x"), parse(data)
    assert readable(good) == pb.SegmentRequest(request_id="x")
    assert isinstance(bad, Unreadable)
    with pytest.raises(InvalidRequestError, match=match):
        readable(bad)


@pytest.mark.parametrize("method", ["weakseg.v1.SegmentationService/ListModels", "grpc.health.v1.Health/Check"])
def test_every_service_says_so(shared_serving, method):
    with grpc.insecure_channel(shared_serving.target) as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(f"/{method}")(b"\xff")
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("error", [MemoryError(), DecodeError("Error parsing message: Arena alloc failed")], ids=repr)
def test_want_of_memory_is_no_fault_of_the_message(error):
    def parse(data):
        raise error

    with pytest.raises(OutOfMemoryError, match="3 bytes"):
        readable(deserializer(SEGMENT, parse)(b"\x0a\x01x"))
