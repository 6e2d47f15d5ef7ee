"""What docs/kubernetes.md says that an operator sees is what our programs say."""

import hashlib
import logging
import re
import shutil
from functools import partial

import pytest

from serve.logs import AUDIT, LOGGERS
from tests.deploy.kubernetes.manifests import ROOT
from tests.web import web_server
from weakseg import signature
from weakseg.batch import store
from weakseg.bundle import MANIFEST, SIGNATURE
from weakseg.cli import main

DOC = (ROOT / "docs" / "kubernetes.md").read_text()
ADDRESS = "https://models.example.com/animals/1"
KEY = "/etc/weakseg/signing/signing.pub"
OF_KUBERNETES = {"Init:Error", "ContainerCreating", "Pending", "kubectl describe hpa"}
OF_OTHER_TESTS = {"DEADLINE_TOO_SHORT", "weakseg doctor"}  # of tests/serve/test_service.py and tests/serve/doctor


def documented():
    """Texts in `code` of the second column of the table of faults."""
    rows = [line.split(" | ") for line in DOC.split("## When something is wrong")[1].splitlines() if line[:2] == "| "]
    texts = {text for row in rows[1:] for text in re.findall("`([^`]+)`", row[1])}
    return texts - OF_KUBERNETES - OF_OTHER_TESTS


@pytest.fixture(autouse=True)
def logs_as_they_were():
    """A server sends its logs to the stderr of its process for good: here that is a test's own, and soon closed."""
    loggers = [logging.getLogger(name) for name in (*LOGGERS, AUDIT)]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def served(tmp_path):
    with web_server(tmp_path / "served") as server:
        yield server


@pytest.fixture
def fault(served, toy_bundle, tmp_path, monkeypatch):
    """{documented text: (function that runs into it, what stands for which words)}."""
    monkeypatch.setattr(store, "FIRST_PAUSE_S", 0.0)
    bundle = shutil.copytree(toy_bundle, tmp_path / "served" / "toy" / "1")
    url = f"{served.url}/toy/1"

    def fetch(*flags, at=url):
        assert main(["bundle", "fetch", at, str(tmp_path / "models"), *flags]) == 1

    def serve(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert main(["serve", "--port", "0", "--metrics-port", "0"]) == 2

    def refuse():
        served.answers[f"/toy/1/{MANIFEST}"] = [403]
        fetch()

    def damaged():
        data = bytearray((bundle / "segmentation.onnx").read_bytes())
        data[-1] ^= 1
        (bundle / "segmentation.onnx").write_bytes(data)
        fetch()

    def unsigned():
        fetch("--public-key", str(signature.keygen(tmp_path / "ours.pem")[0]))

    def signed_by_another():
        signature.keygen(tmp_path / "theirs.pem")
        (bundle / SIGNATURE).write_bytes(signature.sign((bundle / MANIFEST).read_bytes(), tmp_path / "theirs.pem"))
        unsigned()

    def full():  # on /dev/full every write says that the disk is
        digest = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
        staging = tmp_path / "models" / f".fetch-{digest[:16]}"
        staging.mkdir(parents=True)
        (staging / ".classifier.onnx.part").symlink_to("/dev/full")
        fetch()

    def no_cuda():
        assert main(["bundle", "fetch", url, str(tmp_path / "models")]) == 0
        monkeypatch.setenv("WEAKSEG_PROVIDER", "cuda")
        assert main(["serve", "--models", str(tmp_path / "models"), "--check"]) == 1

    tls = {"WEAKSEG_TLS_CERT": "/etc/weakseg/tls/tls.crt", "WEAKSEG_TLS_KEY": "/etc/weakseg/tls/tls.key"}
    return {
        f"expected manifest.json at {ADDRESS}, got none: name the folder of a version": partial(fetch, at=url + "9"),
        "the server refuses it (403 Forbidden)": refuse,
        "could not fetch …/manifest.json in 6 attempts": partial(fetch, at="http://127.0.0.1:9/toy/1"),
        "expected a manifest.json of sha256 0000…, got …: it is another bundle than the one that was named": partial(
            fetch, "--sha256", "0" * 64
        ),
        "segmentation.onnx is damaged: expected sha256 ff6f71d57c16…, got c1026c5ea2c5…": damaged,
        f"expected manifest.sig by a key in {KEY}, got none": unsigned,
        "expected a signature by a key in …, got one by …": signed_by_another,
        "no room for /models/…: give its volume more": full,
        "expected a PEM certificate and its key in /etc/weakseg/tls/tls.crt, /etc/weakseg/tls/tls.key": partial(
            serve, WEAKSEG_MODELS=str(tmp_path / "served"), **tls
        ),
        "WEAKSEG_MAX_BATCH must be a valid integer": partial(serve, WEAKSEG_MAX_BATCH="many"),
        "unknown environment variable WEAKSEG_MODEL: did you mean WEAKSEG_MODELS?": partial(
            serve, WEAKSEG_MODEL="/models"
        ),
        "CUDAExecutionProvider is not in this onnxruntime": no_cuda,
    }


@pytest.mark.parametrize("text", sorted(documented()))
def test_what_an_operator_sees(text, fault, tmp_path, capsys):
    fault[text]()
    said = capsys.readouterr().err
    pattern = re.escape(text).replace("/models/…", f"{tmp_path}/models/.*")
    for stands_for in (re.escape(ADDRESS), re.escape(KEY), "ff6f71d57c16", "c1026c5ea2c5", "…"):
        pattern = pattern.replace(stands_for, ".*")
    assert re.search(pattern, said), said


def test_no_fault_is_left_out(fault):
    assert set(fault) == documented()
