from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.company import main, mistaken
from tests.training.conftest import write_squares
from weakseg.cam_file import CamFile
from weakseg.files import write_json_atomic
from weakseg.recipe import DataConfig, EvaluateConfig, Recipe
from weakseg.run_folder import cam_path
from weakseg.scoring import Confusion

HEIGHT, WIDTH = 48, 64


def test_background_and_ignore_are_not_mistaken() -> None:
    found = Confusion(2)
    assert np.isnan(mistaken(found))
    found.add(np.array([[0, 0, 1, 1, 1, 2, 255]], np.uint8), np.array([[0, 1, 1, 2, 0, 255, 2]], np.uint8))
    assert mistaken(found) == 0.5


def test_images_of_several_classes_are_counted_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """008 is blue on the left, red on the right; its maps exchange them in the upper quarter."""
    data, folder = tmp_path / "squares", tmp_path / "recam-0"
    write_squares(data)
    cells = np.zeros((2, HEIGHT // 4, WIDTH // 4), np.float16)
    cells[0, :, :8] = cells[1, :, 8:] = 1
    truth = 1 + 2 * np.repeat(np.repeat(cells[1], 4, axis=0), 4, axis=1)
    Image.fromarray(truth.astype(np.uint8)).save(data / "SegmentationClass/008.png")
    blue = data / "ImageSets/Main/blue_val.txt"
    blue.write_text(blue.read_text().replace("008 -1", "008 1"))
    cells[:, :3] = cells[::-1, :3].copy()
    save(folder, "008", [0, 2], cells)
    for name, c in (("009", 0), ("010", 1)):
        square = np.asarray(Image.open(data / f"SegmentationClass/{name}.png"))[2::4, 2::4] > 0
        save(folder, name, [c], square[None].astype(np.float16))
    recipe = Recipe(
        "squares", data=DataConfig(root=str(data), tags="imagesets"), evaluate=EvaluateConfig(splits=("val",))
    )
    write_json_atomic(folder / "config.json", asdict(recipe))
    write_json_atomic(folder / "pseudo_label/threshold.json", {"t": 0.4, "rule": "fixed", "provenance": "by hand"})
    main([str(folder)])
    one, several = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert one[:4] == ["recam-0", "one", "class", "2"] and float(one[4]) > 70 and one[5] == "0.0"
    # 3 of 4 pixels of either class are right: 3 / (4 + 4 - 3); of the background there is nothing to be right
    assert several == ["recam-0", "several", "1", "60.0", "25.0"]


def save(folder: Path, name: str, classes: list[int], cells: np.ndarray) -> None:
    scores = np.zeros(3, np.float32)
    CamFile(np.array(classes, np.int32), cells, HEIGHT, WIDTH, scores).save(cam_path(folder, "val", name))
