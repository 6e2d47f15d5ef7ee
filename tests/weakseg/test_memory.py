import pytest

from weakseg.errors import DataError
from weakseg.memory import available_bytes, lacks_memory, limit_bytes

GIB = 2**30
HOST = {"proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable:   {32 * 2**20} kB\n"}


def v1(folder: str, limit: int, usage: int) -> dict[str, str]:
    base = f"sys/fs/cgroup/memory{folder}"
    return {f"{base}/memory.limit_in_bytes": f"{limit}\n", f"{base}/memory.usage_in_bytes": f"{usage}\n"}


def v2(folder: str, limit: object, usage: int) -> dict[str, str]:
    base = f"sys/fs/cgroup{folder}"
    return {f"{base}/memory.max": f"{limit}\n", f"{base}/memory.current": f"{usage}\n"}


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, None),
        (HOST, 32),
        (HOST | {"proc/self/cgroup": "0::/\n"} | v2("", "max", GIB), 32),
        (HOST | {"proc/self/cgroup": "0::/\n"} | v2("", 4 * GIB, GIB), 3),
        (HOST | {"proc/self/cgroup": "0::/a/b\n"} | v2("/a", 8 * GIB, 6 * GIB) | v2("/a/b", 4 * GIB, GIB), 2),
        (HOST | {"proc/self/cgroup": "0::/not/mounted\n"} | v2("", 4 * GIB, GIB), 3),
        (HOST | {"proc/self/cgroup": "0::/\n"} | v2("", GIB, 2 * GIB), 0),
        (
            HOST
            | {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.stat": f"anon 7\ninactive_file {2 * GIB}\n"}
            | v2("", 4 * GIB, 3 * GIB),
            3,
        ),
        (HOST | {"proc/self/cgroup": "4:memory:/job\n1:cpu:/\n"} | v1("/job", 6 * GIB, GIB), 5),
        (HOST | {"proc/self/cgroup": "4:memory:/\n"} | v1("", 2**63 - 4096, GIB), 32),
        ({"proc/self/cgroup": "0::/\n"} | v2("", 4 * GIB, GIB), 3),
    ],
)
def test_the_tightest_limit_counts(tmp_path, files, gib):
    write(tmp_path, files)
    assert available_bytes(tmp_path) == (None if gib is None else gib * GIB)


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, None),
        (HOST, 64),
        (HOST | {"proc/self/cgroup": "0::/\n"} | v2("", "max", GIB), 64),
        (HOST | {"proc/self/cgroup": "0::/a/b\n"} | v2("/a", 2 * GIB, GIB) | v2("/a/b", 4 * GIB, GIB), 2),
        (HOST | {"proc/self/cgroup": "4:memory:/\n"} | v1("", 2**63 - 4096, GIB), 64),
        ({"proc/self/cgroup": "4:memory:/job\n"} | v1("/job", 6 * GIB, GIB), 6),
    ],
)
def test_the_limit_is_what_the_process_may_take_whatever_is_taken(tmp_path, files, gib):
    write(tmp_path, files)
    assert limit_bytes(tmp_path) == (None if gib is None else gib * GIB)


def test_here():
    found = available_bytes()
    assert found is None or found > 0
    limit = limit_bytes()
    assert limit is None or found is None or limit >= found


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 1"), True),
        (RuntimeError("CUDA failure 2: out of memory"), True),
        (RuntimeError("can't start new thread"), True),
        (raised_from(DataError("damaged"), MemoryError()), True),
        (ValueError("shape"), False),
        (DataError("no class 'out of memory'"), False),  # quotes a client
        (None, False),
    ],
)
def test_lacks_memory(error: Exception | None, expected: bool) -> None:
    assert lacks_memory(error) is expected
