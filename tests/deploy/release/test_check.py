"""Version, CHANGELOG, tag and what deploy/ names agree: here, and in trees where they do not."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def check():
    """deploy/release/check.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("release_check", ROOT / "deploy" / "release" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    """A function that writes a tree: version, headings of the CHANGELOG, a line of a manifest."""

    def write(version, headings, named=None):
        (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n')
        (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n" + "".join(f"## {one}\n\n- x\n\n" for one in headings))
        (tmp_path / "deploy").mkdir()
        (tmp_path / "deploy" / "job.yaml").write_text(f"{named or f'image: weakseg/batch:{version}'}\n")
        return tmp_path

    return write


def test_this_repository_agrees(check):
    assert check.problems(ROOT, []) == []


@pytest.mark.parametrize(
    ("version", "headings", "tags"),
    [
        ("0.1.0", ["Unreleased"], []),
        ("0.1.0", ["Unreleased", "0.1.0 - 2026-11-29"], ["v0.1.0"]),
        ("0.10.0", ["Unreleased", "0.10.0 - 2027-01-01", "0.10.0rc1 - 2026-12-24", "0.9.1 - 2026-12-01"], ["v0.10.0"]),
    ],
)
def test_what_agrees(check, tree, version, headings, tags):
    assert check.problems(tree(version, headings), tags) == []


@pytest.mark.parametrize(
    ("version", "headings", "tags", "named", "problem"),
    [
        ("0.1", ["Unreleased"], [], None, "expected a version such as 0.2.0 or 0.2.0rc1, got 0.1"),
        ("0.1.0", ["0.1.0 - 2026-11-29"], [], None, "expected the first heading to be Unreleased, got 0.1.0"),
        ("0.1.0", [], [], None, "expected the first heading to be Unreleased, got none"),
        ("0.1.0", ["Unreleased", "0.1.0"], [], None, "expected a heading such as 0.2.0 - 2026-11-29, got 0.1.0"),
        ("0.2.0", ["Unreleased", "0.1.0 - 2026-11-29"], [], None, "newest release is 0.1.0, pyproject.toml says 0.2.0"),
        (
            "0.9.0",
            ["Unreleased", "0.9.0 - 2026-11-29", "0.10.0 - 2026-11-28"],
            [],
            None,
            "newest first, each once, got 0.9.0, 0.10.0",
        ),
        ("0.1.0", ["Unreleased"], ["v0.1.0"], None, "v0.1.0 needs a heading `0.1.0 - <date>`"),
        (
            "0.1.0",
            ["Unreleased", "0.1.0 - 2026-11-29"],
            ["v0.2.0"],
            None,
            "the tag is v0.2.0, pyproject.toml says 0.1.0",
        ),
        ("0.1.0", ["Unreleased"], [], "image: weakseg/batch:0.0.9", "deploy/job.yaml: names version 0.0.9"),
        ("0.1.0", ["Unreleased"], [], "image: weakseg/batch:latest", "deploy/job.yaml: names version latest"),
        ("0.1.0", ["Unreleased"], [], '    newTag: "0.0.9"', "deploy/job.yaml: names version 0.0.9"),
        ("0.1.0", ["Unreleased"], [], 'app.kubernetes.io/version: "0.0.9"', "deploy/job.yaml: names version 0.0.9"),
        ("0.1.0", ["Unreleased"], [], "version: 0.0.9", "deploy/job.yaml: names version 0.0.9"),
        ("0.1.0", ["Unreleased"], [], 'appVersion: "0.0.9"', "deploy/job.yaml: names version 0.0.9"),
    ],
)
def test_what_does_not(check, tree, version, headings, tags, named, problem):
    (found,) = check.problems(tree(version, headings, named), tags)
    assert problem in found
