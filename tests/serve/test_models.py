import asyncio
import shutil

import pytest

from serve.models import BundleFolder, Models, ModelState, find_bundles
from weakseg.errors import BundleError, ConfigError, ModelFailedError, ModelLoadingError, ModelNotFoundError


class Loaded:
    closed = False

    def close(self):
        self.closed = True


def models(tmp_path, *ids, load=lambda path: Loaded()):
    folders = [BundleFolder(*id_.split("/"), tmp_path / id_) for id_ in ids]
    return Models(folders, load, lambda entry: None)


def test_the_newest_version_by_natural_order(tmp_path):
    made = models(tmp_path, "toy/10", "toy/9", "toy/2")
    asyncio.run(made.load_all())
    assert made.get("", "").version == "10"
    assert made.get_ready("toy", "9")[0].version == "9"
    assert [entry.version for entry in made.entries()] == ["2", "9", "10"]


def test_the_newest_version_that_is_ready(tmp_path):
    def load(path):
        if path.name == "10":
            raise BundleError("damaged: copy it again")
        return Loaded()

    made = models(tmp_path, "toy/9", "toy/10", load=load)
    with pytest.raises(ModelLoadingError, match="toy/10"):
        made.get_ready("toy", "")
    asyncio.run(made.load_all())
    assert made.get("toy", "").version == "9"
    assert not made.ready
    with pytest.raises(ModelFailedError, match="damaged: copy it again"):
        made.get_ready("toy", "10")


def test_a_fault_of_ours_does_not_show_and_stops_no_other_model(tmp_path, caplog):
    def load(path):
        if path.name == "1":
            raise RuntimeError("secret")
        return Loaded()

    made = models(tmp_path, "toy/1", "toy/2", load=load)
    asyncio.run(made.load_all())
    assert [entry.state for entry in made.entries()] == [ModelState.FAILED, ModelState.READY]
    assert made.entries()[0].failure == "internal error: the server's log says more"
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [("", "", "one of a, b"), ("c", "", "this server has a, b"), ("a", "2", "there is 1")],
)
def test_not_found(tmp_path, name, version, message):
    with pytest.raises(ModelNotFoundError, match=message):
        models(tmp_path, "a/1", "b/1").get(name, version)


def test_closing_closes_what_is_loaded(tmp_path):
    made = models(tmp_path, "a/1", "b/1")
    asyncio.run(made.load_all())
    loaded = [entry.model for entry in made.entries()]
    made.close()
    assert all(model.closed for model in loaded)


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
