import json
import multiprocessing
import resource

import pytest

from weakseg.files import atomic_folder, write_bytes_atomic, write_json_atomic


def test_bytes_and_folders_on_the_way_are_written(tmp_path):
    write_bytes_atomic(tmp_path / "a/b/c.bin", b"123")
    assert (tmp_path / "a/b/c.bin").read_bytes() == b"123"
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["c.bin"]


def test_json_keeps_order_and_refuses_nan(tmp_path):
    write_json_atomic(tmp_path / "x.json", {"b": 1, "a": [None, 0.5]})
    assert (tmp_path / "x.json").read_text() == json.dumps({"b": 1, "a": [None, 0.5]}, indent=2) + "\n"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(tmp_path / "x.json", float("nan"))
    assert json.loads((tmp_path / "x.json").read_text())["b"] == 1


def write_too_much(path, result):
    """In a process that may write 1000 bytes to a file: the system refuses the rest, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_bytes_atomic(path, b"x" * 5000)
    except OSError as error:
        result.put(type(error).__name__)


def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    write_bytes_atomic(path, b"old")
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    process = context.Process(target=write_too_much, args=(path, result))
    process.start()
    process.join(30)
    assert result.get() == "OSError"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "made") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made/a").read_text() == "1"


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path):
    for name in ("old", "new"):
        with atomic_folder(tmp_path / "made") as folder:
            (folder / name).write_text("")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_folder_that_fails_leaves_what_was_there(tmp_path):
    with atomic_folder(tmp_path / "made") as folder:
        (folder / "old").write_text("")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "made") as folder:
        (folder / "new").write_text(str(1 / 0))
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["old"]
