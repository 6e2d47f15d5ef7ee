"""Files that are whole or absent, in a folder and in a bucket; faults of a bucket."""

import errno
import os
import threading

import pytest

from tests.batch import FaultyFileSystem
from weakseg.batch.store import ATTEMPTS, WORK, LocalStore, ObjectStore, open_store
from weakseg.errors import StorageError, UsageError


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path, bucket):
    return open_store(str(tmp_path / "out") if request.param == "folder" else bucket, "s")


def test_what_is_written_is_there(store):
    assert store.read("a/b.txt") is None and not store.exists("a/b.txt") and store.names("a") == []
    store.write("a/b.txt", b"one")
    store.write("a/b.txt", b"two")
    store.write("a/c.txt", b"")
    assert store.read("a/b.txt") == b"two" and store.exists("a/b.txt")
    assert store.names("a") == ["b.txt", "c.txt"]
    store.remove("a/b.txt")
    store.remove("a/b.txt")
    assert store.read("a/b.txt") is None
    store.remove("a")
    assert store.names("a") == []


def test_create_keeps_what_is_there(store):
    assert store.create("config.json", b"first")
    assert not store.create("config.json", b"second")
    assert store.read("config.json") == b"first"


def fail_half_way(store, path):
    with store.writing(path) as file:
        file.write(b"c" * 10)
        raise RuntimeError("half way")


def test_a_stream_is_whole_or_absent(store):
    with store.writing("big.bin") as file:
        file.write(b"a" * 10)
        file.write(b"b")
    assert store.read("big.bin") == b"a" * 10 + b"b"
    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way(store, "half.bin")
    assert store.read("half.bin") is None
    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way(store, "big.bin")
    assert store.read("big.bin") == b"a" * 10 + b"b", "what was there stays"


def test_nothing_is_left_behind_in_a_folder(tmp_path):
    store = LocalStore(tmp_path, "s")
    store.write("a.txt", b"1")
    store.create("a.txt", b"2")
    with pytest.raises(KeyError), store.writing("b.txt"):
        raise KeyError
    assert not list((tmp_path / WORK / "s" / "tmp").iterdir())
    store.remove(f"{WORK}/s")
    store.prune(WORK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt"]


def test_another_worker_that_clears_the_scratch_folder_costs_nothing(tmp_path):
    """Two processes of one shard: the first to end removes what both write to."""
    store, other, done = LocalStore(tmp_path, "s"), LocalStore(tmp_path, "s"), threading.Event()

    def clear():
        while not done.wait(0.02):
            other.remove(f"{WORK}/s")

    clearing = threading.Thread(target=clear)
    clearing.start()
    try:
        for i in range(200):
            store.write(f"{i}.txt", str(i).encode())
    finally:
        done.set()
        clearing.join()
    assert all(store.read(f"{i}.txt") == str(i).encode() for i in range(200))


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    store = LocalStore(tmp_path, "s")
    store.write("a.txt", b"before")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write("a.txt", b"after")
    assert store.read("a.txt") == b"before" and not list((tmp_path / WORK / "s" / "tmp").iterdir())


def test_a_bucket_that_fails_now_and_then(bucket):
    store = ObjectStore(bucket)
    FaultyFileSystem.faults = ATTEMPTS - 1
    store.write("a.txt", b"1")
    FaultyFileSystem.faults = ATTEMPTS - 1
    assert store.read("a.txt") == b"1"
    FaultyFileSystem.faults = ATTEMPTS
    with pytest.raises(StorageError, match=r"could not write .*a\.txt in 6 attempts: OSError.*503 Slow Down.*again"):
        store.write("a.txt", b"2")
    assert FaultyFileSystem.faults == 0 and store.read("a.txt") == b"1"


def test_what_says_no_for_good_is_not_asked_again(bucket, monkeypatch):
    calls = []

    def denied(self, path, value, **kwargs):
        calls.append(path)
        raise PermissionError("403")

    monkeypatch.setattr(FaultyFileSystem, "pipe_file", denied)
    with pytest.raises(PermissionError):
        ObjectStore(bucket).write("a.txt", b"1")
    assert len(calls) == 1


def test_an_unknown_protocol():
    with pytest.raises(UsageError, match=r"nothere://x: expected a folder or a URL that fsspec can open"):
        open_store("nothere://x", "s")
