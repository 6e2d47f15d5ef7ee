"""The example for Node.js against a real server; `make test-node` installs what it needs."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "node"
NODE = shutil.which("node")
LONG_S = 60.0

pytestmark = [
    pytest.mark.skipif(NODE is None, reason="no node: install Node.js 18 or later"),
    pytest.mark.skipif(not (EXAMPLE / "node_modules").is_dir(), reason="no examples/node/node_modules: make test-node"),
]


@pytest.fixture
def ask(shared_serving, tmp_path):
    """A function: names of images to what the example ends with and prints."""

    def asking(*images, target=shared_serving.target):
        args = [NODE, str(EXAMPLE / "client.mjs"), target, *images]
        done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, timeout=LONG_S, check=False)
        return done.returncode, done.stdout, done.stderr

    return asking


def test_one_image_in_full_and_a_stream_of_masks(ask, model, colours, png, tmp_path):
    data = png(colours, format="JPEG", quality=95)
    (tmp_path / "a.jpg").write_bytes(data)
    for index in range(20):  # more than are under way at a time
        (tmp_path / f"{index}.png").write_bytes(png(np.roll(colours, index, axis=1)))
    images = ["a.jpg", *(f"{index}.png" for index in range(20))]
    code, told, wrong = ask(*images)
    assert (code, wrong) == (0, "")
    scores = model.segment(data, outputs=("cam",)).scores
    lines = told.splitlines()
    assert lines[0] == "toy/1 on CPUExecutionProvider: red, green, blue"
    assert lines[1:4] == [f"  {name}: score {score:.2f}, present" for name, score in scores.items()]
    assert sorted(lines[4:]) == sorted(f"{name}: 56x40, masks/{Path(name).stem}-mask.png" for name in images)
    for name in images:
        with Image.open(tmp_path / "masks" / f"{Path(name).stem}-mask.png") as mask:
            np.testing.assert_array_equal(np.asarray(mask), model.segment(tmp_path / name).mask)


def test_errors_are_told_by_their_reason(ask, png, colours, tmp_path):
    (tmp_path / "a.png").write_bytes(png(colours))
    (tmp_path / "b.png").write_bytes(b"no image")
    code, told, wrong = ask("a.png", "b.png", "a.png")
    assert code == 1 and told.count("a.png: 56x40") == 2
    assert wrong.startswith("b.png: UNSUPPORTED_FORMAT: expected JPEG, PNG, WEBP")
    code, _, wrong = ask("b.png")  # the first image is a call of its own
    assert code == 1 and wrong.startswith("UNSUPPORTED_FORMAT: expected JPEG, PNG, WEBP")
    code, _, wrong = ask("a.png", target="127.0.0.1:1")
    assert code == 1 and wrong.startswith("UNAVAILABLE: ")
    code, _, wrong = ask("missing.png")
    assert code == 1 and wrong.startswith("ENOENT: ")
