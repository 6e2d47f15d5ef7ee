import json
import shutil
from dataclasses import replace

import pytest

from weakseg.bundle import open_bundle, write
from weakseg.bundle_commands import main
from weakseg.bundle_diff import Change, changes
from weakseg.classes import ClassTable
from weakseg.cli import main as cli
from weakseg.manifest import palette_for

RECORD = {"what": "segmentation", "split": "val", "tags": "none", "miou": 0.5, "iou": {"red": 0.25}, "flip": False}
PARITY = {"graph": "segmentation", "runtime": "onnxruntime", "precision": "fp32", "logits": 1e-5}


@pytest.fixture
def again(toy_bundle, tmp_path):
    """A function that writes the toy bundle with changed fields of its manifest and further files; its folder."""

    def make(files=None, **fields):
        manifest = open_bundle(toy_bundle).manifest
        own = {name: (toy_bundle / name).read_bytes() for name in manifest.files}
        where = tmp_path / str(len(list(tmp_path.iterdir())))
        return write(where, replace(manifest, **fields), own | (files or {})).folder

    return make


def ran(capsys, *argv):
    """Exit code and JSON of a command."""
    code = main([*map(str, argv), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_bundle_equals_itself(again, capsys):
    code, found = ran(capsys, "diff", again(metrics=(RECORD,)), again(metrics=(RECORD,)))
    assert code == 0
    assert found["equal"] is True
    assert found["fields"] == found["metrics"] == found["parity"] == found["files"] == []
    assert main(["diff", str(again()), str(again())]) == 0
    assert "nothing differs" in capsys.readouterr().out


def test_fields_by_path(again, capsys):
    first = again()
    background = replace(open_bundle(first).manifest.background, t=0.5)
    code, found = ran(capsys, "diff", first, again(version="2", background=background))
    assert code == 1
    assert found["fields"] == [
        {"path": "version", "first": "1", "second": "2"},
        {"path": "background.t", "first": 0.4, "second": 0.5},
    ]


def test_figures_side_by_side(again, capsys):
    better = RECORD | {"miou": 0.75, "flip": True, "iou": {"red": 0.5}}
    alone = RECORD | {"what": "cam"}
    code, found = ran(capsys, "diff", again(metrics=(RECORD,)), again(metrics=(alone, better)))
    assert code == 1
    of = {"split": "val", "tags": "none"}
    seg, cam = {"what": "segmentation", **of}, {"what": "cam", **of}
    assert found["metrics"] == [
        {**seg, "figure": "miou", "first": 0.5, "second": 0.75, "difference": 0.25},
        {**seg, "figure": "iou.red", "first": 0.25, "second": 0.5, "difference": 0.25},
        {**seg, "figure": "flip", "first": False, "second": True, "difference": None},
        {**cam, "figure": "miou", "first": None, "second": 0.5, "difference": None},
    ]


def test_parity_side_by_side(again, capsys):
    _, found = ran(capsys, "diff", again(parity=(PARITY,)), again(parity=(PARITY | {"logits": 1e-3},)))
    [row] = found["parity"]
    assert (row["graph"], row["precision"], row["figure"]) == ("segmentation", "fp32", "logits")
    assert row["difference"] == pytest.approx(1e-3 - 1e-5)


def test_files_by_hash_and_size(again, capsys):
    _, found = ran(capsys, "diff", again({"notes.txt": b"old"}), again({"notes.txt": b"newer", "more.txt": b""}))
    assert [
        (row["file"], row["first"] and row["first"]["bytes"], row["second"]["bytes"]) for row in found["files"]
    ] == [
        ("more.txt", None, 0),
        ("notes.txt", 3, 5),
    ]


def test_what_differs_as_text(again, capsys):
    classes = ClassTable(("red", "green", "blue", "fox"))
    second = again(classes=classes.names, palette=palette_for(classes))
    first = again(metrics=(RECORD,))
    assert main(["diff", str(first), str(second)]) == 1
    text = capsys.readouterr().out
    assert '["fox"]' in text
    assert "README.md" in text
    assert "segmentation" in text


def test_a_bundle_that_cannot_be_opened_has_no_difference(again, tmp_path, capsys):
    assert cli(["bundle", "diff", str(again()), str(tmp_path / "absent"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "BUNDLE"


def test_changes_of_lists():
    assert list(changes([1, [2, 3]], [1, [2, 4]])) == [Change("[1][1]", 3, 4)]
    assert list(changes({"a": [1]}, {"a": [1, 2]})) == [Change("a", [1], [1, 2])]


def test_keygen_sign_verify(again, tmp_path, capsys):
    folder = again()
    _, made = ran(capsys, "keygen", tmp_path / "signing.pem")
    _, signed = ran(capsys, "sign", folder, "--key", made["private_key"])
    assert signed["key"] == made["key"]
    assert signed["sha256"] == open_bundle(folder).sha256
    assert ran(capsys, "verify", folder)[1]["signed_by"] is None
    assert ran(capsys, "verify", folder, "--public-key", made["public_key"])[1]["signed_by"] == made["key"]
    assert main(["verify", str(folder)]) == 0
    assert f"by key {made['key']}, it says" in capsys.readouterr().out
    assert main(["show", str(folder), "--public-key", made["public_key"]]) == 0
    assert f"by key {made['key']}, checked" in capsys.readouterr().out


def test_a_bundle_that_is_written_again_is_unsigned(again, toy_bundle, tmp_path, capsys):
    folder = again()
    ran(capsys, "keygen", tmp_path / "signing.pem")
    ran(capsys, "sign", folder, "--key", tmp_path / "signing.pem")
    manifest = open_bundle(folder).manifest
    write(folder.parents[1], manifest, {name: (folder / name).read_bytes() for name in manifest.files})
    assert not (folder / "manifest.sig").exists()


def test_show_tells_precisions_and_parity(toy_bundle, capsys):
    second = toy_bundle.parents[2] / "bundles_of_schema_2" / "toy" / "2"
    assert main(["show", str(second)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["signature", "none"] in lines
    assert ["segmentation", "fp32,", "int8", "logits,", "labels"] in lines
    assert ["segmentation", "onnxruntime", "int8", "0.01", "0.999"] in lines


def test_a_damaged_bundle_is_never_shown(toy_bundle, tmp_path, capsys):
    folder = shutil.copytree(toy_bundle, tmp_path / "toy")
    (folder / "classifier.onnx").write_bytes(b"")
    for action in (["show", str(folder)], ["verify", str(folder)], ["diff", str(toy_bundle), str(folder)]):
        assert cli(["bundle", *action]) == 1
        assert "is damaged" in capsys.readouterr().err
