import errno
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import weakseg
from weakseg import bundle
from weakseg.bundle import check_graph, find_version, natural_order, open_bundle, write
from weakseg.classes import ClassTable
from weakseg.errors import BundleError, ConfigError
from weakseg.manifest import manifest_from_bytes, manifest_to_bytes, palette_for
from weakseg.segmentation import labels_from_logits

DATA = Path(__file__).parents[1] / "data"
TOY = DATA / "bundles" / "toy" / "1"
TOY_2 = DATA / "bundles_of_schema_2" / "toy" / "2"
TOY_3 = DATA / "bundles_of_schema_3" / "toy" / "3"


@pytest.fixture
def toy(tmp_path):
    return Path(shutil.copytree(TOY, tmp_path / "models" / "toy" / "1"))


def edit(folder: Path, change) -> None:
    """Change the manifest's JSON in place."""
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def rehash(folder: Path, name: str, data: bytes) -> None:
    """Put other content under a file's name and make the manifest agree."""
    (folder / name).write_bytes(data)
    edit(folder, lambda m: m["files"].update({name: hashlib.sha256(data).hexdigest()}))


def graph(nodes=None, weights=(), domain="") -> onnx.ModelProto:
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 4, "h", "w"])
    nodes = nodes or [helper.make_node("Cast", ["images"], ["logits"], to=1)]
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(helper.make_graph(nodes, "g", [images], [logits], list(weights)), opset_imports=opsets)


def test_golden_bundle_of_schema_1():
    opened = open_bundle(TOY)
    assert opened.manifest.id == "toy/1"
    assert opened.manifest.classes == ("red", "green", "blue")
    assert opened.manifest.background.rule == "fixed"
    assert opened.sha256 == hashlib.sha256((TOY / "manifest.json").read_bytes()).hexdigest()
    assert opened.graph_paths()["segmentation"].is_file()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_golden_bundle_of_schema_2(precision, colours):
    """The graph's labels are those that its own logits give."""
    with weakseg.load(TOY_2, precision=precision, threads=1) as model:
        assert model.manifest.parity[0]["precision"] == "int8"
        assert model.segment(colours).legend().keys() == {"red", "green", "blue"}
        outputs = model.runner.run("segmentation", colours[None, :39, :53])
    assert outputs["labels"].dtype == np.uint8
    assert np.array_equal(outputs["labels"][0], labels_from_logits(outputs["logits"][0], 39, 53))


def test_golden_bundle_of_schema_3():
    assert open_bundle(TOY_3).manifest.training.presence_frequency == {"red": 0.4, "green": 0.3, "blue": 0.3}
    assert open_bundle(TOY_2).manifest.training.presence_frequency == {}


def test_a_precision_falls_back_to_fp32_graph_by_graph(toy):
    edit(toy, lambda m: m["files"].update({"small.onnx": ""}))
    rehash(toy, "small.onnx", (TOY / "segmentation.onnx").read_bytes())
    edit(toy, lambda m: m["graphs"]["segmentation"].update(variants={"int8": "small.onnx"}))
    opened = open_bundle(toy)
    assert {path.name for path in opened.graph_paths().values()} == set(open_bundle(TOY).manifest.files)
    assert opened.graph_paths("int8")["segmentation"].name == "small.onnx"
    assert opened.graph_paths("int8")["classifier"].name == "classifier.onnx"
    with pytest.raises(ConfigError, match="expected a precision of fp32, int8, got 'fp16'"):
        opened.graph_paths("fp16")


def test_manifest_round_trip():
    """The golden file is older than some fields: they take their defaults, and are written from then on."""
    manifest = manifest_from_bytes((TOY / "manifest.json").read_bytes(), "m")
    data = manifest_to_bytes(manifest)
    assert manifest_from_bytes(data, "m") == manifest
    assert manifest_to_bytes(manifest_from_bytes(data, "m")) == data


def test_write_is_deterministic_and_reads_back(tmp_path):
    manifest = open_bundle(TOY).manifest
    files = {name: (TOY / name).read_bytes() for name in manifest.files}
    made = write(tmp_path, manifest, files)
    assert made.folder == tmp_path / "toy" / "1"
    assert made.sha256 == open_bundle(made.folder).sha256
    content = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    assert content.keys() == {"manifest.json", "README.md", *files}
    write(tmp_path, manifest, {"README.md": b"an older card"} | files)  # over itself
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == content
    assert [p.name for p in (tmp_path / "toy").iterdir()] == ["1"]


@pytest.mark.parametrize("name", ["segmentation.onnx", "segmentation_int8.onnx", "classifier.onnx", "README.md"])
def test_wrong_hash(tmp_path, name):
    folder = Path(shutil.copytree(TOY_2, tmp_path / "2"))
    data = bytearray((folder / name).read_bytes())
    data[100] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name} is damaged: expected sha256 .* got .*: copy"):
        open_bundle(folder)


def test_missing_file(toy):
    (toy / "classifier.onnx").unlink()
    with pytest.raises(BundleError, match=r"cannot read .*classifier.onnx.*No such file"):
        open_bundle(toy)


@pytest.mark.parametrize(
    "name", ["../../secret.onnx", "/etc/passwd", "a/../b.onnx", "a\\b.onnx", "C:/x.onnx", "./b.onnx", ""]
)
def test_paths_out_of_the_bundle(toy, name):
    (toy.parent.parent / "secret.onnx").write_bytes(b"")
    edit(toy, lambda m: m["files"].update({name: hashlib.sha256(b"").hexdigest()}))
    with pytest.raises(BundleError, match="not to be trusted"):
        open_bundle(toy)


def test_link_out_of_the_bundle(toy, tmp_path):
    outside = tmp_path / "outside.onnx"
    shutil.move(toy / "segmentation.onnx", outside)
    (toy / "segmentation.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match="link out of the bundle"):
        open_bundle(toy)


def test_manifest_that_is_a_link_out_of_the_bundle(toy, tmp_path):
    shutil.move(toy / "manifest.json", tmp_path / "manifest.json")
    (toy / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match="link out of the bundle"):
        open_bundle(toy)


def test_link_to_a_folder_outside(toy, tmp_path):
    (tmp_path / "outside").mkdir()
    shutil.copy(toy / "segmentation.onnx", tmp_path / "outside" / "a.onnx")
    (toy / "inner").symlink_to(tmp_path / "outside")
    edit(toy, lambda m: m["files"].update({"inner/a.onnx": m["files"]["segmentation.onnx"]}))
    with pytest.raises(BundleError, match="link out of the bundle"):
        open_bundle(toy)


@pytest.mark.parametrize("name", ["segmentation.onnx", "manifest.json"])
def test_a_terabyte_is_refused_unread(toy, name):
    with (toy / name).open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(BundleError, match=rf"{name}: expected at most \d+ bytes, got {2**40}"):
        open_bundle(toy)


def test_the_limit_is_of_all_files_together(toy, monkeypatch):
    sizes = [path.stat().st_size for path in toy.glob("*.onnx")]
    monkeypatch.setattr(bundle, "LIMIT_BYTES", sum(sizes))
    open_bundle(toy)
    monkeypatch.setattr(bundle, "LIMIT_BYTES", sum(sizes) - 1)
    with pytest.raises(BundleError, match="expected at most"):
        open_bundle(toy)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file(toy, make):
    (toy / "classifier.onnx").unlink()
    make(toy / "classifier.onnx")
    with pytest.raises(BundleError, match="expected a file, got a folder, pipe or device"):
        open_bundle(toy)


def test_an_archive(toy, tmp_path):
    packed = shutil.make_archive(str(tmp_path / "toy"), "zip", toy)
    with pytest.raises(BundleError, match=r"expected the folder of a model bundle, got the file .*toy.zip: unpack it"):
        open_bundle(packed)


def test_a_graph_under_another_suffix(toy):
    """onnxruntime opens it all the same, so it must not escape the check."""
    rehash(toy, "classifier.bin", (toy / "classifier.onnx").read_bytes())
    edit(toy, lambda m: m["graphs"]["classifier"].update(file="classifier.bin"))
    with pytest.raises(BundleError, match=r"expected a file \*.onnx, got 'classifier.bin'"):
        open_bundle(toy)


@pytest.mark.parametrize("data", [b"", b"GIF89a"])
def test_a_variant_is_checked_too(toy, data):
    rehash(toy, "small.onnx", data)
    edit(toy, lambda m: m["graphs"]["segmentation"].update(variants={"int8": "small.onnx"}))
    with pytest.raises(BundleError, match=r"small.onnx: expected an ONNX model"):
        open_bundle(toy)


def test_unlisted_graph(toy):
    (toy / "extra.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"extra.onnx is a graph that the manifest does not list"):
        open_bundle(toy)


def test_external_data(toy):
    weights = numpy_helper.from_array(np.zeros(9, np.float32), "w")
    onnx.external_data_helper.set_external_data(weights, "../weights.bin")
    weights.ClearField("raw_data")
    rehash(toy, "segmentation.onnx", graph(weights=[weights]).SerializeToString())
    with pytest.raises(BundleError, match=r"weights of 'w' are in another file"):
        open_bundle(toy)


def test_custom_operator(toy):
    custom = graph([helper.make_node("Steal", ["images"], ["logits"], domain="evil")], domain="evil")
    rehash(toy, "segmentation.onnx", custom.SerializeToString())
    with pytest.raises(BundleError, match="custom operators are refused, got evil::Steal"):
        open_bundle(toy)


def test_sparse_tensor(toy):
    """200 bytes, which a runtime would make as many gigabytes as the dimensions say."""
    weights = onnx.SparseTensorProto(
        values=numpy_helper.from_array(np.ones(1, np.float32), "w"),
        indices=numpy_helper.from_array(np.zeros(1, np.int64), "where"),
        dims=[2**40],
    )
    made = graph()
    made.graph.sparse_initializer.append(weights)
    rehash(toy, "segmentation.onnx", made.SerializeToString())
    with pytest.raises(BundleError, match="functions and sparse tensors are refused, got a sparse tensor"):
        open_bundle(toy)


def test_function(toy):
    """n functions that each call the one before twice are 2^n nodes."""
    made = graph()
    made.functions.append(
        helper.make_function(
            "", "F", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], [helper.make_opsetid("", 18)]
        )
    )
    rehash(toy, "segmentation.onnx", made.SerializeToString())
    with pytest.raises(BundleError, match="got the function F: inline it"):
        open_bundle(toy)


def test_not_a_graph(toy):
    rehash(toy, "segmentation.onnx", b"GIF89a")
    with pytest.raises(BundleError, match="expected an ONNX model"):
        open_bundle(toy)


def test_graph_of_another_kind():
    with pytest.raises(
        BundleError, match="expected the input images and the outputs scores, cam, got images and logits"
    ):
        check_graph(graph().SerializeToString(), ("scores", "cam"), "x.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=4), "expected schema_version 1 to 3, got 4: install a newer weakseg"),
        (lambda m: m.update(schema_version=0), "got 0: export the model again"),
        (lambda m: m.pop("schema_version"), "is this a model bundle"),
        (lambda m: m.update(schema_version=True), "is this a model bundle"),
        (lambda m: m.update(naem="x"), "unknown key 'naem', did you mean 'name'"),
        (lambda m: m.pop("presence"), "the key 'presence' is missing"),
        (lambda m: m.update(presence=2), "thresholds must lie in"),
        (lambda m: m["background"].update(t=0), "thresholds must lie in"),
        (lambda m: m.update(name="../x"), "name must be letters"),
        (lambda m: m.update(version=""), "version must be letters"),
        (lambda m: m.update(classes=["red", "red", "blue"]), "class names must differ"),
        (lambda m: m.update(classes=["red"]), "palette must have 2 rows"),
        (lambda m: m.update(palette=[[0, 0, 256]] * 4), "palette must have 4 rows of 0..255"),
        (lambda m: m["input"].update(max_side=0), "max_side and stride must be at least 1"),
        (lambda m: m["input"].update(policy="tile"), "manifest.input.policy must be 'fit' or 'refuse'"),
        (lambda m: m.update(outputs=["depth"]), r"manifest.outputs\[0\] must be"),
        (lambda m: m.update(outputs=[]), "outputs must not be empty"),
        (lambda m: m["graphs"].pop("segmentation"), "output segmentation needs the graph segmentation"),
        (lambda m: m["graphs"]["classifier"].update(outputs=["cam"]), "graph classifier must have the outputs"),
        (lambda m: m["graphs"]["classifier"].update(views=0), "views must be at least 1"),
        (
            lambda m: m["graphs"]["classifier"].update(variants={"fp32": "segmentation.onnx"}),
            "variants may be fp16, bf16, int8",
        ),
        (lambda m: m["graphs"]["classifier"].update(variants={"fp8": "segmentation.onnx"}), "int8, got fp8"),
        (lambda m: m["graphs"]["classifier"].update(variants={"int8": "other.onnx"}), "'other.onnx' is not in `files`"),
        (lambda m: m["graphs"]["classifier"].update(file="other.onnx"), "not in `files`"),
        (lambda m: m["files"].update({"classifier.onnx": "abc"}), "expected a SHA-256"),
    ],
)
def test_manifests_that_are_refused(toy, change, message):
    edit(toy, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(toy)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"schema_version": 1}', "[" * 100000])
def test_manifests_that_are_none(toy, text):
    (toy / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest.json: "):
        open_bundle(toy)


def test_find_version(toy, tmp_path):
    models = tmp_path / "models"
    for version in ("2", "10"):
        shutil.copytree(toy, models / "toy" / version)
    (models / "toy" / ".11.tmp").mkdir()
    assert find_version(models / "toy" / "2").name == "2"
    assert find_version(models / "toy").name == "10"
    assert find_version(models).name == "10"
    shutil.copytree(toy, models / "other" / "1")
    with pytest.raises(BundleError, match=r"expected one model in .*, got 2 \(other, toy\)"):
        find_version(models)


def test_find_nothing(tmp_path):
    with pytest.raises(BundleError, match="no such folder: run `weakseg export` first"):
        find_version(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"expected manifest.json in"):
        find_version(tmp_path)


def test_natural_order():
    names = ["10", "9", "v10", "v9", "1.10", "1.9", "a"]
    assert sorted(names, key=natural_order) == ["1.9", "1.10", "9", "10", "a", "v9", "v10"]


def test_disk_full_leaves_nothing(tmp_path, monkeypatch):
    manifest = open_bundle(TOY).manifest
    files = {name: (TOY / name).read_bytes() for name in manifest.files}

    def full(self, data):
        if self.name == "segmentation.onnx":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, data)

    original = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BundleError, match="No space left on device: free some space"):
        write(tmp_path, manifest, files)
    assert list((tmp_path / "toy").iterdir()) == []


def test_unwritable_target(tmp_path):
    manifest = open_bundle(TOY).manifest
    files = {name: (TOY / name).read_bytes() for name in manifest.files}
    (tmp_path / "toy").write_text("a file where the folder should be")
    with pytest.raises(BundleError, match="choose a folder that you may write to"):
        write(tmp_path, manifest, files)


def test_write_refuses_what_open_would_refuse(tmp_path):
    manifest = open_bundle(TOY).manifest
    files = {name: (TOY / name).read_bytes() for name in manifest.files}
    with pytest.raises(BundleError, match="expected an ONNX model"):
        write(tmp_path, manifest, files | {"segmentation.onnx": b"nothing"})
    for name in ("../out.txt", "/out.txt", "a/../../out.txt"):
        with pytest.raises(BundleError, match="not to be trusted"):
            write(tmp_path, manifest, files | {name: b""})
    for name in ("manifest.json", "manifest.sig"):
        with pytest.raises(BundleError, match="not files of a bundle but about them"):
            write(tmp_path, manifest, files | {name: b""})
    with pytest.raises(BundleError, match="name must be letters"):
        write(tmp_path, replace(manifest, name="a/b"), files)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("n_classes", [1, 20, 254, 255, 300])
def test_colours(n_classes):
    table = ClassTable(tuple(f"c{i}" for i in range(n_classes)))
    manifest = replace(open_bundle(TOY).manifest, classes=table.names, palette=palette_for(table))
    colours = manifest.colours()
    assert colours.shape == (256 if n_classes <= 254 else 65536, 3)
    assert colours[0].tolist() == [0, 0, 0]
    assert colours[1].tolist() == [128, 0, 0]
    assert colours[-1].tolist() == [224, 224, 192]
