"""What an image's HEALTHCHECK says about a real server."""

import subprocess
import sys

import pytest

from serve.healthcheck import PORT, main, metrics_port
from serve.settings import ServeConfig


def test_a_server_that_is_ready_is_healthy_until_it_drains(serving, monkeypatch, capsys):
    running = serving()
    monkeypatch.setenv("WEAKSEG_METRICS_PORT", str(running.server.metrics_port))
    assert main() == 0

    running.call(running.server.health.drain())
    assert main() == 1
    assert capsys.readouterr().err.startswith("not ready:")


def test_without_a_server_it_says_which_port_it_asked(monkeypatch, capsys):
    monkeypatch.setenv("WEAKSEG_METRICS_PORT", "1")
    assert main() == 1
    assert "no answer on port 1" in capsys.readouterr().err


def test_the_port_is_the_servers(tmp_path):
    file = tmp_path / "weakseg.toml"
    file.write_text("metrics_port = 9000\n")
    assert ServeConfig().metrics_port == PORT == metrics_port({})
    assert metrics_port({"WEAKSEG_CONFIG": str(file)}) == 9000
    assert metrics_port({"WEAKSEG_CONFIG": str(file), "WEAKSEG_METRICS_PORT": "9001"}) == 9001


@pytest.mark.parametrize("module", ["numpy", "grpc", "pydantic"])
def test_it_imports_nothing_that_takes_long(module):
    code = f"import sys, serve.healthcheck; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
