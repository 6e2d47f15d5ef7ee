import asyncio
import logging
import random
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import serve.lifecycle
from serve.lifecycle import Lifecycle, _told
from serve.models import Models, ModelState
from serve.repository import BundleFolder
from weakseg.errors import (
    BundleError,
    FoldersUnreadableError,
    ModelFailedError,
    ModelLoadingError,
    ModelNeededError,
    ModelNotFoundError,
)

LONG_S = 60.0


class Opened:
    """A model as far as `Models` looks at it: it tells what was in its folder, and whether it was closed."""

    def __init__(self, path):
        self.content = (path / "manifest.json").read_text()
        if self.content == "damaged":
            raise BundleError("damaged: copy it again")
        if self.content == "secret":
            raise RuntimeError("secret")
        self.bundle = SimpleNamespace(sha256=self.content)
        self.closed = False

    def close(self):
        self.closed = True


class Repository:
    """Folders of bundles that can be written, and the models over them with a record of every change."""

    def __init__(self, root, **options):
        self.root = root
        self.options = options
        self.changes = []

    def put(self, id_, content="good"):
        path = self.root / id_ / "manifest.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def remove(self, id_):
        (self.root / id_ / "manifest.json").unlink()

    def scan(self):
        paths = [path.parent for path in sorted(self.root.glob("*/*/manifest.json"))]
        return [BundleFolder(path.parent.name, path.name, path) for path in paths]

    def open(self):
        models = Models()
        return models, Lifecycle(models, self.scan, Opened, self._changed, **self.options)

    def _changed(self, entry):
        self.changes.append((f"{entry.name}/{entry.version}", entry.state.name))


@pytest.fixture
def repository(tmp_path):
    def make(*ids, **options):
        made = Repository(tmp_path, **options)
        for id_ in ids:
            made.put(id_)
        return made

    return make


def states(models):
    return {f"{entry.name}/{entry.version}": entry.state.name for entry in models.entries()}


async def test_the_newest_version_by_natural_order(repository):
    models, lifecycle = repository("toy/10", "toy/9", "toy/2").open()
    await lifecycle.reload()
    assert models.get("", "").version == "10"
    assert models.get("toy", "9").version == "9"
    assert [entry.version for entry in models.entries()] == ["2", "9", "10"]


async def test_the_newest_version_that_is_ready(repository):
    made = repository("toy/9")
    made.put("toy/10", "damaged")
    models, lifecycle = made.open()
    with pytest.raises(ModelLoadingError, match="toy/10"), models.use("toy", ""):
        pass
    await lifecycle.reload()
    assert models.get("toy", "").version == "9"
    assert not models.ready, "a new server with a broken model is to be noticed"
    with pytest.raises(ModelFailedError, match="damaged: copy it again"), models.use("toy", "10"):
        pass


async def test_a_fault_of_ours_does_not_show_and_stops_no_other_model(repository, caplog):
    made = repository("toy/2")
    made.put("toy/1", "secret")
    models, lifecycle = made.open()
    await lifecycle.reload()
    assert states(models) == {"toy/1": "FAILED", "toy/2": "READY"}
    assert models.entries()[0].failure == "internal error: the server's log says more"
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [("", "", "one of a, b"), ("c", "", "this server has a, b"), ("a", "2", "there is 1")],
)
async def test_not_found(repository, name, version, message):
    with pytest.raises(ModelNotFoundError, match=message):
        repository("a/1", "b/1").open()[0].get(name, version)


async def test_closing_closes_what_is_loaded(repository):
    models, lifecycle = repository("a/1", "b/1").open()
    await lifecycle.reload()
    opened = [entry.model for entry in models.entries()]
    await lifecycle.close()
    assert all(model.closed for model in opened)


async def test_a_version_that_is_new_is_loaded_and_one_that_is_gone_goes(repository):
    made = repository("toy/1")
    models, lifecycle = made.open()
    await lifecycle.reload()
    first = models.get("toy", "1").model
    made.put("toy/2")
    await lifecycle.reload()
    assert models.get("toy", "").version == "2" and models.get("toy", "1").model is first
    made.remove("toy/1")
    await lifecycle.reload()
    assert states(models) == {"toy/2": "READY"} and first.closed
    assert made.changes[-1] == ("toy/1", "UNLOADING")
    n_changes = len(made.changes)
    await lifecycle.reload()
    assert len(made.changes) == n_changes, "nothing has changed"


async def test_a_version_that_takes_the_place_of_another_leaves_no_gap(repository):
    made = repository("toy/1")
    models, lifecycle = made.open()
    await lifecycle.reload()
    first = models.get("toy", "1").model
    made.remove("toy/1")
    made.put("toy/2", "damaged")
    await lifecycle.reload()
    assert states(models) == {"toy/1": "READY", "toy/2": "FAILED"} and not first.closed, "it stays, from memory"
    made.put("toy/2")
    made.changes.clear()
    await lifecycle.reload()
    assert made.changes == [("toy/2", "LOADING"), ("toy/2", "READY"), ("toy/1", "UNLOADING")] and first.closed


async def test_a_model_that_is_gone_with_all_its_versions_goes(repository):
    made = repository("toy/1", "toy/2", "cat/1")
    models, lifecycle = made.open()
    await lifecycle.reload()
    made.remove("toy/1")
    made.remove("toy/2")
    await lifecycle.reload()
    assert states(models) == {"cat/1": "READY"}


async def test_a_model_is_closed_when_its_last_request_has_its_answer(repository):
    made = repository("toy/1")
    models, lifecycle = made.open()
    await lifecycle.reload()
    with models.use("toy", "1") as (_, old):
        made.put("toy/1", "better")
        reloading = asyncio.create_task(lifecycle.reload())
        while models.get("toy", "1").model is old:
            await asyncio.sleep(0.001)
        with models.use("toy", "1") as (_, new):
            assert new.content == "better" and not old.closed
        await asyncio.sleep(0.01)
        assert not old.closed and not reloading.done()
    await reloading
    assert old.closed and not new.closed
    assert [state for _, state in made.changes] == ["LOADING", "READY", "READY"], "it answered all the time"


@pytest.mark.parametrize("broken", ["damaged", "secret"])
async def test_a_failed_reload_keeps_what_answers_and_says_so(repository, broken):
    made = repository("toy/1")
    models, lifecycle = made.open()
    await lifecycle.reload()
    old = models.get("toy", "1").model
    made.put("toy/1", broken)
    made.put("toy/2", broken)
    await lifecycle.reload()
    entry = models.get("toy", "1")
    assert (entry.state, entry.model) == (ModelState.READY, old) and entry.failure
    assert models.get("toy", "").version == "1" and models.get("toy", "2").state is ModelState.FAILED
    assert models.ready, "what the server started with still answers"
    made.put("toy/1", "mended")
    made.put("toy/2", "mended")
    await lifecycle.reload()
    assert states(models) == {"toy/1": "READY", "toy/2": "READY"} and old.closed
    assert models.get("toy", "1").failure == ""


async def test_stop_first_never_has_two_in_memory(repository):
    made = repository("toy/1", policy="stop_first")
    models, lifecycle = made.open()
    await lifecycle.reload()
    old = models.get("toy", "1").model
    made.put("toy/1", "better")
    await lifecycle.reload()
    assert old.closed and models.get("toy", "1").model.content == "better"
    assert [state for _, state in made.changes] == ["LOADING", "READY", "LOADING", "LOADING", "READY"]


@pytest.mark.parametrize("policy", ["swap", "stop_first"])
async def test_only_so_many_versions_are_kept_and_the_old_one_if_the_new_one_fails(repository, policy):
    made = repository("toy/1", "toy/2", "cat/1", policy=policy, keep=1)
    models, lifecycle = made.open()
    await lifecycle.reload()
    assert states(models) == {"cat/1": "READY", "toy/2": "READY"}
    made.put("toy/3", "damaged")
    await lifecycle.reload()
    assert states(models) == {"cat/1": "READY", "toy/2": "READY", "toy/3": "FAILED"}
    made.put("toy/3")
    await lifecycle.reload()
    assert states(models) == {"cat/1": "READY", "toy/3": "READY"}


async def test_folders_that_cannot_be_read_change_nothing(repository, caplog):
    made = repository("toy/1")
    models, lifecycle = made.open()
    await lifecycle.reload()
    (made.root / "toy" / "labels.toml").write_text("damaged")
    made.put("toy/2")
    with caplog.at_level(logging.ERROR, "serve.models"):
        await lifecycle.reload()
    assert states(models) == {"toy/1": "READY"} and "models not reloaded" in caplog.text


async def test_a_model_that_would_not_fit_is_not_loaded(repository, monkeypatch):
    made = repository("toy/1")
    models, lifecycle = made.open()
    await lifecycle.reload()
    monkeypatch.setattr(serve.lifecycle, "available_bytes", lambda: 100 * 2**20)
    made.put("toy/2")
    (made.root / "toy" / "2" / "classifier.onnx").write_bytes(bytes(20 * 2**20))
    await lifecycle.reload()
    assert models.get("toy", "").version == "1"
    assert "expected about 124 MiB of free memory to load it, got 100 MiB" in models.get("toy", "2").failure


async def test_labels_name_versions_and_share_out_requests(repository):
    made = repository("toy/1", "toy/2", "toy/3")
    made.put("toy/4", "damaged")
    labels = made.root / "toy" / "labels.toml"
    labels.write_text('stable = "1"\ncanary = "2"\nbroken = "4"\ncanary_percent = 20\n')
    models, lifecycle = made.open()
    await lifecycle.reload()
    assert models.get("toy", "stable").version == "1" and models.get("toy", "canary").version == "2"
    assert models.get("toy", "3").version == "3"
    assert models.get("toy", "broken").state is ModelState.FAILED
    assert models.labels_of(models.get("toy", "2")) == ["canary"] and models.labels_of(models.get("toy", "3")) == []
    drawn = [models.get("toy", "", key=f"image-{i}").version for i in range(2000)]
    assert drawn == [models.get("toy", "", key=f"image-{i}").version for i in range(2000)], "the same for the same id"
    assert set(drawn) == {"1", "2"} and drawn.count("2") == pytest.approx(400, abs=80)
    without_ids = [models.get("toy", "").version for _ in range(2000)]
    assert without_ids.count("2") == pytest.approx(400, abs=120)
    with pytest.raises(ModelNotFoundError, match="there is 1, 2, 3, 4, stable, canary, broken"):
        models.get("toy", "latest")

    labels.write_text('stable = "3"\ncanary = "4"\ncanary_percent = 100\n')
    await lifecycle.reload()
    assert {models.get("toy", "").version for _ in range(100)} == {"3"}, "a canary that cannot answer gets nothing"


@pytest.mark.parametrize("content", ["damaged", None], ids=["damaged", "not there"])
async def test_a_label_moves_when_its_version_can_answer(repository, caplog, content):
    made = repository("toy/1")
    labels = made.root / "toy" / "labels.toml"
    labels.write_text('stable = "1"\n')
    models, lifecycle = made.open()
    await lifecycle.reload()
    if content is not None:
        made.put("toy/2", content)
    labels.write_text('stable = "2"\n')
    for _ in range(2):
        await lifecycle.reload()
        assert models.get("toy", "").version == models.get("toy", "stable").version == "1"
    assert models.labels_of(models.get("toy", "1")) == ["stable"] and models.ready
    (said,) = [record.fields for record in caplog.records if "label" in record.message]
    assert said == {"model": "toy", "label": "stable", "version": "2", "kept": True}, "told once"
    with pytest.raises(ModelNeededError, match="toy/1 is stable"):
        await lifecycle.unload("toy", "1", force=False)

    made.put("toy/2")
    await lifecycle.load("toy", "2")
    assert models.get("toy", "").version == "2" and models.labels_of(models.get("toy", "1")) == []


async def test_a_label_that_moves_leaves_no_gap(repository):
    made = repository("toy/1")
    labels = made.root / "toy" / "labels.toml"
    labels.write_text('stable = "1"\n')
    models, lifecycle = made.open()
    await lifecycle.reload()
    answered = []

    def changed(entry):
        answered.append((entry.version, entry.state.name, models.get("toy", "").version))

    lifecycle._on_change = changed
    made.put("toy/2")
    labels.write_text('stable = "2"\n')
    await lifecycle.reload()
    assert answered == [("2", "LOADING", "1"), ("2", "READY", "2")]


async def test_a_label_follows_when_what_it_named_is_gone(repository):
    made = repository("toy/1", "toy/3")
    labels = made.root / "toy" / "labels.toml"
    labels.write_text('stable = "1"\n')
    models, lifecycle = made.open()
    await lifecycle.reload()
    made.put("toy/2", "damaged")
    labels.write_text('stable = "2"\n')
    made.remove("toy/1")
    await lifecycle.reload()
    assert models.get("toy", "").state is ModelState.FAILED, "not the newest: nobody has called that stable"


async def test_a_server_is_not_ready_before_what_is_stable_answers(repository):
    made = repository("toy/1")
    labels = made.root / "toy" / "labels.toml"
    labels.write_text('stable = "2"\n')
    models, lifecycle = made.open()
    await lifecycle.reload()
    assert states(models) == {"toy/1": "READY"} and not models.ready
    with pytest.raises(ModelNotFoundError, match="no version '2', which is its 'stable', of model 'toy': there is 1"):
        models.get("toy", "")
    made.put("toy/2")
    await lifecycle.reload()
    assert models.ready and models.get("toy", "").version == "2"


async def test_a_version_with_a_label_is_kept(repository):
    made = repository("toy/1", "toy/2", "toy/3", keep=1)
    (made.root / "toy" / "labels.toml").write_text('stable = "1"\n')
    models, lifecycle = made.open()
    await lifecycle.reload()
    assert states(models) == {"toy/1": "READY", "toy/3": "READY"}
    assert models.get("toy", "").version == "1"


async def test_what_is_unloaded_stays_out_until_it_is_loaded(repository):
    made = repository("toy/1", "toy/2")
    models, lifecycle = made.open()
    await lifecycle.reload()
    old = models.get("toy", "2").model
    await lifecycle.unload("toy", "2", force=False)
    assert states(models) == {"toy/1": "READY"} and old.closed and lifecycle.unloaded() == [("toy", "2")]
    made.put("toy/2", "better")
    await lifecycle.reload()
    await lifecycle.unload("toy", "2", force=False)
    assert states(models) == {"toy/1": "READY"} and models.get("toy", "").version == "1"
    loaded = await lifecycle.load("toy", "2")
    assert loaded.model.content == "better" and models.get("toy", "").version == "2" and lifecycle.unloaded() == []


async def test_a_version_that_requests_need_is_unloaded_by_force_only(repository):
    made = repository("toy/1", "toy/2", "cat/1")
    (made.root / "toy" / "labels.toml").write_text('stable = "1"\n')
    models, lifecycle = made.open()
    await lifecycle.reload()
    with pytest.raises(ModelNeededError, match="toy/1 is stable: move the label first"):
        await lifecycle.unload("toy", "1", force=False)
    with pytest.raises(ModelNeededError, match="cat/1 is the last version of cat that answers"):
        await lifecycle.unload("cat", "1", force=False)
    assert len(made.changes) == 6 and lifecycle.unloaded() == [], "nothing has changed"
    await lifecycle.unload("toy", "1", force=True)
    await lifecycle.unload("cat", "1", force=True)
    assert states(models) == {"toy/2": "READY"} and models.ready
    with pytest.raises(ModelNotFoundError):
        models.get("toy", "")
    with pytest.raises(ModelNotFoundError, match="no cat/2 in service: there is toy/2"):
        await lifecycle.unload("cat", "2", force=True)
    await lifecycle.unload("toy", "2", force=True)
    assert states(models) == {} and not models.ready, "a server without models is not ready"


async def test_a_version_that_failed_needs_no_force_and_a_server_without_it_is_ready(repository):
    made = repository("toy/1")
    made.put("toy/2", "damaged")
    models, lifecycle = made.open()
    await lifecycle.reload()
    assert not models.ready
    await lifecycle.unload("toy", "2", force=False)
    assert models.ready
    made.put("cat/1", "damaged")
    await lifecycle.reload()
    assert models.ready, "it has started: a model that never answered takes nothing from anybody"


async def test_loading_again_what_failed(repository):
    made = repository("toy/1")
    made.put("toy/2", "secret")
    models, lifecycle = made.open()
    await lifecycle.reload()
    opened = []
    lifecycle._load = lambda path: opened.append(path) or Opened(path)
    await lifecycle.reload()
    assert opened == [], "the files are as they were"
    with pytest.raises(ModelFailedError, match="toy/2 could not be loaded: internal error"):
        await lifecycle.load("toy", "2")
    await lifecycle.load("toy", "1")
    assert len(opened) == 1, "what answers and is as it was stays"
    old = models.get("toy", "1").model
    made.put("toy/1", "damaged")
    for _ in range(2):
        with pytest.raises(ModelFailedError, match="damaged: copy it again"):
            await lifecycle.load("toy", "1")
    assert len(opened) == 3 and models.get("toy", "1").model is old and not old.closed


async def test_only_what_lies_in_the_folders_is_loaded(repository):
    made = repository("toy/1")
    models, lifecycle = made.open()
    await lifecycle.reload()
    made.put("toy/2")
    assert (await lifecycle.load("toy", "2")).state is ModelState.READY, "nobody had to look before"
    for name, version in (("toy", "3"), ("..", "toy"), ("toy", "../toy/1"), ("", ""), (str(made.root), "toy")):
        with pytest.raises(ModelNotFoundError, match="there is toy/1, toy/2"):
            await lifecycle.load(name, version)
    (made.root / "toy" / "labels.toml").write_text("damaged")
    assert "expected a TOML file of labels" in await lifecycle.reload()
    lifecycle._scan = lambda: (_ for _ in ()).throw(FileNotFoundError(2, "it went"))
    with pytest.raises(FoldersUnreadableError, match="it went"):
        await lifecycle.load("toy", "1")
    assert states(models) == {"toy/1": "READY", "toy/2": "READY"}


async def test_a_version_that_was_loaded_beyond_those_that_are_kept_stays(repository):
    made = repository("toy/1", "toy/2", "toy/3", keep=1)
    models, lifecycle = made.open()
    await lifecycle.reload()
    await lifecycle.load("toy", "1")
    await lifecycle.load("toy", "3")
    made.put("toy/4")
    await lifecycle.reload()
    assert states(models) == {"toy/1": "READY", "toy/4": "READY"}, "3 was one of those that are kept, and is no more"
    await lifecycle.unload("toy", "1", force=False)
    await lifecycle.reload()
    assert states(models) == {"toy/4": "READY"}
    await lifecycle.unload("toy", "4", force=True)
    await lifecycle.reload()
    assert states(models) == {"toy/3": "READY"}, "the newest that may be served"


async def test_a_caller_that_goes_away_leaves_no_half_of_a_change(repository):
    made = repository("toy/1")
    models, lifecycle = made.open()
    await lifecycle.reload()
    made.put("toy/2")
    may_load = threading.Event()
    lifecycle._load = lambda path: may_load.wait(LONG_S) and Opened(path)
    loading = asyncio.create_task(lifecycle.load("toy", "2"))
    waiting = asyncio.create_task(lifecycle.unload("toy", "1", force=True))
    while states(models).get("toy/2") != "LOADING":
        await asyncio.sleep(0.001)
    assert models.ready, "what is loaded for the first time takes nothing from anybody"
    for caller in (loading, waiting):
        caller.cancel()
    await asyncio.wait([loading, waiting])
    assert not lifecycle.settled
    may_load.set()
    assert await lifecycle.reload() == ""
    assert states(models) == {"toy/1": "READY", "toy/2": "READY"}, "one was under way, the other had not begun"


async def test_closing_gives_up_what_is_under_way(repository):
    _, lifecycle = repository("toy/1").open()
    may_load = threading.Event()
    lifecycle._load = lambda path: may_load.wait(LONG_S) and Opened(path)
    loading = asyncio.create_task(lifecycle.reload())
    while lifecycle._task is None:
        await asyncio.sleep(0.001)
    await lifecycle.close()
    may_load.set()
    with pytest.raises(asyncio.CancelledError):
        await loading


async def test_many_changes_at_once_end_in_one_state(repository):
    made = repository("toy/1", "toy/2")
    models, lifecycle = made.open()
    await lifecycle.reload()
    rng = random.Random(0)
    changes = []
    for _ in range(20):
        changes += [lifecycle.load("toy", "2"), lifecycle.unload("toy", "2", force=True), lifecycle.reload()]
    rng.shuffle(changes)
    await asyncio.gather(*changes)
    out = lifecycle.unloaded() == [("toy", "2")]
    assert states(models) == {"toy/1": "READY"} | ({} if out else {"toy/2": "READY"}) and lifecycle.settled
    await lifecycle.load("toy", "2")
    assert states(models) == {"toy/1": "READY", "toy/2": "READY"}


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        ("expected a signature by a key in /etc/weakseg/a.pub (1, 2)", "expected a signature by a key in a.pub (1, 2)"),
        ("cannot open '/usr/lib/x86_64/libcublas.so.12': no file", "cannot open 'libcublas.so.12': no file"),
        ("/srv/models/toy/1/a.onnx: expected 3/4, got 3 / 4", "a.onnx: expected 3/4, got 3 / 4"),
        ("no manifest in /srv/models/toy/1: copy it", "no manifest in toy/1: copy it"),
        ("see https://example.org/a/b, and toy/1/a.onnx", "see https://example.org/a/b, and toy/1/a.onnx"),
    ],
)
def test_where_things_lie_is_not_told(failure, told):
    assert _told(failure, BundleFolder("toy", "1", Path("/srv/models/toy/1"))) == told
