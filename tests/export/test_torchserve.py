"""The archive, and what its handler answers; TorchServe itself is in test_torchserve_slow.py."""

import ast
import base64
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from export import torchserve_handler
from export.torchserve import archive_from_bundle, export_archive
from export.torchserve_handler import options_from_headers, reply
from weakseg import cli
from weakseg.bundle import open_bundle
from weakseg.errors import BundleError
from weakseg.masks.coco_rle import labels_from_rles
from weakseg.masks.png import labels_from_png


def json_reply(model, fields):
    status, content_type, body = reply(model, fields)
    assert content_type == "application/json"
    return status, json.loads(body)


def refused(model, fields):
    status, answer = json_reply(model, fields)
    return status, answer["error"]["reason"], answer["error"]["message"]


def test_the_archive_holds_the_bundle_whole(toy_bundle, tmp_path):
    made = export_archive(toy_bundle, tmp_path)
    assert Path(made["archive"]) == tmp_path / "toy-1.mar"
    with zipfile.ZipFile(made["archive"]) as archive:
        archive.extractall(tmp_path / "out")
        manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))
    assert open_bundle(tmp_path / "out" / "bundle").sha256 == open_bundle(toy_bundle).sha256 == made["sha256"]
    assert (manifest["model"]["modelName"], manifest["model"]["modelVersion"]) == ("toy", "1")
    for key in ("handler", "configFile"):
        assert (tmp_path / "out" / manifest["model"][key]).is_file()


def test_the_same_bundle_gives_the_same_bytes(toy_bundle, tmp_path):
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in sorted(toy_bundle.iterdir(), reverse=True):
        (copy / path.name).write_bytes(path.read_bytes())
    assert archive_from_bundle(open_bundle(copy)) == archive_from_bundle(open_bundle(toy_bundle))


def test_a_run_folder_stands_for_its_bundle(toy_bundle, tmp_path):
    target = tmp_path / "run" / "bundle" / "toy" / "1"
    target.mkdir(parents=True)
    for path in toy_bundle.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    (tmp_path / "run" / "config.json").write_text("{}")
    assert export_archive(tmp_path / "run", tmp_path)["model"] == "toy/1"


def test_a_damaged_bundle_gives_no_archive(toy_bundle, tmp_path):
    for path in toy_bundle.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "segmentation.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="segmentation.onnx is damaged"):
        export_archive(tmp_path, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_the_command_writes_it(toy_bundle, tmp_path, capsys):
    arguments = ["export", "--target", "torchserve", str(toy_bundle), "--output", str(tmp_path), "--json"]
    assert cli.main(arguments) == 0
    made = json.loads(capsys.readouterr().out)
    assert Path(made["archive"]).read_bytes() == archive_from_bundle(open_bundle(toy_bundle))
    assert cli.main([*arguments, "--name", "other"]) == 2


def test_the_handler_can_live_in_an_archive():
    """It has one class, which is how TorchServe finds it, and imports only what a worker has."""
    tree = ast.parse(Path(torchserve_handler.__file__).read_text())
    assert [node.name for node in tree.body if isinstance(node, ast.ClassDef)] == ["Handler"]
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {module.partition(".")[0] for module in modules}
    assert roots - set(sys.stdlib_module_names) == {"numpy", "PIL", "weakseg"}


@pytest.mark.parametrize("field", ["body", "data"])
def test_png_is_the_mask_of_segment(model, image, field):
    status, content_type, body = reply(model, {field: bytearray(image), "format": "png"})
    assert (status, content_type) == (200, "image/png")
    assert body == model.segment(image).mask_png()


def test_json_holds_everything_that_was_asked_for(model, image):
    fields = {"body": image, "outputs": "segmentation,pseudo_mask,cam", "heatmap_max_side": "7"}
    status, answer = json_reply(model, fields)
    result = model.segment(image, outputs=("segmentation", "pseudo_mask", "cam"), heatmap_max_side=7)
    assert status == 200
    assert (answer["model"], answer["model_sha256"]) == ("toy/1", model.bundle.sha256)
    assert (answer["height"], answer["width"]) == (40, 56)
    assert answer["scores"] == result.scores and answer["present"] == list(result.present)
    for kind in ("segmentation", "pseudo_mask"):
        labels = labels_from_png(base64.b64decode(answer["masks"][kind]["png"]))
        np.testing.assert_array_equal(labels, getattr(result, kind))
        assert [row["id"] for row in answer["masks"][kind]["classes"]] == np.unique(labels).tolist()
    assert answer["masks"]["segmentation"]["classes"][1] == {"id": 1, "name": "red"}
    assert answer["masks"]["pseudo_mask"]["classes"][-1] == {"id": 255, "name": "ignore"}
    assert answer["masks"]["pseudo_mask"]["threshold"] == result.threshold.to_dict()
    assert list(answer["heatmaps"]) == list(result.heatmaps)
    for name, data in answer["heatmaps"].items():
        grey = labels_from_png(base64.b64decode(data)) / 255
        np.testing.assert_allclose(grey, result.heatmaps[name], atol=0.5 / 255 + 1e-6)


def test_run_lengths_are_the_same_mask(model, image):
    _, answer = json_reply(model, {"body": image, "format": "coco_rle"})
    rows = answer["masks"]["segmentation"]["classes"]
    assert all(row["rle"]["size"] == [40, 56] for row in rows)
    labels = labels_from_rles({row["id"]: row["rle"]["counts"].encode() for row in rows}, 40, 56)
    np.testing.assert_array_equal(labels, model.segment(image).segmentation)


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({"tags": "red, blue"}, {"tags": ["red", "blue"]}),
        ({"tags": b'["red"]'}, {"tags": ["red"]}),
        ({"tags": ["green"]}, {"tags": ["green"]}),  # a part that says it is JSON is parsed by TorchServe
        ({"tags": bytearray()}, {"tags": []}),
        ({"threshold": bytearray(b"0.7")}, {"threshold": 0.7}),
        ({"threshold": 0.7}, {"threshold": 0.7}),
        ({"refine": "none", "cam": "single"}, {"refine": "none", "cam": "single"}),
    ],
)
def test_options_are_the_arguments_of_segment(model, image, fields, arguments):
    fields = {"body": image, "outputs": "pseudo_mask", "format": "png", "model_name": "toy"} | fields
    expected = model.segment(image, outputs=["pseudo_mask"], **arguments).mask_png()
    assert reply(model, fields) == (200, "image/png", expected)


def test_headers_are_options():
    headers = {"Weakseg-Heatmap-Max-Side": "7", "weakseg-format": "png", "Accept": "*/*", "body": {"content-type": "x"}}
    assert options_from_headers(headers) == {"heatmap_max_side": "7", "format": "png"}


@pytest.mark.parametrize(
    ("fields", "status", "reason", "words"),
    [
        ({"body": b""}, 415, "UNSUPPORTED_FORMAT", "an empty file"),
        ({"body": b"GIF89a" + bytes(40)}, 415, "UNSUPPORTED_FORMAT", "JPEG, PNG, WEBP"),
        ({"body": "text"}, 400, "INVALID_REQUEST", "got str"),
        ({"body": {"a": 1}}, 400, "INVALID_REQUEST", "got dict"),
        ({}, 400, "INVALID_REQUEST", "got none"),
        ({"body": b"1", "data": b"2"}, 400, "INVALID_REQUEST", "got body and data"),
        ({"tag": "red"}, 400, "INVALID_REQUEST", "did you mean 'tags'?"),
        ({"xyz": "1"}, 400, "INVALID_REQUEST", "known: body, data, format"),
        ({"format": "jpeg"}, 400, "INVALID_REQUEST", "json, coco_rle, png"),
        ({"format": b"\xff"}, 400, "INVALID_REQUEST", "UTF-8"),
        ({"format": ["png"]}, 400, "INVALID_REQUEST", "got list"),
        ({"format": "png", "outputs": "cam"}, 400, "INVALID_REQUEST", "one of segmentation, pseudo_mask"),
        ({"format": "png", "outputs": "segmentation,pseudo_mask"}, 400, "INVALID_REQUEST", "one mask"),
        ({"outputs": "mask"}, 400, "CONFIG", "cam, pseudo_mask, segmentation"),
        ({"tags": "reed"}, 400, "UNKNOWN_CLASS", "did you mean 'red'?"),
        ({"tags": "[1]"}, 400, "INVALID_REQUEST", "list of names"),
        ({"tags": '["red'}, 400, "INVALID_REQUEST", "damaged JSON"),
        ({"threshold": "much"}, 400, "INVALID_REQUEST", "threshold must be a number (float), got 'much'"),
        ({"threshold": "1"}, 400, "CONFIG", "(0, 1)"),
        ({"heatmap_max_side": "1.5"}, 400, "INVALID_REQUEST", "(int)"),
        ({"refine": "random_walk"}, 400, "OUTPUT_UNSUPPORTED", "no affinity graph"),
    ],
)
def test_a_bad_request_says_what_to_do(model, image, fields, status, reason, words):
    image_fields = {} if fields.keys() & {"body", "data"} or not fields else {"body": image}
    got_status, got_reason, message = refused(model, image_fields | fields)
    assert (got_status, got_reason) == (status, reason)
    assert words in message


def test_a_truncated_image_is_an_error(model, image):
    assert refused(model, {"body": image[: len(image) // 2]})[:2] == (400, "IMAGE_UNDECODABLE")


def test_a_bomb_is_refused_before_it_is_decoded(model, png):
    bomb = bytearray(png(np.zeros((1, 1, 3), np.uint8)))
    bomb[16:24] = (40_000).to_bytes(4, "big") * 2  # width and height in a PNG's header
    assert refused(model, {"body": bomb})[:2] == (413, "IMAGE_TOO_LARGE")


def test_an_unknown_error_keeps_its_trace_to_the_log(model, image, caplog, monkeypatch):
    def fail(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(model, "infer", fail)
    status, reason, message = refused(model, {"body": image})
    assert (status, reason) == (500, "INTERNAL")
    assert "secret" not in message
    assert "secret" in caplog.text and message.split()[-1] in caplog.text
