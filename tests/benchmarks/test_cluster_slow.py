"""A cluster of real servers through all that may happen to one: no call of our client fails."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="makes the certificates: pip install 'weakseg[sign]'")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("hosts", ["namespaces", "loopback"])
def test_no_call_fails(tmp_path, hosts):
    if hosts == "namespaces" and (os.geteuid() or not shutil.which("ip")):
        pytest.skip("network namespaces need root and iproute2: apt-get install iproute2")
    flags = ["--scale", "0.5", "--grace-s", "15", "--picture", str(tmp_path / "cluster.svg")]
    flags += ["--loopback"] if hosts == "loopback" else []
    command = [sys.executable, "-m", "benchmarks.cluster", *flags]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {row["name"]: row["ours"] for row in map(json.loads, filter(_is_line, done.stdout.splitlines()))}
    assert lines["cluster.failed"] == 0 and lines["cluster.calls"] > 500
    if hosts == "namespaces" and "namespaces" not in done.stdout.splitlines()[0]:
        pytest.skip("this machine permits no network namespaces")


def _is_line(text):
    return text.startswith("{")
