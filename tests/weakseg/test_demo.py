"""The serving half of the demo on the toy bundle; the whole demo is slow and runs in tests/test_demo_slow.py."""

import numpy as np
import pytest
from PIL import Image

from weakseg.demo import check_service
from weakseg.errors import ServiceError
from weakseg.image import read_image
from weakseg.local_server import local_server
from weakseg.progress import Progress
from weakseg.recipe import DataConfig, EvaluateConfig, Recipe


@pytest.fixture
def recipe(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("red/a", "red/b", "green/c"):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 56, 3), np.uint8)).save(path)
    data = DataConfig(root=str(tmp_path / "data"), format="folder")
    return Recipe(name="test", data=data, evaluate=EvaluateConfig(splits=("train",)))


def test_served_masks_equal_offline_ones(recipe, toy_bundle, tmp_path):
    result = check_service(recipe, toy_bundle, tmp_path / "served", Progress("silent"))
    assert result["n_images"] == 3
    assert result["agreement"] == 1
    assert all(read_image(path).shape == (40, 56, 3) for path in result["pictures"])


def test_a_server_that_does_not_start_says_why(tmp_path):
    with (
        pytest.raises(ServiceError, match=r"did not start: .*nowhere"),
        local_server(tmp_path / "nowhere", tmp_path / "serve.log"),
    ):
        pass
