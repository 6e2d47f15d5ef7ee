"""`make test-image`: the images for CPUs, built by buildah on a Debian from debootstrap, run by runc as a cluster runs
them: uid 10001, no capability, a root that is read-only and without a shell. Prints what it measures.

The network is the host's, on free ports of the loopback interface: the tests need no bridge for it.
"""

import json
import socket
import subprocess
import time
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest

from benchmarks.line import line
from tests.deploy.docker.conftest import running
from weakseg.client import Client
from weakseg.errors import OutputUnsupportedError

ROOT = Path(__file__).parents[3]
LIMIT_MB = {"serve-cpu": 350, "serve-cpu-crf": 650}  # of site-packages
READY_TIMEOUT_S = 120.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=LIMIT_MB)
def image(request, images):
    """The image, built, without the shells of its base."""
    with images.built(request.param, wheels_of="serve-cpu-crf") as built:  # which has all of serve-cpu's, and more
        for shell in ("bash", "dash", "sh", "rbash"):  # nobody needs one
            (built.root / "usr" / "bin" / shell).unlink(missing_ok=True)
        yield built


@pytest.fixture(scope="module")
def container(image, tmp_path_factory):
    """The image, run on the toy bundle until it is ready: its `target`, metrics_port, ready_s, id, process and log."""
    folder = tmp_path_factory.mktemp("container")
    port, metrics_port = free_port(), free_port()
    settings = [f"WEAKSEG_PORT={port}", f"WEAKSEG_METRICS_PORT={metrics_port}", "WEAKSEG_HOST=127.0.0.1"]
    models = {ROOT / "tests" / "data" / "bundles": ("/models", "ro")}
    began = time.monotonic()
    with running(image, folder, environment=settings, mounts=models) as started:
        wait_until_ready(metrics_port, started.process, started.log)
        started.ready_s = time.monotonic() - began
        started.target, started.metrics_port = f"127.0.0.1:{port}", metrics_port
        yield started


def test_its_config_is_what_a_cluster_asks_for(image):
    config = image.config
    assert config["User"] == "10001:10001"
    assert (config["Entrypoint"], config["Cmd"]) == (["weakseg"], ["serve", "--models", "/models"])
    assert set(config["ExposedPorts"]) == {"8500/tcp", "9464/tcp"}
    assert config["Healthcheck"]["Test"] == ["CMD", "python3", "-m", "serve.healthcheck"]
    labels = {key.rpartition(".")[2]: value for key, value in config["Labels"].items() if "opencontainers" in key}
    assert labels["title"] == f"weakseg/{image.name}"
    assert (labels["version"], labels["source"], labels["licenses"]) == (
        image.version,
        "https://example.org/src",
        "Apache-2.0",
    )
    revision = labels["revision"].removesuffix("-dirty")
    assert subprocess.run(["git", "cat-file", "-e", revision], cwd=ROOT, check=False).returncode == 0


def test_it_is_as_large_as_was_promised(image):
    packages = site_packages(image)
    bytes_ = sum(path.lstat().st_size for path in packages.rglob("*") if not path.is_dir())
    line(f"image.{image.name}.site_packages", bytes_ / 1e6, unit="MB", cost=True, goal=LIMIT_MB[image.name])
    assert bytes_ <= LIMIT_MB[image.name] * 1e6
    assert not {"torch", "pip", "setuptools"} & {path.name for path in packages.iterdir()}


def test_what_is_inside_is_what_its_bill_of_materials_says(image):
    bill = json.loads((image.root / "usr/share/sbom/weakseg.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert (bill["metadata"]["component"]["name"], bill["metadata"]["component"]["version"]) == (
        "weakseg",
        image.version,
    )
    listed = {canonical(one["name"]): one["version"] for one in bill["components"]} | {"weakseg": image.version}
    installed = {}
    for folder in site_packages(image).glob("*.dist-info"):
        name, _, version = folder.name.removesuffix(".dist-info").rpartition("-")
        installed[canonical(name)] = version
    assert installed == listed


def test_a_mask_from_the_container(image, container, colours, model):
    with Client(container.target) as client:
        result = client.segment(colours, outputs=("segmentation", "cam"))
        assert np.array_equal(result.mask, model.segment(colours, outputs=("segmentation",)).mask)
        refinements = ("none",) if image.name == "serve-cpu" else ("none", "crf")
        assert client.model().refinements == refinements
        if refinements == ("none",):
            with pytest.raises(OutputUnsupportedError):
                client.segment(colours, outputs=("pseudo_mask",), refine="crf")
        else:
            refined = client.segment(colours, outputs=("pseudo_mask",), refine="crf").pseudo_mask
            expected = model.segment(colours, outputs=("pseudo_mask",), refine="crf").pseudo_mask
            assert np.array_equal(refined, expected)
    line(f"image.{image.name}.start_to_ready", container.ready_s, unit="s", cost=True)
    line(f"image.{image.name}.rss", resident_mib(container), unit="MiB", cost=True)


def test_its_health_check_passes(container):
    assert run_inside(container, "python3", "-m", "serve.healthcheck").returncode == 0


def test_its_user_may_write_nowhere_but_below_tmp(container):
    code = (
        "import os\n"
        "assert os.getuid() == 10001 and os.getgid() == 10001\n"
        "open('/tmp/probe', 'w').close()\n"
        "for folder in ('/', '/opt/weakseg', '/models/toy/1', '/usr/bin'):\n"
        "    try:\n"
        "        open(folder + '/probe', 'w').close()\n"
        "    except OSError as error:\n"
        "        assert error.errno == 30, error\n"  # read-only file system
        "    else:\n"
        "        raise SystemExit(folder + ' can be written to')\n"
    )
    result = run_inside(container, "python3", "-c", code)
    assert result.returncode == 0, result.stderr
    assert run_inside(container, "sh", "-c", "true").returncode != 0


def test_sigterm_stops_it_in_order(container):
    """The last test of the image: the container is gone after it."""
    subprocess.run(["runc", "kill", container.id, "TERM"], check=True)
    assert container.process.wait(timeout=60) == 0
    lines = [json.loads(text) for text in container.log.read_text().splitlines() if text[:1] == "{"]
    assert lines[-1]["message"] == "stopped" and lines[-1]["all_finished"] is True


def run_inside(container, *command):
    return subprocess.run(["runc", "exec", container.id, *command], capture_output=True, text=True, check=False)


def wait_until_ready(metrics_port, process, log):
    deadline = time.monotonic() + READY_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(f"http://127.0.0.1:{metrics_port}/readyz", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"the container did not get ready:\n{log.read_text()}")


def resident_mib(container):
    """Of the process that serves, by its metrics."""
    with urlopen(f"http://127.0.0.1:{container.metrics_port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return next(float(text.split()[1]) for text in lines if text.startswith("process_resident_memory_bytes ")) / 2**20


def site_packages(image):
    (found,) = (image.root / "opt" / "weakseg" / "lib").glob("python3.*/site-packages")
    return found


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def canonical(name):
    return name.lower().replace("_", "-").replace(".", "-")
