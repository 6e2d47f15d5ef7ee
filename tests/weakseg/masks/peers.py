"""Tools that read our formats, each in an environment of its own: .venv-<peer>, which `make test-<peer>` installs."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LONG_S = 300.0


def needs(peer):
    """Marks of a test."""
    reason = f"no .venv-{peer}: make test-{peer}"
    return [pytest.mark.slow, pytest.mark.skipif(not _python(peer).is_file(), reason=reason)]


def ask(peer, script, cwd, **asked):
    """What a script beside this file answers, JSON to JSON, without weakseg on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [_python(peer), Path(__file__).with_name(script)],
        check=True,
        cwd=cwd,
        env=environment | {"FIFTYONE_DO_NOT_TRACK": "true"},
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        timeout=LONG_S,
    )
    return json.loads(done.stdout)


def _python(peer):
    return ROOT / f".venv-{peer}" / "bin" / "python"
