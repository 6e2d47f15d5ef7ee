"""The archive in a real TorchServe, over REST and gRPC, with tokens; `make test-torchserve` installs what it needs."""

import base64
import json
import os
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from export.torchserve import export_archive
from export.torchserve_server import Ports, local_torchserve
from weakseg.masks.png import labels_from_png

COMMANDS = Path(__file__).parents[2] / ".venv-torchserve" / "bin"
LONG_S = 300.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (COMMANDS / "torchserve").is_file(), reason="no .venv-torchserve: make test-torchserve"),
]
needs_java = pytest.mark.skipif(
    shutil.which("java") is None and "JAVA_HOME" not in os.environ, reason="no Java: install openjdk-17-jre-headless"
)


@pytest.fixture(scope="module")
def server(toy_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchserve")
    made = export_archive(toy_bundle, folder / "models")
    with local_torchserve(
        Path(made["archive"]),
        made["model"],
        folder,
        ports=free_ports(),
        torchserve=COMMANDS / "torchserve",
        properties={"enable_model_api": "true"},  # for the test that registers one
    ) as running:
        yield running


def free_ports():
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in fields(Ports)]
    numbers = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return Ports(*numbers)


def call(url, key, data=None, method=None, **headers):
    """Status, content type and body of a request; 4xx and 5xx are answers, too."""
    headers = {"Authorization": f"Bearer {key}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=LONG_S) as response:
            return response.status, response.headers["content-type"], response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["content-type"], error.read()


def predict(server, image, *, model="toy", key=None, **options):
    url = f"http://127.0.0.1:{server.ports.inference}/predictions/{model}"
    headers = {f"weakseg_{name}": value for name, value in options.items()}
    return call(url, key or server.key(), image, content_type="application/octet-stream", **headers)


def form(parts):
    """A multipart body of {name: bytes} and its content type."""
    lines = [
        b'--cut\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n%s\r\n" % (name.encode(), name.encode(), data)
        for name, data in parts.items()
    ]
    return b"".join(lines) + b"--cut--\r\n", "multipart/form-data; boundary=cut"


def wire(number, data):
    """A protobuf field of bytes."""
    length, size = len(data), b""
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + data


def predict_grpc(server, inputs, key=None):
    """InferenceAPIsService.Predictions; the message is model_name = 1, map<string, bytes> input = 3.

    Source: inference.proto in TorchServe's model-server.jar. Its response is bytes prediction = 1, as a BytesValue is.
    """
    entries = (wire(1, name.encode()) + wire(2, value) for name, value in inputs.items())
    message = wire(1, b"toy") + b"".join(wire(3, entry) for entry in entries)
    with grpc.insecure_channel(f"127.0.0.1:{server.ports.grpc_inference}") as channel:
        method = channel.unary_unary("/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions")
        metadata = (("authorization", f"Bearer {key or server.key()}"),)
        return BytesValue.FromString(method(message, metadata=metadata, timeout=LONG_S)).value


def test_the_archive_is_what_torch_model_archiver_makes(toy_bundle, tmp_path):
    """But for the time it was made."""
    ours = export_archive(toy_bundle, tmp_path / "ours")["archive"]
    with zipfile.ZipFile(ours) as archive:
        archive.extractall(tmp_path / "files")
    shutil.rmtree(tmp_path / "files" / "MAR-INF")
    handler = tmp_path / "files" / "torchserve_handler.py"
    config = tmp_path / "files" / "model-config.yaml"
    command = [COMMANDS / "torch-model-archiver", "--model-name", "toy", "--version", "1", "--handler", handler]
    command += ["--config-file", config, "--extra-files", tmp_path / "files", "--export-path", tmp_path]
    (tmp_path / "temporary").mkdir()
    subprocess.run(command, check=True, env=os.environ | {"TMPDIR": str(tmp_path / "temporary")})
    with zipfile.ZipFile(ours) as mine, zipfile.ZipFile(tmp_path / "toy.mar") as theirs:
        manifest = json.loads(theirs.read("MAR-INF/MANIFEST.json"))
        del manifest["createdOn"]
        assert json.loads(mine.read("MAR-INF/MANIFEST.json")) == manifest
        assert sorted(mine.namelist()) == sorted(theirs.namelist())
        for name in set(mine.namelist()) - {"MAR-INF/MANIFEST.json"}:
            assert mine.read(name) == theirs.read(name)


@needs_java
def test_rest_gives_the_bundles_masks(server, model, image):
    expected = model.segment(image)
    assert predict(server, image, model="toy/1", format="png") == (200, "image/png", expected.mask_png())
    status, content_type, body = predict(server, image)
    assert (status, content_type) == (200, "application/json")
    answer = json.loads(body)
    assert answer["model_sha256"] == model.bundle.sha256
    labels = labels_from_png(base64.b64decode(answer["masks"]["segmentation"]["png"]))
    np.testing.assert_array_equal(labels, expected.segmentation)


@needs_java
def test_a_form_carries_options(server, model, image):
    parts = {"data": image, "outputs": b"pseudo_mask", "tags": b"red,blue", "threshold": b"0.3", "format": b"png"}
    body, content_type = form(parts)
    url = f"http://127.0.0.1:{server.ports.inference}/predictions/toy"
    expected = model.segment(image, outputs=["pseudo_mask"], tags=["red", "blue"], threshold=0.3).mask_png()
    assert call(url, server.key(), body, content_type=content_type) == (200, "image/png", expected)


@needs_java
def test_grpc_gives_the_bundles_masks(server, model, image):
    expected = model.segment(image, outputs=["pseudo_mask"], tags=["green"]).mask_png()
    inputs = {"data": image, "outputs": b"pseudo_mask", "tags": b"green", "format": b"png"}
    assert predict_grpc(server, inputs) == expected


@needs_java
def test_a_wrong_token_is_refused(server, image):
    status, _, body = predict(server, image, key="wrong")
    assert status == 400 and json.loads(body)["type"] == "InvalidKeyException"
    assert predict(server, image, key=server.key("management"))[0] == 400
    with pytest.raises(grpc.RpcError) as refused:
        predict_grpc(server, {"data": image}, key="wrong")
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED


@needs_java
def test_a_broken_image_is_an_error_and_the_worker_lives_on(server, model, image):
    worker = worker_ids(server)
    status, content_type, body = predict(server, image[:60], format="png")
    assert (status, content_type) == (400, "application/json")
    assert json.loads(body)["error"]["reason"] == "IMAGE_UNDECODABLE"
    assert json.loads(predict_grpc(server, {"data": b"none"}))["error"]["reason"] == "UNSUPPORTED_FORMAT"
    assert predict(server, image, format="png")[2] == model.segment(image).mask_png()
    assert worker_ids(server) == worker


@needs_java
def test_a_batch_answers_each_of_its_requests(server, model, colours, image, png):
    url = f"http://127.0.0.1:{server.ports.management}/models?url=toy-1.mar&model_name=batched&batch_size=4"
    url += "&max_batch_delay=100000&initial_workers=1&synchronous=true"
    status, _, body = call(url, server.key("management"), method="POST")
    assert status == 200, body
    images = [image, image[:60], png(colours[:, ::-1]), png(colours[:13, :17])]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda data: predict(server, data, model="batched", format="png"), images))
    assert [status for status, _, _ in answers] == [200, 400, 200, 200]
    for i in (0, 2, 3):
        assert answers[i][2] == model.segment(images[i]).mask_png()
    received = [line for line in server.log.read_text().splitlines() if "Backend received inference" in line]
    assert sum("-batched_" in line for line in received) == 1


def worker_ids(server):
    url = f"http://127.0.0.1:{server.ports.management}/models/toy"
    _, _, body = call(url, server.key("management"))
    return [(worker["pid"], worker["startTime"], worker["status"]) for worker in json.loads(body)[0]["workers"]]
