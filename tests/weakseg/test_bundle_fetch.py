"""From real web servers on this machine, folders and fsspec's memory."""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.web import web_server
from weakseg import signature
from weakseg.batch import store
from weakseg.bundle import MANIFEST, SIGNATURE, open_bundle
from weakseg.bundle_commands import main
from weakseg.bundle_fetch import fetch, shown
from weakseg.cli import main as cli
from weakseg.errors import BundleError, ConfigError, StorageError, UsageError


@pytest.fixture
def source(toy_bundle, tmp_path):
    """A copy of the toy bundle that a test may damage."""
    return shutil.copytree(toy_bundle, tmp_path / "source" / "toy" / "1")


@pytest.fixture
def models(tmp_path):
    return tmp_path / "models"


@pytest.fixture
def public(source, tmp_path):
    """A public key; `source` is signed by it."""
    public, _ = signature.keygen(tmp_path / "signing.pem")
    (source / SIGNATURE).write_bytes(signature.sign((source / MANIFEST).read_bytes(), tmp_path / "signing.pem"))
    return public


@pytest.fixture
def web(source):
    """A web server of the folder that `source` is in."""
    with web_server(source.parents[1]) as server:
        yield server


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(store, "FIRST_PAUSE_S", 0.0)


def graphs_asked(web):
    return [path for path in web.asked if path.endswith(".onnx")]


def test_from_a_web_server(web, source, models):
    opened, came = fetch(f"{web.url}/toy/1/", models)
    assert came and opened.folder == models / "toy" / "1"
    assert opened.sha256 == open_bundle(source).sha256
    assert [path.name for path in models.iterdir() if path.is_dir()] == ["toy"]  # nothing is left of the staging


def test_again_it_fetches_no_graph(web, models):
    fetch(f"{web.url}/toy/1", models)
    asked = len(graphs_asked(web))
    assert asked == 3
    assert not fetch(f"{web.url}/toy/1", models)[1]
    assert len(graphs_asked(web)) == asked


def test_what_was_killed_goes_on(web, models):
    web.answers["/toy/1/segmentation.onnx"] = [503] * store.ATTEMPTS
    with pytest.raises(StorageError, match=r"could not fetch http.*segmentation.onnx in 6 attempts: .*503"):
        fetch(f"{web.url}/toy/1", models)
    assert not (models / "toy").exists()
    web.asked.clear()
    assert fetch(f"{web.url}/toy/1", models)[1]
    assert graphs_asked(web) == ["/toy/1/segmentation.onnx"]  # the last of the three


def test_a_connection_that_ends_early_is_asked_again(web, models):
    web.answers["/toy/1/classifier.onnx"] = ["cut", "cut"]
    fetch(f"{web.url}/toy/1", models)
    assert graphs_asked(web).count("/toy/1/classifier.onnx") == 3


def test_several_at_once_fetch_it_once(web, models):
    with ThreadPoolExecutor(4) as threads:
        came = [future.result()[1] for future in [threads.submit(fetch, f"{web.url}/toy/1", models) for _ in range(4)]]
    assert sorted(came) == [False, False, False, True]
    assert len(graphs_asked(web)) == 3


def test_a_damaged_file_changes_nothing(web, source, models):
    data = bytearray((source / "segmentation.onnx").read_bytes())
    data[-1] ^= 1
    (source / "segmentation.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"http.*/toy/1/segmentation.onnx is damaged: expected sha256"):
        fetch(f"{web.url}/toy/1", models)
    assert not (models / "toy").exists()


def test_a_file_that_is_not_there(web, source, models):
    (source / "segmentation.onnx").unlink()
    with pytest.raises(BundleError, match=r"/toy/1: expected segmentation.onnx, got none"):
        fetch(f"{web.url}/toy/1", models)


def test_no_bundle_there(web, models):
    with pytest.raises(BundleError, match=r"expected manifest.json at http.*/toy, got none: name the folder"):
        fetch(f"{web.url}/toy", models)
    assert web.asked == ["/toy/manifest.json"]  # no is no


def test_refused_by_the_server(web, models, capsys):
    web.answers["/toy/1/manifest.json"] = [403]
    assert cli(["bundle", "fetch", f"{web.url}/toy/1", str(models)]) == 1
    assert "manifest.json: the server refuses it (403 Forbidden)" in capsys.readouterr().err


def test_nobody_answers(models):
    with web_server(models.parent) as server:
        url = f"{server.url}/toy/1"
    with pytest.raises(StorageError, match=r"could not fetch http.*/manifest.json in 6 attempts: URLError"):
        fetch(url, models)


def test_the_hash_that_was_named(web, source, models):
    sha256 = hashlib.sha256((source / MANIFEST).read_bytes()).hexdigest()
    with pytest.raises(BundleError, match=f"expected a manifest.json of sha256 {'0' * 64}, got {sha256}"):
        fetch(f"{web.url}/toy/1", models, sha256="0" * 64)
    assert not list(models.glob("*/"))
    assert fetch(f"{web.url}/toy/1", models, sha256=sha256)[1]
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        fetch(f"{web.url}/toy/1", models, sha256="latest")


def test_signed(web, models, public):
    opened, _ = fetch(f"{web.url}/toy/1", models, public_key=public)
    assert opened.signed_by is not None
    assert (models / "toy" / "1" / SIGNATURE).is_file()


def test_not_signed_by_that_key(web, models, public, tmp_path):
    other, _ = signature.keygen(tmp_path / "other.pem")
    with pytest.raises(BundleError, match=r"^http.*/toy/1/manifest.sig: "):
        fetch(f"{web.url}/toy/1", models, public_key=other)
    assert graphs_asked(web) == []  # nothing of a stranger's is fetched
    with pytest.raises(ConfigError, match="missing.pub"):
        fetch(f"{web.url}/toy/1", models, public_key=tmp_path / "missing.pub")


def test_without_a_signature(web, models, tmp_path):
    public, _ = signature.keygen(tmp_path / "signing.pem")
    with pytest.raises(BundleError, match=r"http.*/toy/1: expected manifest.sig by a key in .*, got none"):
        fetch(f"{web.url}/toy/1", models, public_key=public)


def test_what_lies_there_damaged_is_replaced(source, models):
    fetch(str(source), models)
    (models / "toy" / "1" / "segmentation.onnx").write_bytes(b"damaged")
    assert fetch(str(source), models)[1]
    open_bundle(models / "toy" / "1")


def test_debris_of_another_bundle_goes(source, models):
    debris = models / ".fetch-0123456789abcdef"
    debris.mkdir(parents=True)
    fetch(str(source), models)
    assert not debris.exists()


def test_a_folder_of_a_model_is_its_latest_version(source, models):
    assert fetch(str(source.parent), models)[0].folder == models / "toy" / "1"


def test_a_path_out_of_the_bundle_is_refused(source, models):
    content = json.loads((source / MANIFEST).read_text())
    content["files"]["../../escaped"] = "0" * 64
    (source / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"\.\./\.\./escaped"):
        fetch(str(source), models)
    assert not (models.parent / "escaped").exists()


def test_from_an_object_store(source, models):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(source), "/bucket/toy/1", recursive=True)
    assert fetch("memory://bucket/toy/1", models)[1]
    with pytest.raises(BundleError, match=r"expected manifest.json at memory://bucket/toy/2"):
        fetch("memory://bucket/toy/2", models)
    with pytest.raises(UsageError, match="nowhere://"):
        fetch("nowhere://bucket", models)


def test_a_query_allows_access_and_is_not_shown(web, models, capsys):
    assert main(["fetch", f"{web.url}/toy/1?sig=secret", str(models)]) == 0
    assert "/toy/1/manifest.json?sig=secret" in web.asked
    assert "secret" not in capsys.readouterr().out
    assert shown("https://me:secret@store/toy/1?sig=secret") == "https://store/toy/1"


def test_json(source, models, capsys):
    for came in (True, False):
        assert main(["fetch", str(source), str(models), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["fetched"] is came and said["folder"] == str(models / "toy" / "1")


def test_no_room(source, tmp_path, monkeypatch):
    """On /dev/full every write says that the disk is full."""
    models = tmp_path / "full"
    digest = hashlib.sha256((source / MANIFEST).read_bytes()).hexdigest()
    staging = models / f".fetch-{digest[:16]}"
    staging.mkdir(parents=True)
    (staging / ".classifier.onnx.part").symlink_to("/dev/full")
    with pytest.raises(BundleError, match=f"no room for {staging}/.classifier.onnx.part: give its volume"):
        fetch(str(source), models)
