"""Keys of stages: what moves them, what does not, and that finished runs outlive new fields."""

import base64
from dataclasses import dataclass, field, make_dataclass, replace

import pytest

from weakseg.recipe import (
    AffinityConfig,
    CrfConfig,
    DataConfig,
    EvaluateConfig,
    OptimConfig,
    Recipe,
    SegConfig,
    ThresholdConfig,
    TrainConfig,
    WalkConfig,
)
from weakseg.recipe_loading import load_recipe
from weakseg.stages import ADDED_LATER, effective, stage_keys

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """One photograph of one pixel; no weights file of a recipe exists from here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/cat").mkdir(parents=True)
    (tmp_path / "data/cat/a.png").write_bytes(PIXEL)
    return DataConfig(root="data", format="folder")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("synthetic", "eae8475872712443fab1b52fd167a034fe5ca36f8bfdb67ad4d897b53353424f"),
        ("wsss_mini", "c15544852cca7d7ed55a4b86f76aa9f3ae540552e058de0335519c9b6f0d26fb"),
    ],
)
def test_the_classifiers_of_shipped_recipes_keep_their_keys(data, name, key):
    """As they were before precision, compilation and sections of methods. A recipe that changes moves its key."""
    recipe = load_recipe(name)
    recipe = replace(recipe, data=data, evaluate=replace(recipe.evaluate, splits=("train",)))
    assert stage_keys(recipe)["train"] == key


@dataclass(frozen=True)
class Settings:
    """A method's section."""

    weight: float = 1.0


@dataclass(frozen=True)
class WithSections(TrainConfig):
    """The classifier's section as it may look one day."""

    first: Settings = field(default_factory=Settings)
    second: Settings = field(default_factory=Settings)


def test_a_section_of_a_method_counts_where_its_method_is_used(data):
    recipe = Recipe("x", data=data, evaluate=EvaluateConfig(splits=("train",)))

    def key(**changes):
        return stage_keys(replace(recipe, train=WithSections(**changes)))["train"]

    other = Settings(weight=2.0)
    assert key(first=other, second=other) == key() == stage_keys(recipe)["train"]
    assert key(method="first", second=other) == key(method="first")
    assert key(method="first", first=other) != key(method="first") != key()


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        (OptimConfig(), "precision", "bf16"),
        (OptimConfig(), "clip_norm", 1.0),
        (CrfConfig(), "resolution", "half"),
        (CrfConfig(), "early_stop", True),
        (CrfConfig(), "backend", "brute_force"),
        (ThresholdConfig(), "area", 0.5),
        (WalkConfig(), "background", 0.25),
        (AffinityConfig(), "network", "irn"),
        (AffinityConfig(), "train_radius", 10),
        (SegConfig(), "corrections", "masks.json"),
    ],
)
def test_fields_added_later_count_when_they_change_something(section, name, value):
    assert name not in effective(section)
    assert effective(replace(section, **{name: value})) == effective(section) | {name: value}
    assert getattr(section, name) == ADDED_LATER[type(section).__name__][name]


def test_what_changes_only_how_is_left_out():
    assert effective([OptimConfig(workers=7, compile=True)]) == effective([OptimConfig()])
    later = make_dataclass("SeamConfig", [("pcm_mib", int, 256), ("er", float, 1.0)])
    assert effective({"seam": later()}) == {"seam": {"er": 1.0}}
