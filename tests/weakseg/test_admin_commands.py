"""`weakseg admin` against a real server."""

import json
import logging

import pytest

from serve import logs
from serve.repository import BundleFolder
from weakseg.cli import main

TOKEN = "correct horse battery staple"


@pytest.fixture
def admin(serving, toy_bundle, tmp_path, monkeypatch, capsys):
    """A function: arguments of `weakseg admin` to (exit code, stdout, stderr), for a server with tokens."""
    (tmp_path / "tokens.toml").write_text(f'[operator]\ntoken = "{TOKEN}"\nallow = ["admin"]\n')
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.delenv("WEAKSEG_TOKEN", raising=False)
    folders = [BundleFolder("toy", version, toy_bundle) for version in "12"]
    running = serving(folders=folders, admin_port=0, tokens=tmp_path / "tokens.toml")

    def run(*args, token=("--token-file", str(tmp_path / "token"))):
        code = main(["admin", *args, "--endpoint", f"127.0.0.1:{running.server.admin_port}", *token])
        return code, *capsys.readouterr()

    return run


def test_models_come_and_go(admin):
    assert admin("unload", "toy/1")[:2] == (0, "toy/1 is out of service: `weakseg admin load toy/1` brings it back\n")
    code, _, err = admin("unload", "toy/2")
    assert code == 1 and "toy/2 is the last version of toy that answers" in err
    code, out, _ = admin("reload")
    assert (code, [line.split() for line in out.splitlines()[1:]]) == (0, [["toy/2", "ready"], ["toy/1", "unloaded"]])
    assert admin("load", "toy/1")[1].startswith("toy/1 is ready, sha256 ")
    assert admin("unload", "toy/1", "--force")[0] == admin("unload", "toy/2", "--force")[0] == 0
    assert json.loads(admin("reload", "--json")[1]) == {
        "unloaded": [{"name": "toy", "version": "1"}, {"name": "toy", "version": "2"}]
    }


def test_the_log_level(admin):
    loggers = [logging.getLogger(name) for name in logs.LOGGERS]
    before = [logger.level for logger in loggers]
    try:
        admin("log-level", "error")
        assert admin("log-level", "debug")[1] == "debug; it was error\n"
        assert admin("log-level")[1] == "debug\n"
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def test_another_port_is_none(shared_serving, capsys):
    assert main(["admin", "reload", "--endpoint", shared_serving.target]) == 2
    assert "expected the admin port of a server" in capsys.readouterr().err


def test_tokens_and_mistakes(admin, monkeypatch, tmp_path):
    code, _, err = admin("log-level", token=())
    assert code == 1 and "expected a token, got none" in err
    monkeypatch.setenv("WEAKSEG_TOKEN", TOKEN)
    assert admin("log-level", token=())[0] == 0
    code, _, err = admin("load", "toy")
    assert code == 2 and "expected NAME/VERSION, got 'toy'" in err
    code, _, err = admin("load", "toy/9", "--json", token=("--token-file", str(tmp_path / "none")))
    assert code == 2
    code, out, _ = admin("load", "toy/9", "--json")
    assert code == 1 and json.loads(out)["error"]["reason"] == "MODEL_NOT_FOUND"
