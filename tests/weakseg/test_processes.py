"""Who does what in a run of several processes; real ones meet in tests/training/test_distributed.py."""

import itertools
import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
from PIL import Image

from weakseg import cli, processes
from weakseg.errors import TrainingError
from weakseg.progress import Progress
from weakseg.recipe import DataConfig, EvaluateConfig, Recipe
from weakseg.run import run
from weakseg.stages import STAGES, plan

PARALLEL = ["train", "train_seg"]


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "data/cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "data/cat/a.png")
    data = DataConfig(root=str(tmp_path / "data"), format="folder")
    return Recipe("test", data=data, evaluate=EvaluateConfig(splits=("train",)))


@pytest.fixture
def events(monkeypatch):
    """What happens in this process, with stages that do nothing and a crew that is not there."""
    happened = []

    def stage_run(recipe, folder, *, stage, progress):
        happened.append(f"run {stage}")
        if recipe.seed == 13:
            raise TrainingError("loss is not finite")
        return {"n_images": 1}

    stage, crew = ModuleType("stage_for_tests"), ModuleType("crew_for_tests")
    stage.run = stage_run
    crew.join = lambda: happened.append("join")
    crew.leave = lambda: happened.append("leave")
    crew.tell = lambda word: happened.append(f"tell {word}")
    crew.hear = itertools.cycle([*PARALLEL, None]).__next__
    for module in (stage, crew):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(processes, "CREW", crew.__name__)
    for name, known in STAGES.items():
        monkeypatch.setitem(STAGES, name, replace(known, module="stage_for_tests"))
    return happened


def be(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))


def test_the_first_calls_the_others_to_what_trains(recipe, events, tmp_path, monkeypatch):
    be(monkeypatch, 0, 2)
    done = run(recipe, tmp_path / "run", progress=Progress("silent"))
    expected = []
    for stage in plan(recipe):
        expected += [f"tell {stage}"] * (stage in PARALLEL) + [f"run {stage}"]
    assert events == ["join", *expected, "tell None", "leave"]
    assert list(done) == plan(recipe)
    events.clear()
    run(recipe, tmp_path / "run", progress=Progress("silent"))
    assert events == ["join", "tell None", "leave"], "nothing is left to do"


def test_the_others_do_what_they_are_called_to_and_write_nothing(recipe, events, tmp_path, monkeypatch):
    be(monkeypatch, 1, 2)
    assert run(recipe, tmp_path / "run", progress=Progress("silent")) == {}
    assert events == ["join", *(f"run {stage}" for stage in PARALLEL), "leave"]
    assert not (tmp_path / "run").exists()


def test_the_others_print_nothing(recipe, events, tmp_path, monkeypatch, capsys):
    be(monkeypatch, 1, 2)
    arguments = ["run", "synthetic", "--folder", str(tmp_path / "run"), "--data.root", recipe.data.root]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--json", "--seed", "13"]) == 1, "but an error of their own"
    assert json.loads(capsys.readouterr().out) == {"error": {"reason": "TRAINING", "message": "loss is not finite"}}


def test_after_an_error_of_the_first_nothing_is_told(recipe, events, tmp_path, monkeypatch):
    be(monkeypatch, 0, 2)
    with pytest.raises(TrainingError):
        run(replace(recipe, seed=13), tmp_path / "run", progress=Progress("silent"))
    assert events == ["join", "tell train", "run train"]


def test_one_process_needs_no_crew(recipe, events, tmp_path, monkeypatch):
    for size in (None, 1):
        if size:
            be(monkeypatch, 0, size)
        run(replace(recipe, seed=size or 0), tmp_path / "run", progress=Progress("silent"))
    assert set(events) == {f"run {stage}" for stage in plan(recipe)}
