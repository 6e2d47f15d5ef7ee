"""What a child says and takes; the children are short scripts in place of `weakseg run`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.weakseg.comparison.conftest import DONE
from weakseg.comparison import child
from weakseg.comparison.jobs import Job, Terms, jobs_of
from weakseg.errors import InUseError
from weakseg.locks import locked
from weakseg.progress import Progress
from weakseg.stages import stage_keys

SILENT = Progress("silent")


@pytest.fixture
def job(recipe_file: Path, tmp_path: Path) -> Job:
    return jobs_of(Terms(str(recipe_file)), "cam", [0], tmp_path / "runs")[0]


def test_what_a_training_takes_is_measured_once(job: Job, script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", json.dumps({job.folder.name: stage_keys(job.recipe)}))
    script.write_text(DONE + "if last == 'train': bytes(10) * (40 << 20)")
    assert child.make(job, SILENT) is None
    cost = json.loads((job.folder / "train/cost.json").read_text())
    assert cost["cpu_seconds"] == 7.5 and cost["peak_mib"] > 400, "the script fills ten times 40 MiB"
    script.write_text("raise SystemExit(1)")
    assert child.make(job, SILENT) is None, "it is done, so that nothing runs"


def test_of_a_training_that_went_on_the_time_is_unknown(
    job: Job, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYS", json.dumps({job.folder.name: stage_keys(job.recipe)}))
    train = job.folder / "train"
    train.mkdir(parents=True)
    (train / "started.json").write_text(json.dumps({"key": stage_keys(job.recipe)["train"]}))
    (train / "checkpoint.pt").write_text("")
    script.write_text(DONE)
    assert child.make(job, SILENT) is None
    assert json.loads((train / "cost.json").read_text())["cpu_seconds"] is None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("sys.stderr.write('train: started\\nerror: no room\\nfor it\\n'); sys.exit(1)", "no room"),
        ("raise ValueError('of a kind that nobody expected')", "ValueError: of a kind that nobody expected"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("sys.exit(4)", "exit code 4"),
    ],
)
def test_the_first_line_of_what_went_wrong(job: Job, script: Path, body: str, expected: str) -> None:
    script.write_text(f"import os, sys\n{body}\n")
    assert child.make(job, SILENT) == expected
    assert not (job.folder / "train/cost.json").exists()


def test_a_run_in_use_has_not_failed(job: Job, script: Path) -> None:
    """By another comparison; by somebody's own `weakseg run`, which began before, or a moment after we looked."""
    script.write_text("raise SystemExit('nothing is to run')")
    mapped = Job("cam/layer_cam", 0, job.recipe, job.folder.with_name("mapped"), job.folder, ("train",))
    with locked(job.folder / child.CLAIM):
        for one in (job, mapped):
            with pytest.raises(InUseError):
                child.make(one, SILENT)
    with locked(job.folder / ".lock"), pytest.raises(InUseError):
        child.make(job, SILENT)
    script.write_text("import sys; sys.exit('error: runs/cam-0 is in use by another run: wait for it')")
    with pytest.raises(InUseError):
        child.make(job, SILENT)
    assert not (job.folder / "train").exists()


def test_a_child_is_not_left_behind(job: Job, script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something stops the comparison while a child speaks."""
    pid = job.folder / "pid"
    script.write_text(
        f"import os, sys, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        "sys.stderr.write('train: started\\n'); sys.stderr.flush(); time.sleep(600)\n"
    )

    class Interrupted(Progress):
        def say(self, text: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child.make(job, Interrupted("silent"))
    assert not Path(f"/proc/{pid.read_text()}").exists()
