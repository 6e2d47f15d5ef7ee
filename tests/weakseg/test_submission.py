"""A run folder's predictions as the VOC server's archive, read back; and each way in which they may not fit."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from weakseg.classes import IGNORE, voc_palette
from weakseg.cli import main
from weakseg.files import write_bytes_atomic, write_json_atomic
from weakseg.masks.png import png_from_labels, provenance_text
from weakseg.recipe import DataConfig, Recipe
from weakseg.run_folder import prediction_path
from weakseg.submission import VOC_CLASSES

IDS = tuple(f"2008_{i:06d}" for i in range(7))
INSIDE = "results/VOC2012/Segmentation/comp6_test_cls"


def labels_of(i: int) -> NDArray[np.uint8]:
    return np.random.default_rng(i).integers(0, len(VOC_CLASSES) + 1, (5 + i, 8)).astype(np.uint8)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with predictions of `test`, whose images have neither labels nor masks."""
    root = tmp_path / "VOC2012"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(("background", *VOC_CLASSES)))
    (root / "labels.json").write_text(json.dumps({"images": {}}))
    (root / "ImageSets/Segmentation/test.txt").write_text("\n".join(IDS))
    folder = tmp_path / "run"
    write_json_atomic(folder / "config.json", asdict(Recipe("voc", data=DataConfig(root=str(root)))))
    for i, sample_id in enumerate(IDS):
        Image.new("RGB", (8, 5 + i)).save(root / f"JPEGImages/{sample_id}.jpg")
        write_prediction(folder, sample_id, labels_of(i))
    return folder


def write_prediction(run: Path, sample_id: str, labels: NDArray[np.uint8], what: str = "segmentation") -> None:
    text = provenance_text({"mask": "segmentation"})
    write_bytes_atomic(prediction_path(run, what, "test", sample_id), png_from_labels(labels, voc_palette(), text))


def files_in(archive: Path) -> dict[str, bytes]:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as opened:
            return {name: opened.read(name) for name in opened.namelist()}
    with tarfile.open(archive, "r:gz") as opened:
        return {entry.name: opened.extractfile(entry).read() for entry in opened}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["results.tgz", "results.tar.gz", "results.zip"])
def test_the_archive_holds_what_was_predicted(run: Path, tmp_path: Path, name: str) -> None:
    assert main(["submission", str(run), "--out", str(tmp_path / name)]) == 0
    files = files_in(tmp_path / name)
    assert list(files) == [f"{INSIDE}/{sample_id}.png" for sample_id in IDS]
    for i, data in enumerate(files.values()):
        with Image.open(io.BytesIO(data)) as image:
            assert image.mode == "P" and image.info == {}
            assert np.array_equal(np.asarray(image), labels_of(i))
            assert image.getpalette() == voc_palette().ravel().tolist()


@pytest.mark.parametrize("name", ["results.tgz", "results.zip"])
def test_the_same_predictions_are_the_same_bytes(run: Path, tmp_path: Path, name: str) -> None:
    made = []
    for _ in range(2):
        assert main(["submission", str(run), "--out", str(tmp_path / name)]) == 0
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]
    if name == "results.tgz":
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(made[0]))) as archive:
            assert {(entry.mtime, entry.uid, entry.uname, entry.mode) for entry in archive} == {(0, 0, "", 0o644)}


def test_split_competition_network_and_moved_data(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, sample_id in enumerate(IDS):
        write_prediction(run, sample_id, np.full_like(labels_of(i), 20), "segmentation_crf")
    (tmp_path / "VOC2012").rename(tmp_path / "elsewhere")
    arguments = ["submission", str(run), "--out", str(tmp_path / "a.tgz"), "--what", "segmentation_crf", "--comp", "5"]
    assert main(arguments) == 1
    assert "say where they are with --data-root" in capsys.readouterr().err
    assert main([*arguments, "--data-root", str(tmp_path / "elsewhere"), "--json"]) == 0
    out, err = capsys.readouterr()
    inside = INSIDE.replace("comp6", "comp5")
    said = {"archive": str(tmp_path / "a.tgz"), "folder": inside, "what": "segmentation_crf", "n_images": len(IDS)}
    assert (json.loads(out), err) == (said, "")
    files = files_in(tmp_path / "a.tgz")
    assert set(files) == {f"{inside}/{sample_id}.png" for sample_id in IDS}
    assert all((np.asarray(Image.open(io.BytesIO(data))) == 20).all() for data in files.values())


def refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str, out: str = "a.tgz") -> str:
    """What the verb says; nothing may be left of an archive."""
    before = sorted(tmp_path.iterdir())
    assert main(["submission", str(run), "--out", str(tmp_path / out), *more]) in (1, 2)
    assert sorted(tmp_path.iterdir()) == before
    return capsys.readouterr().err


def test_arguments_that_do_not_fit(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected --out to end in .tgz, .tar.gz, .zip, got" in refused(run, tmp_path, capsys, out="a.tar")
    assert "expected a run folder with config.json, got" in refused(tmp_path / "none", tmp_path, capsys)
    assert "expected the list of split 'test2'" in refused(run, tmp_path, capsys, "--split", "test2")


def test_a_run_without_predictions_and_network_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(run, tmp_path, capsys, "--what", "segmentation_crf")
    assert "no predictions (segmentation_crf) of the split 'test' and no network train_seg/segmentation.pt" in message


def test_missing_predictions_are_counted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for sample_id in IDS[1:]:
        prediction_path(run, "segmentation", "test", sample_id).unlink()
    message = refused(run, tmp_path, capsys)
    assert "of all 7 images of test, 6 are missing" in message
    assert f"({', '.join(IDS[1:6])}, …) and there is no network" in message


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((8, 5), np.uint8), "expected the size of its image"),
        (np.full((5, 8), IGNORE, np.uint8), "expected values 0 to 20, got 255: the server takes predictions"),
        (np.full((5, 8), 21, np.uint8), "expected values 0 to 20, got 21"),
        ("L", "expected a palette PNG, got one of another colour type"),
        ("RGB", "expected a PNG whose pixels are class ids"),
        (b"GIF89a", "expected a whole PNG label map"),
    ],
)
def test_predictions_that_the_server_would_refuse(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pixels: NDArray[np.uint8] | str | bytes,
    message: str,
) -> None:
    path = prediction_path(run, "segmentation", "test", IDS[0])
    if isinstance(pixels, str):
        Image.new(pixels, (8, 5)).save(path)
    elif isinstance(pixels, bytes):
        path.write_bytes(pixels)
    else:
        write_prediction(run, IDS[0], pixels)
    said = refused(run, tmp_path, capsys)
    assert message in said and IDS[0] in said


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (VOC_CLASSES[:3], "got 3 classes"),
        (("bicycle", "aeroplane", *VOC_CLASSES[2:]), "got 'bicycle' instead of 'aeroplane' as number 1"),
        ((*VOC_CLASSES, "zebra"), "got 21 classes"),
    ],
)
def test_other_classes_than_vocs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, ...], message: str
) -> None:
    (tmp_path / "VOC2012/classes.txt").write_text("\n".join(names))
    said = refused(run, tmp_path, capsys)
    assert "expected the 20 classes of PASCAL VOC in their order" in said and message in said
