"""The orchestrator with stages that only leave traces; the real ones are tested where they live."""

import json
import multiprocessing
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from weakseg import cli
from weakseg.errors import ConfigError, DataError, DatasetError, TrainingError, UsageError, WeaksegError
from weakseg.locks import locked
from weakseg.progress import Progress
from weakseg.recipe import CrfConfig, DataConfig, EvaluateConfig, OptimConfig, PseudoLabelConfig, Recipe, TrainConfig
from weakseg.run import LOCK, run
from weakseg.stages import STAGES, plan, stage_keys

SILENT = Progress("silent")


@pytest.fixture
def recipe(tmp_path):
    """Two images in folders of their classes, with true masks."""
    for name in ("cat/a", "dog/b"):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
        mask = tmp_path / "masks" / f"{name}.png"
        mask.parent.mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(mask)
    data = DataConfig(root=str(tmp_path / "data"), format="folder", masks=str(tmp_path / "masks"))
    return Recipe(name="test", data=data, evaluate=EvaluateConfig(splits=("train",)))


@pytest.fixture
def ran(monkeypatch):
    """Every stage writes a file named by its seed; returns the list of stages that really ran."""
    calls = []

    def stage_run(recipe, folder, *, stage, progress):
        calls.append(stage)
        (folder / stage / f"seed-{recipe.seed}").write_text("")
        if recipe.seed == 13:
            raise TrainingError("loss is not finite")
        return {"n_images": 2, "loss": 0.5}

    module = ModuleType("stage_for_tests")
    module.run = stage_run
    monkeypatch.setitem(sys.modules, "stage_for_tests", module)
    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, replace(stage, module="stage_for_tests"))
    return calls


def again(ran, recipe, folder, **options):
    ran.clear()
    run(recipe, folder, progress=SILENT, **options)
    return list(ran)


def test_stages_run_in_order_and_once(recipe, ran, tmp_path):
    folder = tmp_path / "run"
    done = run(recipe, folder, progress=SILENT)
    assert ran == plan(recipe) == list(done)
    assert "train_seg_full" not in ran
    assert again(ran, recipe, folder) == []


def test_done_says_what_happened(recipe, ran, tmp_path):
    run(recipe, tmp_path / "run", progress=SILENT)
    done = json.loads((tmp_path / "run/train/done.json").read_text())
    assert done["summary"] == {"n_images": 2, "loss": 0.5}
    assert done["n_images"] == 2
    assert done["seconds"] >= 0
    assert set(done) == {"key", "seconds", "cpu_seconds", "n_images", "images_per_s", "summary"}
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["format"] == "folder"
    assert json.loads((tmp_path / "run/environment.json").read_text())["seed"] == 0


def test_the_upper_bound_is_a_stage_of_its_own(recipe, ran, tmp_path):
    run(replace(recipe, upper_bound=True), tmp_path / "run", progress=SILENT)
    assert "train_seg_full" in ran


def test_without_a_segmentation_network_the_rest_runs_and_holds(recipe, ran, tmp_path):
    masks_only = replace(recipe, train_seg=None)
    run(masks_only, tmp_path / "run", progress=SILENT)
    assert ran == ["train", "cam", "pseudo_label", "evaluate", "bundle", "report"]
    assert again(ran, recipe, tmp_path / "run") == ["train_seg", "evaluate", "bundle", "report"]


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"seed": 1}, "train"),
        ({"train": TrainConfig(optim=OptimConfig(lr=0.5))}, "train"),
        ({"cam": replace(Recipe("x").cam, flip=False)}, "cam"),
        ({"cam": replace(Recipe("x").cam, normalisation="minmax")}, "pseudo_label"),
        ({"pseudo_label": replace(Recipe("x").pseudo_label, band=0.1)}, "pseudo_label"),
        ({"train_seg": replace(Recipe("x").train_seg, balance="none")}, "train_seg"),
        ({"evaluate": EvaluateConfig(splits=("train",), boundary_px=1)}, "evaluate"),
        ({"export": replace(Recipe("x").export, max_side=512)}, "bundle"),
        ({"train": TrainConfig(optim=OptimConfig(workers=0, checkpoint_every_s=1))}, None),
    ],
)
def test_a_change_reruns_what_depends_on_it(recipe, ran, tmp_path, change, first):
    folder = tmp_path / "run"
    run(recipe, folder, progress=SILENT)
    expected = [] if first is None else plan(recipe)[plan(recipe).index(first) :]
    assert again(ran, replace(recipe, **change), folder) == expected


def test_another_image_reruns_everything_and_another_mask_the_scores(recipe, ran, tmp_path):
    folder = tmp_path / "run"
    run(recipe, folder, progress=SILENT)
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / "masks/cat/a.png")
    assert again(ran, recipe, folder) == ["evaluate", "bundle", "report"]
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "data/dog/c.png")
    assert again(ran, recipe, folder) == plan(recipe)


def test_moving_the_dataset_changes_nothing(recipe, tmp_path):
    before = stage_keys(recipe)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    moved = replace(recipe, data=replace(recipe.data, root=str(tmp_path / "elsewhere")))
    assert stage_keys(moved) == before


def test_a_failed_stage_goes_on_in_its_folder_and_other_settings_empty_it(recipe, ran, tmp_path):
    folder = tmp_path / "run"
    unlucky = replace(recipe, seed=13)
    with pytest.raises(TrainingError):
        run(unlucky, folder, progress=SILENT)
    (folder / "train/checkpoint.pt").write_text("half way")
    with pytest.raises(TrainingError):
        run(unlucky, folder, progress=SILENT)
    assert (folder / "train/checkpoint.pt").is_file()
    assert not (folder / "train/done.json").exists()
    run(recipe, folder, progress=SILENT)
    assert sorted(path.name for path in (folder / "train").iterdir()) == ["done.json", "seed-0", "started.json"]


def test_a_damaged_done_file_counts_as_absent(recipe, ran, tmp_path):
    run(recipe, tmp_path / "run", progress=SILENT)
    (tmp_path / "run/cam/done.json").write_text("{")
    assert again(ran, recipe, tmp_path / "run") == ["cam"]


def test_from_runs_a_stage_and_all_after_it_anew(recipe, ran, tmp_path):
    run(recipe, tmp_path / "run", progress=SILENT)
    assert again(ran, recipe, tmp_path / "run", first="evaluate") == ["evaluate", "bundle", "report"]


def test_to_stops_after_a_stage(recipe, ran, tmp_path):
    assert again(ran, recipe, tmp_path / "run", last="pseudo_label") == ["train", "cam", "pseudo_label"]
    assert again(ran, recipe, tmp_path / "run", first="cam", last="pseudo_label") == ["cam", "pseudo_label"]
    assert again(ran, recipe, tmp_path / "run") == ["train_seg", "evaluate", "bundle", "report"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "cam", "last": "evaluate"}, "--only cam runs that stage alone, --to evaluate all up to that one"),
        ({"first": "evaluate", "last": "cam"}, r"expected --from one of the stages to run \(train, cam\), got 'evalu"),
        ({"first": "train", "only": "cam"}, r"expected --from one of the stages to run \(cam\), got 'train'"),
        ({"last": "walk"}, "expected a stage of this recipe .*got 'walk'"),
    ],
)
def test_stages_that_contradict_each_other_touch_nothing(recipe, ran, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        run(recipe, tmp_path / "run", progress=SILENT, **options)
    assert not (tmp_path / "run").exists()


def test_only_needs_its_inputs(recipe, ran, tmp_path):
    with pytest.raises(UsageError, match="cam reads the results of train"):
        run(recipe, tmp_path / "run", only="cam", progress=SILENT)
    assert again(ran, recipe, tmp_path / "run", only="train") == ["train"]
    assert again(ran, recipe, tmp_path / "run", only="cam") == ["cam"]


def test_an_unknown_stage_lists_the_known(recipe, tmp_path):
    with pytest.raises(UsageError, match="expected a stage of this recipe .train, cam"):
        run(recipe, tmp_path / "run", first="crf", progress=SILENT)


def test_a_crf_that_cannot_be_is_known_before_the_training(recipe, ran, tmp_path, monkeypatch):
    wrong = replace(recipe, pseudo_label=PseudoLabelConfig(crf=CrfConfig(bilateral_sxy=0)))
    with pytest.raises(ConfigError, match="must be positive"):
        run(wrong, tmp_path / "run", progress=SILENT)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(WeaksegError, match="needs numba"):
        run(recipe, tmp_path / "run", progress=SILENT)
    assert ran == []
    assert again(ran, recipe, tmp_path / "run", only="train") == ["train"]
    without = replace(recipe, pseudo_label=PseudoLabelConfig(crf=None))
    assert "pseudo_label" in again(ran, without, tmp_path / "run")


def test_a_missing_dataset_leaves_no_folder(recipe, ran, tmp_path):
    gone = replace(recipe, data=replace(recipe.data, root=str(tmp_path / "gone")))
    with pytest.raises(DatasetError):
        run(gone, tmp_path / "run", progress=SILENT)
    assert not (tmp_path / "run").exists()


def hold(folder, ready, leave):
    with locked(folder / LOCK):
        ready.set()
        leave.wait(30)


def test_a_second_run_in_the_same_folder_is_refused(recipe, ran, tmp_path):
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", ready, leave))
    process.start()
    assert ready.wait(30)
    with pytest.raises(UsageError, match="in use by another run"):
        run(recipe, tmp_path / "run", progress=SILENT)
    leave.set()
    process.join(30)
    assert run(recipe, tmp_path / "run", progress=SILENT)


def recipe_file(tmp_path, recipe):
    path = tmp_path / "mine.py"
    names = "Recipe, DataConfig, EvaluateConfig"
    data = f"DataConfig(root={recipe.data.root!r}, format='folder', masks={recipe.data.masks!r})"
    path.write_text(
        f"from weakseg.recipe import {names}\n"
        f"RECIPE = Recipe(name='mine', data={data}, evaluate=EvaluateConfig(splits=('train',)))\n"
    )
    return str(path)


def test_the_verb_prints_times_and_takes_overrides(recipe, ran, tmp_path, capsys):
    arguments = ["run", recipe_file(tmp_path, recipe), "--folder", str(tmp_path / "run"), "--train.optim.lr", "0.25"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "pseudo_label" in out
    assert "train: done in" in err
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["train"]["optim"]["lr"] == 0.25
    assert cli.main(arguments) == 0
    assert "train: up to date" in capsys.readouterr().err


def test_json_is_all_there_is(recipe, ran, tmp_path, capsys):
    arguments = ["train", recipe_file(tmp_path, recipe), "--folder", str(tmp_path / "run"), "--json"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert list(json.loads(out)["stages"]) == ["train"]
    assert ran == ["train"]


def test_to_is_a_flag_of_run_alone(recipe, ran, tmp_path, capsys):
    arguments = [recipe_file(tmp_path, recipe), "--folder", str(tmp_path / "run"), "--to", "cam", "--json"]
    assert cli.main(["run", *arguments]) == 0
    assert list(json.loads(capsys.readouterr().out)["stages"]) == ran == ["train", "cam"]
    assert cli.main(["train", *arguments]) == 2
    assert "--only train runs that stage alone" in capsys.readouterr().out


def test_a_typo_in_a_key_exits_with_2_and_touches_nothing(recipe, ran, tmp_path, capsys):
    arguments = ["run", recipe_file(tmp_path, recipe), "--folder", str(tmp_path / "run"), "--train.optim.lrr", "1"]
    assert cli.main(arguments) == 2
    assert "did you mean --train.optim.lr" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_run_without_a_recipe_lists_them(capsys):
    assert cli.main(["run", "--help"]) == 0
    assert "wsss_mini" in capsys.readouterr().out
    assert cli.main(["run"]) == 2


def with_corrections(recipe, path):
    return replace(recipe, train_seg=replace(recipe.train_seg, corrections=str(path)))


def corrected(folder, value=1, name="a.png"):
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(folder / name)
    return folder


def test_corrections_rerun_the_segmentation_network_when_their_content_changes(recipe, ran, tmp_path):
    folder, masks = tmp_path / "run", corrected(tmp_path / "corrected")
    run(recipe, folder, progress=SILENT)
    after = plan(recipe)[plan(recipe).index("train_seg") :]
    assert again(ran, with_corrections(recipe, masks), folder) == after
    masks = masks.rename(tmp_path / "moved")
    assert again(ran, with_corrections(recipe, masks), folder) == []
    corrected(masks, value=2)
    assert again(ran, with_corrections(recipe, masks), folder) == after
    assert again(ran, recipe, folder) == after


def test_corrections_leave_the_upper_bound_and_runs_without_any_as_they_are(recipe, tmp_path):
    bound = replace(recipe, upper_bound=True)
    before, after = stage_keys(bound), stage_keys(with_corrections(bound, corrected(tmp_path / "corrected")))
    assert {name for name in before if before[name] != after[name]} == {"train_seg", "evaluate", "bundle", "report"}


@pytest.mark.parametrize(("name", "value"), [("c.png", 1), ("a.png", 3)])
def test_bad_corrections_are_refused_before_the_first_stage(recipe, ran, tmp_path, name, value):
    bad = with_corrections(recipe, corrected(tmp_path / "corrected", value, name))
    with pytest.raises(DataError, match=f"corrected.*{name}"):
        run(bad, tmp_path / "run", progress=SILENT)
    with pytest.raises(ConfigError, match="expected corrected masks in .*absent"):
        run(with_corrections(recipe, tmp_path / "absent"), tmp_path / "run", progress=SILENT)
    assert ran == []
    run(bad, tmp_path / "run", last="pseudo_label", progress=SILENT)  # which do not learn from them
    assert ran == ["train", "cam", "pseudo_label"]


def test_the_flag_for_corrections(recipe, ran, tmp_path, monkeypatch):
    monkeypatch.setattr("weakseg.run.load_recipe", lambda _: recipe)
    masks, folder = str(corrected(tmp_path / "corrected")), str(tmp_path / "run")
    assert cli.main(["run", "test", "--folder", folder, "--json"]) == 0
    ran.clear()
    assert cli.main(["train-seg", "test", "--folder", folder, "--corrections", masks, "--json"]) == 0
    assert ran == ["train_seg"]
    assert json.loads((tmp_path / "run/config.json").read_text())["train_seg"]["corrections"] == masks
    assert cli.main(["run", "test", "--folder", folder, "--train_seg.corrections", masks, "--json"]) == 0
    assert ran == ["train_seg", "evaluate", "bundle", "report"]


def test_corrections_are_for_pseudo_masks(recipe, tmp_path, capsys):
    with pytest.raises(ConfigError, match="supervision full"):
        replace(recipe.train_seg, supervision="full", corrections="masks.json")
    assert cli.main(["run", "synthetic", "--train_seg.supervision", "full", "--corrections", "masks.json"]) == 2
    assert "error: train_seg.corrections are in place of pseudo-masks" in capsys.readouterr().err
