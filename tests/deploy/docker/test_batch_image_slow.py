"""The image `batch`, run alone and as KubeRay runs deploy/ray: head and worker, hosts of their own, and who submits.

Head and worker are started by the command lines that KubeRay makes; KubeRay is not here. Needs root, 10 GB of disk.
"""

import os
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[3]
BUNDLE = ROOT / "tests" / "data" / "bundles" / "toy" / "1"
HEAD, WORKER = "198.18.0.2", "198.18.0.3"  # kept for tests of networks (RFC 2544)
START_TIMEOUT_S = 180.0
JOB_TIMEOUT_S = 600.0
IMAGES = 40

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def image(images):
    with images.built("batch") as built:
        yield built


@pytest.fixture(scope="module", autouse=True)
def pictures(data):
    """What is to be labelled."""
    (data / "images").mkdir()
    for i in range(IMAGES):
        Image.fromarray(colours(i)).save(data / "images" / f"image-{i:02}.png")


@pytest.fixture(scope="module")
def hosts():
    """Two network namespaces with a wire between them: their paths."""
    names = [f"weakseg-{role}-{os.getpid()}" for role in ("head", "worker")]
    for name in names:
        ip(f"netns add {name}")
    try:
        ip(f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
        for name, address in zip(names, (HEAD, WORKER), strict=True):
            ip(f"-n {name} address add {address}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")
        yield [f"/run/netns/{name}" for name in names]
    finally:
        for name in names:
            ip(f"netns delete {name}")


@pytest.fixture
def start(run, image, data):
    """A function that starts a container of the image on `data` and the toy bundle."""
    return partial(run, image, tmp="8g", mounts={data: ("/data", "rw"), BUNDLE: ("/models", "ro")})


@pytest.fixture(scope="module")
def expected(data):
    """{file: bytes} of the masks that the job makes here, without an image."""
    command = [sys.executable, "-m", "weakseg", "pseudo-label", "--input", str(data / "images")]
    subprocess.run([*command, "--output", str(data / "here"), "--bundle", str(BUNDLE)], check=True, capture_output=True)
    return masks(data / "here")


def test_alone_with_a_root_that_is_read_only(start, data, expected):
    args = ["weakseg", "pseudo-label", "--input", "/data/images", "--output", "/data/alone", "--bundle", "/models"]
    container = start("alone", args)
    assert container.process.wait(timeout=JOB_TIMEOUT_S) == 0, container.log.read_text()
    assert masks(data / "alone") == expected


def test_the_rayjob_to_its_end(start, data, expected, hosts):
    """Its entrypoint on its cluster: with a token, which who has none is refused for."""
    job = yaml.safe_load((ROOT / "deploy" / "ray" / "rayjob.yaml").read_text())["spec"]
    token = ["RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef"]
    environment = [*token, "RAY_USAGE_STATS_ENABLED=0"]
    cluster = {"environment": environment, "read_only": False}
    common = "--block --dashboard-agent-listen-port=52365 --metrics-export-port=8080"
    parameters = job["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].items()
    common_head = " ".join([common, *(f"--{key}={value}" for key, value in parameters)])
    command = f"ulimit -n 65536; ray start --head {common_head} --dashboard-host=0.0.0.0 --node-ip-address={HEAD}"
    head = start("head", ["/bin/bash", "-c", "--", command], network=hosts[0], **cluster)
    wait_for(lambda: "Ray runtime started" in head.log.read_text(), head)
    command = f"ulimit -n 65536; ray start --address={HEAD}:6379 {common} --node-ip-address={WORKER} --num-cpus=2"
    worker = start("worker", ["/bin/bash", "-c", "--", command], network=hosts[1], **cluster)
    wait_for(lambda: "Ray runtime started" in worker.log.read_text(), worker)

    submit = ["ray", "job", "submit", "--address", f"http://{HEAD}:8265", "--", *shlex.split(job["entrypoint"])]
    stranger = start("stranger", submit, network=hosts[1], read_only=False)
    assert stranger.process.wait(timeout=START_TIMEOUT_S) != 0
    assert not (data / "masks").exists()
    submitted = start("submit", submit, network=hosts[1], **cluster)
    assert submitted.process.wait(timeout=JOB_TIMEOUT_S) == 0, submitted.log.read_text()
    assert "succeeded" in submitted.log.read_text()
    assert masks(data / "masks") == expected


def colours(i):
    pixels = np.full((40, 56 + i % 3, 3), 128, np.uint8)
    pixels[:20, : 10 + i % 20] = [255, 0, 0]
    pixels[20:, : 30 - i % 20] = [10, 230, 20]
    return pixels


def masks(folder):
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}
    assert len(found) >= IMAGES
    return found


def wait_for(condition, container):
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        assert container.process.poll() is None and time.monotonic() < deadline, container.log.read_text()
        time.sleep(0.2)


def ip(arguments):
    subprocess.run(["ip", *arguments.split()], check=True)
