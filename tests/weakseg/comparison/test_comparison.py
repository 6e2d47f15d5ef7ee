"""Several processes at one comparison; the trainings are short scripts, the locks are of real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.weakseg.comparison.conftest import DONE
from weakseg.comparison import comparison as comparisons
from weakseg.comparison.child import CLAIM
from weakseg.comparison.comparison import add, load
from weakseg.comparison.jobs import Terms, folder_of, jobs_of, key_of
from weakseg.errors import UsageError
from weakseg.progress import Progress
from weakseg.stages import stage_keys

SILENT = Progress("silent")
HOLD = """
import sys, time
from pathlib import Path
from weakseg.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "comparison"


@pytest.fixture
def terms(recipe_file: Path) -> Terms:
    return Terms(str(recipe_file))


@pytest.fixture
def other(root: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the plain classifier's run."""
    command = [sys.executable, "-c", HOLD, str(folder_of(root, "cam", 0) / CLAIM)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture
def trainings(
    other: subprocess.Popen[str], script: Path, terms: Terms, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is done at once."""
    script.write_text(DONE)
    names = ("cam", "cam/layer_cam", "acol", "mdc")
    jobs = [job for name in names for job in jobs_of(terms, name, [0], root)]
    monkeypatch.setenv("KEYS", json.dumps({job.folder.name: stage_keys(job.recipe) for job in jobs}))
    monkeypatch.setattr(comparisons, "POLL_S", 0.01)


def done(root: Path) -> set[str]:
    return {path.parents[1].name for path in root.glob("*/evaluate/done.json")}


@pytest.mark.usefixtures("trainings")
def test_what_another_process_has_is_left_to_it_and_made_here_when_it_dies(
    other: subprocess.Popen[str], terms: Terms, root: Path
) -> None:
    """Maps that look at its classifier wait for it; another method does not."""
    comparison = load(root, terms)
    runs = add(comparison, ["cam", "cam/layer_cam", "acol"], [0], [], SILENT)
    next(runs)
    assert done(root) == {"acol-0"}
    assert key_of(root / "cam.layer_cam-0", "train") is None
    other.kill()
    next(runs)
    assert done(root) == {"acol-0", "cam-0"}
    next(runs)
    assert (root / "cam.layer_cam-0/train/done.json").samefile(root / "cam-0/train/done.json")
    assert list(runs) == [] and comparison.errors == {}


@pytest.mark.usefixtures("trainings")
def test_what_another_process_writes_stays_and_counts(other: subprocess.Popen[str], terms: Terms, root: Path) -> None:
    """It has added a method, seeds and a network's method, and its run has failed."""
    comparison = load(root, terms)
    runs = add(comparison, ["cam", "acol"], [0], ["x is left out"], SILENT)
    next(runs)
    beside = load(root, None)
    with beside.changing():
        beside.seeds |= {"mdc": [0]}
        beside.errors["cam"] = {0: "no room"}
        beside.segmented = ["mdc"]
    other.kill()
    assert len(list(runs)) == 1
    assert done(root) == {"acol-0", "mdc-0"}, "the plain classifier's has failed there"
    found = json.loads((root / comparisons.FILE).read_text())
    assert list(found["methods"]) == ["cam", "acol", "mdc"]
    assert {name: method["errors"] for name, method in found["methods"].items() if method["errors"]} == {
        "cam": {"0": "no room"}
    }
    assert found["segmented"] == ["mdc"] and found["left_out"] == ["x is left out"]
    assert list(comparison.failures()) == ["cam, seed 0: no room"]


def test_terms_of_whoever_was_first_hold(terms: Terms, root: Path) -> None:
    """Both began before there was a file."""
    mine, theirs = load(root, terms), load(root, Terms(terms.recipe, ("--train.optim.lr", "0.5")))
    with theirs.changing():
        theirs.seeds["cam"] = [0]
    with pytest.raises(UsageError, match=r"other terms \(recipe .*--train.optim.lr 0.5"):
        next(add(mine, ["cam"], [0], [], SILENT))
