import os
import shutil

import pytest

from serve.repository import BundleFolder, Labels, bundle_stamp, find_bundles, find_labels, read_labels
from weakseg.errors import BundleError, ConfigError


def test_bundles_are_found_by_folder_and_by_repository(toy_bundle, tmp_path):
    (expected,) = find_bundles([toy_bundle], None)
    assert (expected.name, expected.version, expected.path) == ("toy", "1", toy_bundle)
    assert find_bundles([toy_bundle.parent], None) == [expected]
    assert find_bundles([], toy_bundle.parents[1]) == [expected]
    assert find_bundles([toy_bundle], toy_bundle.parents[1]) == [expected], "the same folder twice is one bundle"


def test_a_bundle_is_called_as_its_manifest_says(toy_bundle, tmp_path):
    shutil.copytree(toy_bundle, tmp_path / "dog" / "7")
    (found,) = find_bundles([], tmp_path)
    assert (found.name, found.version) == ("toy", "1")
    (tmp_path / "dog" / "7" / "manifest.json").write_text("damaged")
    (found,) = find_bundles([], tmp_path)
    assert (found.name, found.version) == ("dog", "7")


def test_nothing_to_serve_and_too_much(toy_bundle, tmp_path):
    with pytest.raises(ConfigError, match="no bundle to serve: pass --bundle"):
        find_bundles([], None)
    with pytest.raises(ConfigError, match="expected a folder of bundles"):
        find_bundles([], tmp_path / "missing")
    with pytest.raises(BundleError, match="missing"):
        find_bundles([tmp_path / "missing"], None)
    shutil.copytree(toy_bundle, tmp_path / "copy" / "1")
    with pytest.raises(ConfigError, match="are both toy/1"):
        find_bundles([toy_bundle, tmp_path / "copy" / "1"], None)


def test_a_folder_of_models_without_any(toy_bundle, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="holds no bundle: put one there as <name>/<version>/"):
        find_bundles([], tmp_path)
    assert find_bundles([toy_bundle], tmp_path), "there is another to serve"
    (tmp_path / "toy").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path / "toy")  # tests may be run by root
    with pytest.raises(ConfigError, match=rf"{tmp_path}/toy may not be read by this user: chmod -R a\+rX {tmp_path}"):
        find_bundles([], tmp_path)


def test_labels_lie_beside_the_versions(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "labels.toml").write_text('stable = "3"\ncanary = "4"\ncanary_percent = 5\n')
    folders = [BundleFolder("toy", "3", tmp_path / "toy" / "3"), BundleFolder("cat", "1", tmp_path / "cat" / "1")]
    assert find_labels(folders) == {"toy": Labels({"stable": "3", "canary": "4"}, 5.0)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stable = 3", "expected a version as text for each label"),
        ('stable = ""', "expected a version as text for each label"),
        ('stable = "3"\ncanary_percent = 5', "canary_percent needs the labels stable and canary, got stable"),
        ('stable = "3"\ncanary = "4"\ncanary_percent = 101', "canary_percent must lie from 0 to 100, got 101"),
        ('stable = "3"\ncanary = "4"\ncanary_percent = true', "canary_percent must lie from 0 to 100, got True"),
        ("stable", "expected a TOML file of labels at"),
    ],
)
def test_bad_labels(tmp_path, text, message):
    path = tmp_path / "labels.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_labels(path)


def test_a_stamp_changes_with_any_file_and_with_nothing_else(tmp_path):
    (tmp_path / "engines").mkdir()
    file = tmp_path / "engines" / "a.plan"
    file.write_bytes(b"1")
    first = bundle_stamp(tmp_path)
    assert bundle_stamp(tmp_path) == first
    os.utime(file, ns=(1, 1))
    second = bundle_stamp(tmp_path)
    (tmp_path / "b.onnx").write_bytes(b"")
    third = bundle_stamp(tmp_path)
    assert len({first, second, third}) == 3
    (tmp_path / "b.onnx").unlink()
    assert bundle_stamp(tmp_path) == second
