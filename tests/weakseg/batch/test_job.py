"""The job on one machine: what it writes, that it goes on, that it does nothing twice, and how it ends."""

import errno
import json
import os
import re
import signal
import subprocess
import threading
import time

import numpy as np
import pytest

from tests.batch import FaultyFileSystem, paint, rows, tree
from weakseg.batch.job import max_failures
from weakseg.batch.manifest import sha256
from weakseg.batch.store import open_store
from weakseg.errors import ConfigError
from weakseg.masks.cams import cams_from_npz
from weakseg.masks.png import labels_from_png, provenance_of

LONG_S = 120


@pytest.fixture(scope="module")
def undisturbed(photos, toy_bundle, tmp_path_factory):
    """The output of a run that nobody disturbs."""
    from weakseg.cli import main

    out = tmp_path_factory.mktemp("undisturbed") / "out"
    argv = ["pseudo-label", "--input", str(photos), "--output", str(out), "--bundle", str(toy_bundle), "--json"]
    assert main(argv) == 0
    return tree(out)


def test_masks_and_manifest(photos, job, model, tmp_path):
    code, said = job(photos, tmp_path / "out")
    assert code == 0 and said["finished"] and (said["total"], said["ok"], said["failed"]) == (14, 14, 0)
    found = rows(tmp_path / "out")
    assert list(found) == sorted(found) and len(found) == 14
    assert set(tree(tmp_path / "out")) == {
        *(f"masks/{i:02d}.png" for i in range(7)),
        *(f"masks/sub/{i:02d}.png" for i in range(7)),
        *("config.json", "_SUCCESS", "classes.txt"),
        *("manifest/part-00000-of-00001.jsonl", "manifest/exports-00000-of-00001.json"),
    }
    for uri, row in found.items():
        result = model.segment(photos / uri, outputs=("pseudo_mask",), quality=True)
        png = (tmp_path / "out" / row["outputs"]["mask"]["path"]).read_bytes()
        np.testing.assert_array_equal(labels_from_png(png), result.pseudo_mask)
        assert row["outputs"]["mask"] == {"path": f"masks/{row['key']}.png", "sha256": sha256(png), "bytes": len(png)}
        data = (photos / uri).read_bytes()
        assert (row["size_bytes"], row["sha256"]) == (len(data), sha256(data))
        assert (row["height"], row["width"]) == result.pseudo_mask.shape
        assert (row["model"], row["model_sha256"]) == ("toy/1", result.model_sha256)
        assert row["threshold"] == result.threshold.to_dict() and row["refined_by"] == result.refined_by
        assert {one["name"] for one in row["classes"]} == set(result.legend())
        assert row["present"] == list(result.present)
        assert row["scores"] == pytest.approx({k: v for k, v in result.scores.items() if v >= 0.01}, abs=1e-6)
        assert provenance_of(png)["model"] == "toy/1"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model"] == "toy/1" and config["mask"] == "pseudo_mask" and config["num_shards"] == 1
    assert {row["config_sha256"] for row in found.values()} == {sha256((tmp_path / "out/config.json").read_bytes())}


def test_timings_lie_beside_the_output(photos, job, tmp_path):
    job(photos, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out.timings.jsonl").read_text().splitlines()]
    assert sorted(line["uri"] for line in lines) == sorted(rows(tmp_path / "out"))
    assert {"read", "decode", "infer", "postprocess", "store", "total"} <= set(lines[0])


def test_the_same_command_twice_does_nothing(photos, job, tmp_path, undisturbed):
    out = tmp_path / "out"
    job(photos, out)
    assert tree(out) == undisturbed
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, said = job(photos, out)
    assert code == 0 and (said["labelled"], said["ok"], said["written"]) == (0, 14, [])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("flags", [["--workers", "1"], ["--workers", "3"], ["--timings", "t.jsonl"]])
def test_how_it_is_done_changes_no_byte(photos, job, tmp_path, monkeypatch, undisturbed, flags):
    monkeypatch.chdir(tmp_path)
    job(photos, "out", *flags)
    assert tree("out") == undisturbed


def test_shards_together_have_what_one_has(photos, job, tmp_path, monkeypatch, undisturbed):
    out = tmp_path / "out"
    assert job(photos, out, "--num-shards", "3", "--shard-index", "2")[0] == 0
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert job(photos, out, "--num-shards", "3")[0] == 0
    assert not (out / "_SUCCESS").exists()
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert job(photos, out, "--num-shards", "3")[0] == 0
    assert (out / "_SUCCESS").exists() and not (out / "_work").exists()
    masks = {path: data for path, data in tree(out).items() if path.startswith("masks/")}
    assert masks == {path: data for path, data in undisturbed.items() if path.startswith("masks/")}
    parts = sorted(path.name for path in (out / "manifest").glob("part-*"))
    assert parts == [f"part-{i:05d}-of-00003.jsonl" for i in range(3)] and len(rows(out)) == 14


def test_images_that_come_later_and_images_that_change(job, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    for name in ("a", "b"):
        paint(source / f"{name}.png", "red")
    job(source, out)
    paint(source / "c.png", "blue")
    paint(source / "b.png", "green", "blue", size=(48, 60))
    code, said = job(source, out)
    assert code == 0 and said["labelled"] == 2 and len(rows(out)) == 3
    assert {one["name"] for one in rows(out)["b.png"]["classes"]} == {"green", "blue"}
    fresh = tmp_path / "fresh"
    job(source, fresh)
    assert tree(fresh) == tree(out)


def test_tags(job, tmp_path):
    for name in "abc":
        paint(tmp_path / "in" / f"{name}.png", "red", "green", "blue")
    table = tmp_path / "in" / "data.csv"
    table.write_text("image,tags\na.png,red;blue\nb.png,\nc.png,purple\n")
    code, said = job(table, tmp_path / "out")
    assert code == 3 and said["reasons"] == {"UNKNOWN_CLASS": 1}
    found = rows(tmp_path / "out")
    assert {one["name"] for one in found["a.png"]["classes"]} == {"red", "blue"}
    assert found["b.png"]["classes"] == [] and found["b.png"]["tags"] == []
    assert "unknown class 'purple'" in found["c.png"]["error"]["message"]
    table.write_text("image,tags\na.png,red;blue\nb.png,green\nc.png,green\n")
    code, said = job(table, tmp_path / "out")
    assert code == 0 and said["labelled"] == 2, "images whose tags have changed"
    code, said = job(table, tmp_path / "all", "--no-use-tags")
    assert code == 0
    assert all(len(row["classes"]) == 3 and row["tags"] is None for row in rows(tmp_path / "all").values())
    assert job(table, tmp_path / "all", "--no-use-tags")[1]["labelled"] == 0


def test_maps(photos, job, model, tmp_path):
    job(photos, tmp_path / "out", "--cams")
    row = rows(tmp_path / "out")["sub/03.jpg"]
    cams = cams_from_npz((tmp_path / "out" / row["outputs"]["cams"]["path"]).read_bytes())
    expected = model.segment(photos / "sub/03.jpg", outputs=("cam", "pseudo_mask")).heatmaps
    assert cams.names == tuple(expected) and cams.cam01.dtype == np.float16
    assert cams.size == (row["height"], row["width"])
    np.testing.assert_allclose(cams.cam01, np.stack(list(expected.values())), atol=5e-4)


def test_segmentations(photos, job, model, tmp_path):
    job(photos, tmp_path / "out", "--mask", "segmentation")
    row = rows(tmp_path / "out")["03.png"]
    png = (tmp_path / "out" / "masks" / "03.png").read_bytes()
    np.testing.assert_array_equal(labels_from_png(png), model.segment(photos / "03.png").segmentation)
    assert row["threshold"] is None and provenance_of(png)["mask"] == "segmentation"


def test_a_server_gives_the_same_labels(photos, job, tmp_path, shared_serving, undisturbed):
    out = tmp_path / "out"
    code, said = job(photos, out, by=["--endpoint", shared_serving.target])
    assert code == 0 and said["ok"] == 14
    for path, data in tree(out).items():
        if path.startswith("masks/"):
            np.testing.assert_array_equal(labels_from_png(data), labels_from_png(undisturbed[path]))
    assert job(photos, out, by=["--endpoint", shared_serving.target])[1]["labelled"] == 0


def test_bad_images_are_recorded_and_the_others_done(job, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    for i in range(6):
        paint(source / f"{i}.png", "red")
    (source / "0.png").write_bytes((source / "1.png").read_bytes()[:60])
    (source / "2.png").write_bytes(b"")
    (source / "gone.jpg").symlink_to(source / "nothing.jpg")
    code, said = job(source, out)
    assert code == 3 and (said["ok"], said["failed"]) == (4, 3) and said["finished"]
    assert said["reasons"] == {"IMAGE_UNDECODABLE": 1, "UNSUPPORTED_FORMAT": 1, "UNREADABLE": 1}
    found = rows(out)
    assert [uri for uri, row in found.items() if row["status"] == "failed"] == ["0.png", "2.png", "gone.jpg"]
    assert found["2.png"]["error"]["reason"] == "UNSUPPORTED_FORMAT" and "outputs" not in found["2.png"]
    assert str(tmp_path) not in json.dumps(found), "where the images lie is nobody's business"
    assert job(source, out)[0] == 3, "the second time does nothing, and says the same"
    assert job(source, out, "--max-failures", "3")[0] == 0
    assert job(source, out, "--max-failures", "50%")[0] == 0
    (source / "gone.jpg").unlink()
    paint(source / "gone.jpg", "blue")
    code, said = job(source, out, "--retry-failed")
    assert code == 3 and said["labelled"] == 3 and said["failed"] == 2


def test_it_stops_when_too_many_fail(job, tmp_path):
    source = tmp_path / "in"
    paint(source / "z.png", "red")
    for i in range(60):
        (source / f"{i:02d}.png").write_bytes(b"no image")
    code, said = job(source, tmp_path / "out", "--max-failures", "5", "--workers", "1")
    assert code == 3 and said["too_many"] and not said["finished"] and said["failed"] < 20
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert job(source, tmp_path / "out")[1]["finished"], "without the limit it goes on"


def test_nothing_but_bad_images(job, tmp_path):
    for i in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}.png").write_bytes(b"no image")
    assert job(tmp_path / "in", tmp_path / "out")[0] == 42


def test_one_percent_of_corrupt_images(photos, job, tmp_path):
    source, rng = tmp_path / "in", np.random.default_rng(0)
    source.mkdir()
    whole = (photos / "sub" / "03.jpg").read_bytes()
    for i in range(200):
        data = whole if i % 100 else whole[: int(rng.integers(2, len(whole) // 2))]
        (source / f"{i:03d}.jpg").write_bytes(data)
    code, said = job(source, tmp_path / "out", "--max-failures", "1%")
    assert code == 0 and (said["ok"], said["failed"]) == (198, 2)


@pytest.mark.parametrize(
    ("text", "n", "expected"), [("0", 10, 0), ("12", 10, 12), ("1%", 1000, 10), ("0.1%", 50, 1), ("100%", 7, 7)]
)
def test_max_failures(text, n, expected):
    assert max_failures(text, n) == expected


@pytest.mark.parametrize("text", ["", "x", "-1", "101%", "1.5", "%"])
def test_max_failures_that_make_no_sense(text):
    with pytest.raises(ConfigError, match="expected --max-failures as a number of images or a share like 1%"):
        max_failures(text, 10)


def test_an_empty_shard_is_done_too(job, tmp_path):
    for i in range(2):
        paint(tmp_path / "in" / f"{i}.png", "red")
    codes = [job(tmp_path / "in", tmp_path / "out", "--num-shards", "5", "--shard-index", str(i))[0] for i in range(5)]
    assert codes == [0] * 5 and (tmp_path / "out" / "_SUCCESS").exists() and len(rows(tmp_path / "out")) == 2


def interrupted(job, monkeypatch, *arguments):
    """A run that is killed once all images are done, before anything about them all is written."""
    from weakseg.batch import job as module

    def killed(*_):
        raise OSError(errno.EIO, "killed")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", killed)
        assert job(*arguments)[0] == 1


def test_a_redo_that_was_interrupted_and_taken_back(job, tmp_path, monkeypatch):
    """The mask on disk is then of other tags than the manifest says: it is made again."""
    paint(tmp_path / "in" / "a.png", "red", "green", "blue")
    table, out = tmp_path / "in" / "data.csv", tmp_path / "out"
    table.write_text("image,tags\na.png,red\n")
    job(table, out)
    before = tree(out)
    table.write_text("image,tags\na.png,blue\n")
    interrupted(job, monkeypatch, table, out)
    assert not (out / "_SUCCESS").exists()
    table.write_text("image,tags\na.png,red\n")
    assert job(table, out)[1]["labelled"] == 1
    assert tree(out) == before


def test_retried_images_are_kept_when_the_run_is_interrupted(job, tmp_path, monkeypatch):
    source, out = tmp_path / "in", tmp_path / "out"
    paint(source / "a.png", "red")
    paint(source / "whole.png", "blue")
    whole = (source / "whole.png").read_bytes()
    (source / "b.png").write_bytes(b"x" * len(whole))
    assert job(source, out)[0] == 3
    (source / "b.png").write_bytes(whole)
    interrupted(job, monkeypatch, source, out, "--retry-failed")
    code, said = job(source, out)
    assert code == 0 and said["labelled"] == 0 and said["ok"] == 3


def test_names_that_get_in_each_others_way(job, tmp_path):
    for name in ("a.jpg", "a.png/b.jpg", "a.txt/c.jpg"):
        paint(tmp_path / "in" / name, "red")
    code, said = job(tmp_path / "in", tmp_path / "out", "--formats", "yolo")
    assert code == 0 and said["ok"] == 3


def test_files_that_never_can_be_read_are_no_reason_to_stop(job, tmp_path):
    source = tmp_path / "in"
    paint(source / "a.png", "red")
    (source / "loop.jpg").symlink_to(source / "loop.jpg")
    os.mkfifo(source / "pipe.jpg")
    (source / "up").symlink_to(source)
    (source / "list.txt").write_text(f"a.png\nloop.jpg\npipe.jpg\n{'x' * 300}.jpg\nnul\0.jpg\n")
    for where, n in ((source, 3), (source / "list.txt", 5)):
        code, said = job(where, tmp_path / f"out-{n}")
        assert code == 3 and (said["total"], said["ok"]) == (n, 1) and said["reasons"] == {"UNREADABLE": n - 1}


def test_force_does_all_again(photos, job, tmp_path, undisturbed):
    job(photos, tmp_path / "out")
    (tmp_path / "out" / "masks" / "03.png").unlink()
    code, said = job(photos, tmp_path / "out", "--formats", "coco")
    assert code == 1 and "--force does all again" in said["error"]["message"]
    assert job(photos, tmp_path / "out", "--force")[1]["labelled"] == 14
    assert {p: d for p, d in tree(tmp_path / "out").items() if p in undisturbed} == undisturbed


def test_timings_that_cannot_be_written_cost_nothing_else(photos, job, tmp_path):
    (tmp_path / "file").write_text("")
    code, said = job(photos, tmp_path / "out", "--timings", str(tmp_path / "file" / "t.jsonl"))
    assert code == 0 and said["ok"] == 14


def test_other_settings_are_refused(photos, job, toy_bundle, tmp_path, undisturbed):
    out = tmp_path / "out"
    job(photos, out)
    code, said = job(photos, out, "--threshold", "0.6")
    assert code == 2 and "threshold: None, now 0.6" in said["error"]["message"]
    assert "--force" in said["error"]["message"] and tree(out) == undisturbed
    code, said = job(photos, out, "--num-shards", "2", "--shard-index", "0")
    assert code == 2 and "num_shards: 1, now 2" in said["error"]["message"] and tree(out) == undisturbed
    code, said = job(photos, out, "--threshold", "0.6", "--force")
    assert code == 0 and said["labelled"] == 14
    job(photos, tmp_path / "fresh", "--threshold", "0.6")
    assert tree(out) == tree(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "expected --workers of at least 1"),
        (["--num-shards", "2", "--shard-index", "2"], r"expected --shard-index in 0 \.\.\. 1, got 2"),
        (["--num-shards", "2"], "JOB_COMPLETION_INDEX"),
        (["--endpoint", "localhost:1"], "either --bundle or --endpoint"),
        (["--review", "-1"], "expected --review of at least 0"),
        (["--address", "auto"], "add --engine ray"),
    ],
)
def test_wrong_arguments(photos, job, tmp_path, monkeypatch, flags, message):
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    code, said = job(photos, tmp_path / "out", *flags)
    assert code == 2 and not (tmp_path / "out").exists()
    assert re.search(message, said["error"]["message"])


def test_an_output_among_the_images_is_refused(job, tmp_path):
    paint(tmp_path / "a.png", "red")
    paint(tmp_path / "masks" / "a.png", "red")
    code, said = job(tmp_path, tmp_path / "masks")
    assert code == 2 and "lies in the folder of images: choose one beside it" in said["error"]["message"]


def test_sigterm_finishes_what_is_under_way(photos, command, started, tmp_path, undisturbed, many):
    source, expected = many
    out = tmp_path / "out"
    child = started(command(source, out, "--workers", "1", "--json"))
    _wait_for(lambda: len(list((out / "masks").rglob("*.png"))) > 5, child)
    child.send_signal(signal.SIGTERM)
    said = json.loads(child.communicate(timeout=LONG_S)[0])
    assert child.returncode == 143 and said["signal"] == signal.SIGTERM and not said["finished"]
    assert said["ok"] == len(list((out / "masks").rglob("*.png"))), "no image is begun and left"
    assert not list((out / "_work").rglob("tmp/*"))
    again = subprocess.run(command(source, out, "--json"), capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["labelled"] == said["total"] - said["ok"]
    assert tree(out) == expected


def _wait_for(condition, child):
    ends = time.monotonic() + LONG_S
    while not condition():
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < ends
        time.sleep(0.002)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_killed_and_run_again(command, started, tmp_path, many, share):
    kill_at(command, started, tmp_path / "out", many, share)


@pytest.mark.reliability
@pytest.mark.parametrize("seed", range(20))
def test_r22_killed_at_random_points(command, started, tmp_path, many, seed):
    """Several times in a row, wherever it happens to be."""
    rng = np.random.default_rng(seed)
    for share in np.sort(rng.uniform(0, 1.05, size=3)):
        kill_at(command, started, tmp_path / "out", many, float(share), finish=False)
    subprocess.run(command(many[0], tmp_path / "out", "--json"), capture_output=True, check=True)
    assert tree(tmp_path / "out") == many[1]


def kill_at(command, started, out, many, share, finish=True):
    """SIGKILL once a share of the masks is there, or, beyond all of them, as it finishes."""
    source, expected = many
    child = started(command(source, out, "--json"))
    n = min(int(share * 300), 299)
    ends = time.monotonic() + LONG_S
    while sum(1 for _ in out.glob("masks/**/*.png")) < n and child.poll() is None and time.monotonic() < ends:
        time.sleep(0.002)
    if share > 0.98:
        time.sleep(float(np.random.default_rng(int(share * 1e6)).uniform(0, 0.2)))
    child.kill()
    child.wait()
    if finish:
        subprocess.run(command(source, out, "--json"), capture_output=True, check=True)
        assert tree(out) == expected


def test_two_workers_on_one_shard(command, started, tmp_path, many):
    source, expected = many
    children = [started(command(source, tmp_path / "out", "--json")) for _ in range(2)]
    for child in children:
        _, complaint = child.communicate(timeout=LONG_S)
        assert child.returncode == 0, complaint
    assert tree(tmp_path / "out") == expected


@pytest.fixture
def small_disk(tmp_path):
    """A function: a file system of its own of so many KiB; skips where that may not be made."""
    mounted = []

    def make(kib, options="rw"):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k,{options}", "none", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a file system cannot be mounted here: that needs root")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(command, many, small_disk):
    source, expected = many
    disk = small_disk(400)
    full = subprocess.run(command(source, disk / "out"), capture_output=True, text=True, check=False)
    assert full.returncode == 1 and "No space left" in full.stderr and "run the same command again" in full.stderr
    assert "Traceback" not in full.stderr
    masks = {path: data for path, data in tree(disk / "out").items() if path.startswith("masks/")}
    assert masks and all(expected[path] == data for path, data in masks.items()), "no mask is half-written"
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    subprocess.run(command(source, disk / "out", "--json"), capture_output=True, check=True)
    assert tree(disk / "out") == expected


def test_a_read_only_output(photos, command, small_disk):
    said = subprocess.run(command(photos, small_disk(64, "ro") / "out"), capture_output=True, text=True, check=False)
    assert said.returncode == 1 and "Read-only file system" in said.stderr and "Traceback" not in said.stderr


def test_a_server_that_goes_away(many, job, tmp_path, process, monkeypatch):
    """Killed while it is asked, and another one in its place: no image is blamed for it."""
    from weakseg.batch import labeller

    source, _ = many
    child, said = process("--log-level", "warning")
    where = ["--endpoint", f"127.0.0.1:{said['port']}"]
    _wait_until_ready(where[1])
    monkeypatch.setattr(labeller, "SERVER_TIMEOUT_S", 2.0)
    threading.Timer(0.3, child.kill).start()
    code, said = job(source, tmp_path / "out", by=where)
    assert code == 1 and "error" in said, said
    monkeypatch.undo()
    _, said = process("--log-level", "warning")
    code, said = job(source, tmp_path / "out", by=["--endpoint", f"127.0.0.1:{said['port']}"])
    assert code == 0, said
    assert (said["ok"], said["failed"]) == (300, 0) and said["labelled"] < 300


def _wait_until_ready(target):
    from weakseg.client import Client

    with Client(target) as client:
        while client.model().state != "ready":
            time.sleep(0.01)


def test_a_bucket(photos, job, tmp_path, undisturbed):
    import fsspec

    fs = fsspec.filesystem("memory")
    for path in photos.rglob("*.*"):
        if path.is_file():
            fs.pipe_file(f"/photos/{path.relative_to(photos).as_posix()}", path.read_bytes())
    try:
        code, said = job("memory://photos", "memory://masks-out")
        assert code == 0 and said["ok"] == 14
        written = {name.removeprefix("/masks-out/"): fs.cat_file(name) for name in fs.find("/masks-out")}
        assert written == undisturbed
        assert job("memory://photos", "memory://masks-out")[1]["labelled"] == 0
    finally:
        fs.rm("/photos", recursive=True)
        fs.rm("/masks-out", recursive=True)


def test_a_bucket_that_fails(photos, job, tmp_path, undisturbed, bucket):
    """Now and then is waited out; for long ends the job, which goes on later."""
    FaultyFileSystem.faults = 3
    assert job(photos, bucket)[0] == 0
    FaultyFileSystem.store.clear()
    original, calls = FaultyFileSystem.pipe_file, []

    def outage(self, path, value, mode="overwrite", **kwargs):
        calls.append(path)
        if len(calls) > 8:
            raise OSError(errno.EIO, "503 Slow Down")
        return original(self, path, value, mode, **kwargs)

    FaultyFileSystem.pipe_file = outage
    try:
        code, said = job(photos, bucket)
        assert code == 1 and said["error"]["reason"] == "STORAGE" and "run the same command again" in str(said)
    finally:
        FaultyFileSystem.pipe_file = original
    assert job(photos, bucket)[0] == 0
    store = open_store(bucket, "s")
    assert all(store.read(path) == data for path, data in undisturbed.items())


def test_progress_and_metrics(photos, command, tmp_path):
    prom = tmp_path / "job.prom"
    said = subprocess.run(
        command(photos, tmp_path / "out", "--metrics-file", str(prom)), capture_output=True, text=True, check=True
    )
    assert "14 of 14 images labelled, 0 failed" in said.stdout
    text = prom.read_text()
    assert 'weakseg_batch_images{status="ok"} 14.0' in text and "weakseg_batch_images_expected 14.0" in text
    assert 'weakseg_batch_stage_seconds{stage="infer"}' in text


def test_formats_may_be_asked_for_later(photos, job, tmp_path):
    out = tmp_path / "out"
    job(photos, out)
    names = ["coco", "coco-polygons", "yolo", "label-studio", "cvat", "labelme", "parquet", "fiftyone"]
    code, said = job(photos, out, "--formats", *names, "--review", "5")
    assert code == 0 and said["labelled"] == 0 and said["written"] == [*names, "review"]
    assert job(photos, out, "--formats", *names, "--review", "5")[1]["written"] == []
    files = tree(out)
    assert len(json.loads(files["coco/instances-00000-of-00001.json"])["images"]) == 14
    assert len(json.loads(files["review/tasks-00000-of-00001.json"])) == 5
    ranking = files["review/ranking-00000-of-00001.csv"].decode().splitlines()
    assert ranking[0] == "image,uncertainty,mask" and len(ranking) == 6
    doubts = [float(line.split(",")[1]) for line in ranking[1:]]
    assert doubts == sorted(doubts, reverse=True)
    assert len(json.loads(files["label_studio/tasks-00000-of-00001.json"])) == 14
    assert files["cvat/annotations-00000-of-00001.xml"].count(b"<image ") == 14
    assert len([path for path in files if path.startswith("yolo/labels/")]) == 14
    at_once = tmp_path / "at-once"
    job(photos, at_once, "--formats", *names, "--review", "5")
    assert tree(at_once) == files


def test_with_a_recipe_it_is_the_stage(capsys):
    from weakseg.cli import main

    assert main(["pseudo-label", "no_such_recipe"]) == 2
    assert "no_such_recipe" in capsys.readouterr().err
