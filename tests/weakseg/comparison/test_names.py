"""Names of methods, told by files alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import training.cams
import training.methods
from weakseg.comparison.names import chosen
from weakseg.errors import ConfigError
from weakseg.recipe import BackboneConfig, Recipe
from weakseg.recipe_loading import modules_of

RECIPE = Recipe("test", backbone=BackboneConfig("small_resnet"))
METHODS = {path.stem for path in Path(training.methods.__file__).parent.glob("[a-z]*.py")}
MAPS = {path.stem for path in Path(training.cams.__file__).parent.glob("[a-z]*.py")} - {"cam"}


def test_all_is_every_file_that_runs_on_the_backbone_and_maps_of_any_classifier() -> None:
    names, left_out = chosen(["all"], RECIPE)
    assert set(names) == METHODS - {"class_tokens"} | {f"cam/{maps}" for maps in MAPS - {"pcm", "attention"}}
    assert names[0] == "cam" and len(names) == len(set(names))
    assert left_out == [
        "class_tokens is left out: it needs a ViT or DeiT (hf:<id or folder>), and the backbone is small_resnet"
    ]
    names, left_out = chosen(["all"], replace(RECIPE, backbone=BackboneConfig("hf:vit")))
    assert "class_tokens" in names and left_out == []


@pytest.mark.parametrize(
    ("package", "code", "expected"),
    [
        (training.cams, "EXPORTABLE = True", {"cam/new"}),
        (training.cams, 'EXPORTABLE = True\nCLASSIFIER = "seam"', set()),
        (training.methods, "import module_of_nowhere", {"new"}),
        (training.methods, "TRANSFORMERS_ONLY = True", set()),
    ],
)
def test_a_new_file_is_a_row(
    package: ModuleType, code: str, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(chosen(["all"], RECIPE)[0])
    (tmp_path / "new.py").write_text(f'"""Not imported."""\n\n{code}\n')
    assert package.__spec__ is not None
    monkeypatch.setattr(package.__spec__, "submodule_search_locations", [*package.__path__, str(tmp_path)])
    names, left_out = chosen(["all"], RECIPE)
    assert set(names) - before == expected
    assert any(line.startswith("new ") for line in left_out) == ("TRANSFORMERS_ONLY" in code)


def test_the_plain_classifier_is_always_there_and_nothing_twice() -> None:
    assert chosen(["seam", "seam+cam", "seam", "cam/pcm"], RECIPE)[0] == ["cam", "seam", "seam+cam", "cam/pcm"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sema", "unknown training method 'sema' in --methods sema: did you mean 'seam'"),
        ("seam+", "unknown training method ''"),
        ("cam/gradcam", "unknown CAM method 'gradcam' in --methods cam/gradcam: did you mean 'grad_cam"),
        ("cam/", "unknown CAM method ''"),
        ("class_tokens", "class_tokens needs a ViT or DeiT .*leave it out, or choose another --backbone.name"),
    ],
)
def test_names_that_cannot_be_compared(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen([name], RECIPE)


def test_no_torch_is_loaded() -> None:
    code = (
        "import sys; from weakseg.comparison import commands, names\n"
        "assert 'seam' in names.modules_of('training.methods')\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'training.methods')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_package_that_is_not_there() -> None:
    assert modules_of("weakseg_of_nowhere") == []
