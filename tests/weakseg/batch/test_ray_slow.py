"""The job on Ray: the same bytes as on one machine; a node that dies and a driver that is killed cost nothing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.batch import rows, tree

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
LONG_S = 300


def test_the_same_bytes(photos, command, tmp_path):
    subprocess.run(command(photos, tmp_path / "local", "--cams"), check=True, capture_output=True)
    done = subprocess.run(
        command(photos, tmp_path / "ray", "--cams", "--engine", "ray", "--json"),
        check=True,
        capture_output=True,
        text=True,
        timeout=LONG_S,
    )
    assert json.loads(done.stdout)["ok"] == 14
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")
    again = subprocess.run(
        command(photos, tmp_path / "ray", "--cams", "--json"), check=True, capture_output=True, text=True
    )
    assert json.loads(again.stdout)["labelled"] == 0, "one engine goes on where the other stopped"


def test_bad_images_and_full_stores(many, command, tmp_path):
    """What an actor raises about the job arrives as it is here."""
    (tmp_path / "out" / "masks").parent.mkdir()
    (tmp_path / "out" / "masks").write_text("no folder")
    done = subprocess.run(
        command(many[0], tmp_path / "out", "--engine", "ray"),
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    assert done.returncode == 1 and "Not a directory" in done.stderr.replace("File exists", "Not a directory")


def test_a_node_that_dies_loses_and_repeats_nothing(many, toy_bundle, tmp_path):
    source, expected = many
    script = Path(__file__).with_name("ray_cluster.py")
    argv = [sys.executable, str(script), str(source), str(tmp_path / "out"), str(toy_bundle), "60"]
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        timeout=LONG_S,
        cwd=ROOT,
        check=False,
        env=os.environ | {"PYTHONPATH": f".:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a node is gone" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ok"] == 300
    assert tree(tmp_path / "out") == expected and len(rows(tmp_path / "out")) == 300


@pytest.fixture(scope="module")
def cluster():
    """A cluster that outlives the drivers."""
    from ray.cluster_utils import Cluster

    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield running.address
    running.shutdown()


def test_r22_a_driver_killed_at_random_points(many, command, started, tmp_path, cluster):
    source, expected = many
    rng, out = np.random.default_rng(0), tmp_path / "out"
    flags = ["--engine", "ray", "--address", cluster, "--json"]
    for share in np.sort(rng.uniform(0, 1, size=20)):
        child = started(command(source, out, *flags))
        ends = time.monotonic() + LONG_S
        while sum(1 for _ in out.glob("masks/**/*.png")) < int(share * 300) and time.monotonic() < ends:
            time.sleep(0.01)
        child.kill()
        child.wait()
    done = subprocess.run(command(source, out, *flags), check=True, capture_output=True, text=True, timeout=LONG_S)
    assert json.loads(done.stdout)["finished"]
    assert tree(out) == expected
