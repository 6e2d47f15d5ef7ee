"""`weakseg serve` asked by NVIDIA's client for Triton, each in its own process; `make test-oip` installs the client."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-tritonclient" / "bin" / "python"
LONG_S = 60.0
OUTPUTS = ("segmentation", "pseudo_mask", "scores", "cam")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-tritonclient: make test-oip"),
]


@pytest.fixture(scope="module")
def target(toy_bundle):
    """Address of `weakseg serve` on the toy bundle, ready."""
    command = [sys.executable, "-c", "import sys; from weakseg.cli import main; sys.exit(main())", "serve", "--json"]
    command += ["--bundle", str(toy_bundle), "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
    with subprocess.Popen([*command, "--threads", "1"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert select.select([server.stdout], [], [], LONG_S)[0], "the server said nothing"
            address = f"127.0.0.1:{json.loads(server.stdout.readline())['port']}"
            with grpc.insecure_channel(address) as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch(
                    health_pb2.HealthCheckRequest(service="readiness"), timeout=LONG_S, wait_for_ready=True
                )
                assert any(answer.status == health_pb2.HealthCheckResponse.SERVING for answer in watch)
                watch.cancel()
            yield address
        finally:
            server.kill()


@pytest.fixture(scope="module")
def image(colours, png, tmp_path_factory):
    path = tmp_path_factory.mktemp("oip") / "colours.png"
    path.write_bytes(png(colours))
    return path


def run(script, *args, cwd):
    """What a script prints, without weakseg on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [PYTHON, script, *map(str, args)]
    return subprocess.run(
        command, check=True, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True, timeout=LONG_S
    ).stdout


@pytest.fixture(scope="module")
def told(target, image):
    """What the client was told, and the arrays it was given."""
    out = image.with_name("out.npz")
    said = json.loads(run(ROOT / "tests/serve/tritonclient_calls.py", target, image, out, cwd=image.parent))
    with np.load(out) as found:
        return said, dict(found)


def test_health_and_metadata(told):
    said, _ = told
    assert said["live"] is said["ready"] is True
    assert said["model_ready"] == [True, True, False, False]
    assert said["server"]["name"] == "weakseg"
    assert said["model"]["versions"] == ["1"]
    assert [output["name"] for output in said["model"]["outputs"]] == list(OUTPUTS)
    assert (said["id of BYTES"], said["id of UINT8"]) == ("BYTES", "UINT8")


@pytest.mark.parametrize("form", ["BYTES", "UINT8", "all"])
def test_arrays_are_the_offline_ones(told, model, colours, form):
    _, found = told
    expected = model.segment(colours, outputs=("segmentation", "pseudo_mask", "cam"))
    for name in ("segmentation", "pseudo_mask"):
        np.testing.assert_array_equal(found[f"{form}/{name}"], getattr(expected, name)[None])
    np.testing.assert_array_equal(found[f"{form}/scores"], [np.float32([*expected.scores.values()])])
    np.testing.assert_array_equal(found[f"{form}/cam"], [np.stack([*expected.heatmaps.values()])])


def test_float16_options_batch_and_asyncio(told, model, colours):
    _, found = told
    assert found["half/cam"].dtype == np.float16
    cam = np.stack([*model.segment(colours, outputs=("cam",)).heatmaps.values()])
    np.testing.assert_array_equal(found["half/cam"], [cam.astype(np.float16)])
    expected = model.segment(colours, outputs=("pseudo_mask",), threshold=0.2, refine="none", tags=["red", "green"])
    np.testing.assert_array_equal(found["options/pseudo_mask"], [expected.pseudo_mask])
    mask = model.segment(colours).mask
    np.testing.assert_array_equal(found["batch/segmentation"], [mask] * 3)
    np.testing.assert_array_equal(found["aio/segmentation"], [mask])


def test_errors(told):
    errors = told[0]["errors"]
    assert {name: status for name, (status, _) in errors.items()} == {
        "broken": "StatusCode.INVALID_ARGUMENT",
        "model": "StatusCode.NOT_FOUND",
        "datatype": "StatusCode.INVALID_ARGUMENT",
        "shared memory": "StatusCode.UNIMPLEMENTED",
    }
    assert "expected JPEG, PNG, WEBP" in errors["broken"][1]


def test_the_example(target, image, model, colours):
    from PIL import Image

    printed = run(ROOT / "examples/triton_client.py", target, image, cwd=image.parent)
    scores = model.segment(colours, outputs=("cam",)).scores
    assert printed == f"{image}: 56x40, {', '.join(f'{name} {score:.2f}' for name, score in scores.items())}\n"
    with Image.open(image.parent / "masks" / "colours-mask.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask), model.segment(colours).mask)
