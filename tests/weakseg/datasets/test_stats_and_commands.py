import json
from pathlib import Path

import numpy as np
import pytest

from weakseg.datasets import read
from weakseg.datasets.commands import main
from weakseg.datasets.stats import stats
from weakseg.errors import DatasetError, ImageError


@pytest.fixture
def root(make_voc) -> str:
    return make_voc().root


def test_stats(make_voc) -> None:
    train = stats(read(make_voc(), "train"))
    assert (train.n_images, train.counts, train.tags_per_image) == (3, (2, 1), {0: 1, 1: 1, 2: 1})
    np.testing.assert_array_equal(train.co_occurrence, [[2, 1], [1, 1]])
    np.testing.assert_array_equal(train.sizes, [[4, 6]] * 3)


def test_stats_name_an_unreadable_image(make_voc) -> None:
    config = make_voc()
    path = Path(config.root) / "JPEGImages" / "a.jpg"
    path.write_bytes(b"no image")
    with pytest.raises(ImageError, match="a.jpg: expected JPEG"):
        stats(read(config, "train"))


def test_stats_verb(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", root]) == 0
    text = capsys.readouterr().out
    assert "split train: 3 images" in text and "[1] dog" in text and "1 with 2" in text
    assert main(["stats", root, "--splits", "val", "--json"]) == 0
    (val,) = json.loads(capsys.readouterr().out)
    assert val["classes"] == {"cat": 0, "dog": 1} and val["width"] == {"min": 6, "median": 6.0, "max": 6}


def test_check_verb_and_its_exit_codes(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", root]) == 0
    assert "warning: " in capsys.readouterr().out
    assert main(["check", root, "--strict"]) == 1
    (Path(root) / "JPEGImages" / "a.jpg").unlink()
    capsys.readouterr()
    assert main(["check", root, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["errors"] == 1 and result["findings"][0]["level"] == "error"


def test_make_synthetic_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path / "set")
    arguments = ["make-synthetic", root, "--n-train", "2", "--n-val", "1", "--n-tune", "1", "--size-px", "40", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["made"] is True
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["made"] is False
    assert main(["check", root, "--tune", "tune"]) == 0
    with pytest.raises(DatasetError, match="remove it or choose another"):
        main([*arguments, "--seed", "1"])


@pytest.mark.parametrize("arguments", [[], ["chek"], ["check", "--formt", "csv"], ["stats", "--format", "yolo"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    capsys.readouterr()
