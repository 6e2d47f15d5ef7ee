from pathlib import Path

import pytest

from weakseg import cpu


def tree(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    files = {"proc/self/cgroup": cgroup, **files}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(cpu, "affinity", lambda: 8)


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 8),
        (
            "0::/a/b\n",
            {
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            },
            3,
        ),
        ("0::/not/mounted\n", {"sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        (
            "3:cpuset:/\n2:cpu,cpuacct:/\n",
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "500000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            5,
        ),
        (
            "2:cpu:/\n",
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_quota(tmp_path, cgroup, files, cores):
    assert cpu.usable_cpus(tree(tmp_path, cgroup, files)) == cores


def test_a_quota_of_less_than_a_core_is_told_as_it_is(tmp_path):
    assert cpu.cpu_quota(tree(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"})) == 0.5
    assert cpu.cpu_quota(tree(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"})) is None


def test_without_cgroups(tmp_path):
    assert cpu.usable_cpus(tmp_path) == 8


def test_here():
    assert cpu.usable_cpus() >= 1
