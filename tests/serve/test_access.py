import hashlib
import logging
import os

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.access import Access, read_tokens
from serve.inference import grpc_inference_service_pb2 as oip
from serve.inference import grpc_inference_service_pb2_grpc as oip_grpc
from weakseg.channel import is_local
from weakseg.client import Client
from weakseg.errors import ConfigError, PermissionDeniedError, UnauthenticatedError
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

SEGMENT = "/weakseg.v1.SegmentationService/Segment"
GET_MODEL = "/weakseg.v1.SegmentationService/GetModel"
SECRET = "correct horse battery staple"
OTHER = "another token, long enough"


def write(path, text):
    """As Kubernetes and editors do: the new file takes the old one's place."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)
    return path


@pytest.fixture
def tokens(tmp_path):
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    text = f'[tool]\ntoken = "{SECRET}"\n\n[viewer]\nsha256 = "{digest}"\nallow = ["models"]\n'
    return write(tmp_path / "tokens.toml", text)


def test_without_a_file_everybody_may_do_everything():
    assert Access(None).caller(SEGMENT, None) == ""


def test_a_token_names_its_caller_and_says_what_it_allows(tokens):
    access = Access(tokens)
    assert access.caller(SEGMENT, f"Bearer {SECRET}") == "tool"
    assert access.caller("/inference.GRPCInferenceService/ModelInfer", f"bearer {SECRET}") == "tool"
    assert access.caller(GET_MODEL, f"Bearer {OTHER}") == "viewer"
    with pytest.raises(PermissionDeniedError, match="viewer may not call Segment: its token does not allow 'segment'"):
        access.caller(SEGMENT, f"Bearer {OTHER}")
    with pytest.raises(PermissionDeniedError, match="'admin'"):
        access.caller("/weakseg.v1.AdminService/LoadModel", f"Bearer {SECRET}")


@pytest.mark.parametrize("method", ["grpc.health.v1.Health/Check", "inference.GRPCInferenceService/ServerReady"])
def test_health_checks_need_none(tokens, method):
    assert Access(tokens).caller(f"/{method}", None) == ""


@pytest.mark.parametrize("sent", [None, "", "Bearer", "Bearer ", SECRET, f"Basic {SECRET}", f"Bearer {SECRET}x"])
def test_no_token_and_unknown_ones(tokens, sent):
    with pytest.raises(UnauthenticatedError) as raised:
        Access(tokens).caller(SEGMENT, sent)
    assert SECRET not in str(raised.value)


def test_a_file_that_changes_is_read_again_and_a_damaged_one_changes_nothing(tokens, caplog):
    access = Access(tokens)
    write(tokens, f'[new]\ntoken = "{OTHER}"\n')
    assert access.caller(SEGMENT, f"Bearer {OTHER}") == "new"
    with pytest.raises(UnauthenticatedError):
        access.caller(SEGMENT, f"Bearer {SECRET}")
    with caplog.at_level(logging.ERROR, "serve.access"):
        for damaged in (f'[new]\ntoken = "{SECRET}', ""):
            write(tokens, damaged)
            assert access.caller(SEGMENT, f"Bearer {OTHER}") == "new"
    tokens.unlink()
    assert access.caller(SEGMENT, f"Bearer {OTHER}") == "new"
    assert SECRET not in caplog.text and "tokens not reloaded" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected tokens in .*, got none"),
        ("[a]\ntoken = 'short'", r"\[a\]: token must have at least 16 characters"),
        ("[a]\nsha256 = 'zz'", r"\[a\]: sha256 must be 64 hexadecimal digits"),
        ("[a]\nsha256 = 5", r"\[a\]: sha256 must be 64 hexadecimal digits"),
        (f"[a]\nsha256 = '{'0' * 64}'\ntoken = '{SECRET}'", r"\[a\]: expected token or sha256"),
        (f"[a]\ntoken = '{SECRET}'\nallowed = []", r"\[a\]: expected token or sha256"),
        (f"[a]\ntoken = '{SECRET}'\nallow = ['everything']", r"\[a\]: allow must be a list of admin, models, segment"),
        (f"a = '{SECRET}'", r"\[a\]: expected token or sha256"),
        (f"[a]\ntoken = '{SECRET}", "it cannot be parsed"),
    ],
)
def test_bad_files_are_told_without_their_tokens(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as raised:
        read_tokens(write(tmp_path / "tokens.toml", text))
    assert SECRET not in str(raised.value)


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_tokens(tmp_path / "tokens.toml")


def test_a_served_call_needs_its_token_and_a_denied_one_leaves_a_line(serving, tokens, colours, caplog):
    running = serving(tokens=tokens)
    with Client(running.target, token=SECRET) as client:
        assert client.segment(colours).segmentation.shape == colours.shape[:2]
        assert len(list(client.segment_many([colours, colours]))) == 2
    with Client(running.target, token=OTHER) as client:
        assert client.model().state == "ready"
        with caplog.at_level(logging.WARNING, "serve.audit"), pytest.raises(PermissionDeniedError, match="viewer"):
            client.segment(colours)
    (denied,) = [record for record in caplog.records if record.name == "serve.audit"]
    assert denied.fields["method"] == SEGMENT and denied.fields["reason"] == "PERMISSION_DENIED"
    assert denied.fields["peer"].startswith("ipv4:127.0.0.1:")
    with Client(running.target) as client, pytest.raises(UnauthenticatedError, match="expected a token, got none"):
        client.model()
    assert OTHER not in caplog.text and SECRET not in caplog.text
    assert running.sample("weakseg_rejected_total", reason="UNAUTHENTICATED") == 1
    handled = {"grpc_type": "unary_unary", "grpc_service": "weakseg.v1.SegmentationService", "grpc_method": "GetModel"}
    # Counted when the call has ended, which its client may see a moment earlier.
    running.until(lambda: running.sample("grpc_server_handled_total", grpc_code="UNAUTHENTICATED", **handled) == 1)
    running.until(lambda: running.server._edge.running == 0)


def test_the_open_inference_protocol_needs_the_same_tokens(serving, tokens):
    with grpc.insecure_channel(serving(tokens=tokens).target) as channel:
        stub = oip_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerReady(oip.ServerReadyRequest()).ready
        viewer = (("authorization", f"Bearer {OTHER}"),)
        assert stub.ModelMetadata(oip.ModelMetadataRequest(), metadata=viewer).name == "toy"
        for metadata, code in ((None, "UNAUTHENTICATED"), (viewer, "PERMISSION_DENIED")):
            with pytest.raises(grpc.RpcError) as raised:
                stub.ModelInfer(oip.ModelInferRequest(), metadata=metadata)
            assert raised.value.code().name == code


def test_a_probe_of_the_health_needs_no_token(serving, tokens):
    """As grpc-health-probe asks: a Check by name, no metadata."""
    with grpc.insecure_channel(serving(tokens=tokens).target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "liveness", "readiness", "toy", "toy/1"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60.0)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_stream_without_a_token_is_refused(serving, tokens):
    with grpc.insecure_channel(serving(tokens=tokens).target) as channel:
        call = pb_grpc.SegmentationServiceStub(channel).SegmentStream(iter([pb.SegmentStreamRequest()] * 3))
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_token_goes_over_no_open_wire():
    with pytest.raises(ConfigError, match="expected TLS to dns:///weakseg:8500, got a token"):
        Client("dns:///weakseg:8500", token=SECRET)
    Client("weakseg:8500", token=SECRET, plaintext_token=True).close()
    Client("weakseg:8500", token=SECRET, tls=True).close()


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("localhost:8500", True),
        ("127.0.0.1:8500", True),
        ("dns:///127.0.0.1:1", True),
        ("[::1]:8500", True),
        ("::1", True),
        ("unix:/run/weakseg.sock", True),
        ("0.0.0.0", False),
        ("10.0.0.1:8500", False),
        ("localhost.example.com:8500", False),
        ("dns:///weakseg", False),
    ],
)
def test_what_stays_on_this_machine(target, local):
    assert is_local(target) is local
