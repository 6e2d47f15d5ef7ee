"""`weakseg predict`, by a bundle and by a real server: the same files."""

import json

import numpy as np
import pytest
from PIL import Image

from weakseg.cli import main
from weakseg.masks.png import labels_from_png, text_of


@pytest.fixture
def images(tmp_path, colours):
    """a.png and sub/b.webp below a folder."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(colours).save(folder / "a.png")
    Image.fromarray(colours[::-1]).save(folder / "sub" / "b.webp", lossless=True)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(params=["bundle", "endpoint"])
def where(request, toy_bundle, shared_serving):
    return {"bundle": ["--bundle", str(toy_bundle)], "endpoint": ["--endpoint", shared_serving.target]}[request.param]


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_masks_of_a_folder(images, where, model, tmp_path, colours, capsys):
    out = tmp_path / "out"
    assert main(["predict", str(images), "--output", str(out), *where]) == 0
    assert files(out) == ["a.png", "sub/b.png"]
    np.testing.assert_array_equal(labels_from_png((out / "a.png").read_bytes()), model.segment(colours).mask)
    np.testing.assert_array_equal(labels_from_png((out / "sub/b.png").read_bytes()), model.segment(colours[::-1]).mask)
    assert capsys.readouterr().out.splitlines() == [
        f"{out}/a.png: red, green, blue",
        f"{out}/sub/b.png: red, green, blue",
    ]


def test_everything(images, where, model, tmp_path, colours):
    out = tmp_path / "out"
    flags = ["--outputs", "cam", "pseudo_mask", "segmentation", "--tags", "red", "blue", "--overlay"]
    assert main(["predict", str(images / "a.png"), "--output", str(out), *flags, *where]) == 0
    assert files(out) == ["a.npz", "a.overlay.png", "a.pseudo_mask.png", "a.segmentation.png"]
    expected = model.segment(colours, outputs=("cam", "pseudo_mask", "segmentation"), tags=["red", "blue"])
    np.testing.assert_array_equal(labels_from_png((out / "a.pseudo_mask.png").read_bytes()), expected.pseudo_mask)
    for kind in ("pseudo_mask", "segmentation"):
        data = (out / f"a.{kind}.png").read_bytes()
        assert text_of(data) == expected.mask_text(kind) and '"toy/1"' in text_of(data)["weakseg"]
    with np.load(out / "a.npz") as arrays:
        assert arrays["heatmap_classes"].tolist() == ["red", "blue"]
        np.testing.assert_allclose(arrays["heatmaps"], list(expected.heatmaps.values()), atol=5e-4)
    with Image.open(out / "a.overlay.png") as overlay:
        np.testing.assert_array_equal(np.asarray(overlay), np.asarray(expected.overlay()))


def test_json(images, where, tmp_path, capsys):
    (images / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    out = tmp_path / "out"
    assert main(["predict", str(images), "--output", str(out), "--json", *where]) == 3
    said = json.loads(capsys.readouterr().out)
    assert [record["image"] for record in said["written"]] == [f"{images}/a.png", f"{images}/sub/b.webp"]
    assert said["written"][0] == {
        "image": f"{images}/a.png",
        "files": [f"{out}/a.png"],
        "classes": ["red", "green", "blue"],
        "model": "toy/1",
    }
    assert [(failure["image"], failure["reason"]) for failure in said["failed"]] == [
        (f"{images}/bad.jpg", "IMAGE_UNDECODABLE")
    ]
    assert files(out) == ["a.png", "sub/b.png"], "nothing of the bad image"


def test_nothing_could_be_done(tmp_path, where, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    assert main(["predict", str(bad), str(tmp_path / "missing.jpg"), "--output", str(tmp_path / "out"), *where]) == 1
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 2
    assert errors.count(str(bad)) == 1 and errors.count("missing.jpg") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --bundle or --endpoint"),
        (["--bundle", "b", "--endpoint", "e"], "either --bundle or --endpoint"),
        (["--bundle", "b", "--outputs", "cam", "--overlay"], "--overlay shows a mask"),
    ],
)
def test_contradictions(images, tmp_path, capsys, flags, message):
    assert main(["predict", str(images), "--output", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_tag(images, where, tmp_path, capsys):
    code = main(["predict", str(images), "--output", str(tmp_path / "out"), "--tags", "gren", *where])
    assert code == 1
    assert "did you mean 'green'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_images_two_of_a_name_and_the_images_own_folder(images, toy_bundle, tmp_path, capsys):
    def fails(*args):
        assert main(["predict", *map(str, args), "--bundle", str(toy_bundle)]) == 2
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert "expected image files" in fails(tmp_path / "empty", "--output", tmp_path / "out")
    other = tmp_path / "a.jpg"
    other.write_bytes(b"")
    assert "would both write" in fails(images / "a.png", other, "--output", tmp_path / "out")
    assert "choose another" in fails(images, "--output", images)
    assert not (tmp_path / "out").exists()


def test_no_server(images, tmp_path, capsys):
    assert main(["predict", str(images), "--output", str(tmp_path / "out"), "--endpoint", "127.0.0.1:1"]) == 1
    assert "no server answers at 127.0.0.1:1" in capsys.readouterr().err


def test_a_disk_that_is_full_leaves_no_half_file(images, toy_bundle, tmp_path, capsys, monkeypatch):
    import os

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["predict", str(images), "--output", str(tmp_path / "out"), "--bundle", str(toy_bundle)]) == 1
    assert "Free some space" in capsys.readouterr().err
    assert files(tmp_path / "out") == []
