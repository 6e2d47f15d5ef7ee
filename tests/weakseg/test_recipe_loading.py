from dataclasses import replace

import pytest

from weakseg.errors import ConfigError
from weakseg.presets import AFFINITY
from weakseg.recipe import CrfConfig, Recipe, SegConfig
from weakseg.recipe_loading import load_recipe, override, recipe_names
from weakseg.stages import plan

RECIPE = Recipe(name="test")


def test_every_recipe_that_comes_along_loads_and_is_called_like_its_file():
    assert "wsss_mini" in recipe_names()
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_hyphens_and_underscores_are_the_same():
    assert load_recipe("wsss-mini") == load_recipe("wsss_mini")


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'wsss_mini'"):
        load_recipe("wsss_min")


def test_a_recipe_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from weakseg.recipe import Recipe\nRECIPE = Recipe(name='mine', seed=3)\n")
    assert load_recipe(str(path)) == Recipe(name="mine", seed=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("x = 1", "expected it to define RECIPE"),
        ("RECIPE = Recipe()", "NameError"),
        ("from weakseg.recipe import Recipe\nRECIPE = Recipe(name='a', sed=1)", "unexpected keyword argument 'sed'"),
    ],
)
def test_a_recipe_file_that_is_none(tmp_path, text, message):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path))


def test_overrides_reach_every_kind_of_field():
    arguments = [
        "--train.optim.lr",
        "0.5",
        "--cam.scales",
        "1",
        "2",
        "--cam.flip",
        "False",
        "--backbone.name",
        "resnet50",
    ]
    changed = override(RECIPE, [*arguments, "--data.tune", "held_out", "--pseudo-label.threshold.rule", "otsu"])
    assert changed.train.optim.lr == 0.5
    assert changed.cam.scales == (1.0, 2.0)
    assert not changed.cam.flip
    assert changed.backbone.name == "resnet50"
    assert changed.data.tune == "held_out"
    assert changed.pseudo_label.threshold.rule == "otsu"
    assert changed.train_seg == RECIPE.train_seg


def test_nothing_overridden_is_the_recipe_itself():
    assert override(RECIPE, []) == RECIPE


def test_the_crf_goes_and_comes():
    without = override(RECIPE, ["--pseudo_label.crf", "none"])
    assert without.pseudo_label.crf is None
    assert override(without, ["--seed", "1"]).pseudo_label.crf is None
    assert override(without, ["--pseudo_label.crf.iterations", "2"]).pseudo_label.crf == CrfConfig(iterations=2)


def test_a_section_by_the_name_of_published_settings():
    assert RECIPE.affinity is None
    walked = override(RECIPE, ["--affinity", "psa", "--affinity.walk.beta", "4"]).affinity
    assert walked is not None and (walked.walk.steps, walked.walk.beta, walked.optim.lr) == (256, 4.0, 0.1)
    irn = override(RECIPE, ["--affinity", "irn", "--affinity.train_radius", "8"]).affinity
    assert irn is not None and (irn.network, irn.train_radius, irn.walk.background) == ("irn", 8, 0.25)
    both = override(RECIPE, ["--affinity.walk.crf.iterations", "3"]).affinity
    assert both is not None and both.walk.crf == CrfConfig(iterations=3)
    assert override(replace(RECIPE, affinity=walked), ["--affinity", "none"]).affinity is None
    assert override(RECIPE, ["--affinity=psa"]).affinity == AFFINITY["psa"]
    assert override(RECIPE, ["--affinity=psa", "--affinity.walk.crf=none"]).affinity == AFFINITY["psa"]
    with pytest.raises(ConfigError, match="affinity is left out of this recipe"):
        override(RECIPE, ["--affinity.walk.crf", "none"])
    with pytest.raises(ConfigError, match="affinity is left out of this recipe"):
        override(RECIPE, ["--affinity", "none", "--affinity.walk.crf", "default"])


def test_the_segmentation_network_goes_and_comes():
    without = override(RECIPE, ["--train_seg", "none"])
    assert without.train_seg is None
    assert override(without, ["--seed", "1"]).train_seg is None
    assert override(without, ["--train-seg.width", "64"]).train_seg == SegConfig(width=64)
    assert override(without, ["--train_seg", "default", "--upper_bound", "True"]).upper_bound
    with pytest.raises(ConfigError, match="upper_bound trains a twin of the segmentation network, and train_seg is no"):
        plan(override(without, ["--upper_bound", "True"]))
    bounded = replace(RECIPE, upper_bound=True)
    assert "train_seg" not in plan(override(bounded, ["--train_seg", "none", "--upper_bound", "False"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cam.flop", "True"], "unknown key --cam.flop: did you mean --cam.flip"),
        (["--train.optim.lrr", "1"], r"did you mean --train\.optim\.lr"),
        (["--train.optim.lr", "fast"], r"--train\.optim\.lr: could not convert string to float: 'fast'"),
        (["--train.optim.epochs", "1.5"], "invalid literal for int"),
        (["--cam.normalisation", "sum"], "invalid choice 'sum'"),
        (["--train.optim.epochs"], "Missing value"),
        (["--pseudo_label.crf", "yes"], "expected default or none"),
        (["--affinity", "paper"], "expected default or seam or psa or irn or"),
        (["--affinity.walk.background", "1.5"], r"background of a walk must lie in \(0, 1\), got 1.5"),
        (["stray"], "unknown key stray"),
    ],
)
def test_a_typo_is_an_error_of_one_line(arguments, message, capsys):
    with pytest.raises(ConfigError, match=message) as caught:
        override(RECIPE, arguments)
    assert "\n" not in str(caught.value)
    assert "│" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert capsys.readouterr().err == ""


def test_help_lists_keys_with_their_meaning(capsys):
    with pytest.raises(SystemExit) as caught:
        override(RECIPE, ["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--pseudo_label.threshold.value" in out
    assert "the first N of 5 stages get no gradient" in " ".join(out.replace("│", " ").split())
