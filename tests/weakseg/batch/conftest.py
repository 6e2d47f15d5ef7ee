"""Photographs of the toy model's three colours, and ways to run the job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from tests.batch import FaultyFileSystem, paint, tree
from weakseg.batch import store
from weakseg.cli import main

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """14 images, some in a folder below; what is no image lies between them."""
    folder = tmp_path_factory.mktemp("photos")
    pairs = [("red",), ("green", "blue"), ("blue",), ("red", "green", "blue"), (), ("green",), ("blue", "red")]
    for i, names in enumerate(pairs):
        paint(folder / f"{i:02d}.png", *names, size=(40 + i, 56))
        paint(folder / "sub" / f"{i:02d}.jpg", *names, size=(56, 40 + i), quality=95)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


@pytest.fixture
def job(toy_bundle, capsys):
    """A function: run the job in this process by the command line; (exit code, its JSON)."""

    def run(source, output, *flags, by=None):
        where = by or ["--bundle", str(toy_bundle)]
        argv = ["pseudo-label", "--input", str(source), "--output", str(output), *where, *flags, "--json"]
        code = main(argv)
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def command(toy_bundle):
    """A function: the same job as arguments of a process."""

    def make(source, output, *flags):
        run = "import sys; from weakseg.cli import main; sys.exit(main())"
        job = ["pseudo-label", "--input", str(source), "--output", str(output), "--bundle", str(toy_bundle)]
        return [sys.executable, "-c", run, *job, *flags]

    return make


@pytest.fixture
def started():
    """A function that starts a process, which is ended with the test."""
    children = []

    def start(argv, **options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
        children.append(subprocess.Popen(argv, **(pipes | options)))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture
def bucket(monkeypatch):
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    monkeypatch.setattr(store, "FIRST_PAUSE_S", 0.001)
    FaultyFileSystem.store.clear()
    FaultyFileSystem.faults = 0
    yield "faulty://bucket/out"
    FaultyFileSystem.store.clear()
    FaultyFileSystem.faults = 0


@pytest.fixture(scope="module")
def many(photos, toy_bundle, tmp_path_factory):
    """300 images, and what comes of them undisturbed."""
    folder = tmp_path_factory.mktemp("many")
    images = sorted(path for path in photos.rglob("*") if path.suffix in (".png", ".jpg") and path.stat().st_size)
    for i in range(300):
        (folder / "in" / f"{i % 7}").mkdir(parents=True, exist_ok=True)
        source = images[i % len(images)]
        os.link(source, folder / "in" / f"{i % 7}" / f"{i:03d}{source.suffix}")
    argv = ["pseudo-label", "--input", str(folder / "in"), "--output", str(folder / "out"), "--json"]
    assert main([*argv, "--bundle", str(toy_bundle)]) == 0
    return folder / "in", tree(folder / "out")
