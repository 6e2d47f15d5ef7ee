"""Do version, CHANGELOG, tag and what deploy/ names agree? `python deploy/release/check.py [TAG]`.

Without a tag, that of the commit that is checked out, if it has one. Standard library only: it runs before anything is
installed. Exit code 1 and a line for each disagreement.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.compile(r"\d+\.\d+\.\d+(?:rc\d+)?")
HEADING = re.compile(rf"({VERSION.pattern}) - (\d{{4}}-\d{{2}}-\d{{2}})")
# Ours: of an image, of kustomize's tag of one, of objects' labels, of the chart.
NAMED = re.compile(
    r"(?:weakseg/(?:serve-cpu|serve-cpu-crf|serve-gpu|train|batch):"
    r"|newTag: |app\.kubernetes\.io/version: |^version: |^appVersion: )\"?(\w[\w.-]*\w)",
    re.MULTILINE,
)


def problems(root: Path, tags: list[str]) -> list[str]:
    """What does not agree, in words. tags: `v0.1.0` of the commit; [] = it is no release yet."""
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    found = []
    if not VERSION.fullmatch(version):
        found.append(f"pyproject.toml: expected a version such as 0.2.0 or 0.2.0rc1, got {version}")
    headings = re.findall(r"^## (.+)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    if headings[:1] != ["Unreleased"]:
        found.append(f"CHANGELOG.md: expected the first heading to be Unreleased, got {(headings or ['none'])[0]}")
    released = []
    for heading in headings[1:]:
        match = HEADING.fullmatch(heading)
        if match is None:
            found.append(f"CHANGELOG.md: expected a heading such as 0.2.0 - 2026-11-29, got {heading}")
        else:
            released.append(match[1])
    if released and released[0] != version:
        found.append(f"CHANGELOG.md: its newest release is {released[0]}, pyproject.toml says {version}")
    if released != sorted(set(released), key=order, reverse=True):
        found.append(f"CHANGELOG.md: releases must come newest first, each once, got {', '.join(released)}")
    for tag in tags:
        if tag != f"v{version}":
            found.append(f"the tag is {tag}, pyproject.toml says {version}: expected v{version}")
        elif released[:1] != [version]:
            found.append(f"CHANGELOG.md: {tag} needs a heading `{version} - <date>` with what was Unreleased")
    for path in sorted([*root.glob("deploy/**/*.y*ml"), *root.glob("compose.y*ml"), *root.glob("docs/*.md")]):
        others = sorted(set(NAMED.findall(path.read_text())) - {version})
        where = path.relative_to(root)
        found += [f"{where}: names version {other}, pyproject.toml says {version}" for other in others]
    return found


def order(version: str) -> tuple[float, ...]:
    """Numbers as numbers, and a release after its candidates."""
    numbers = [float(number) for number in re.findall(r"\d+", version)]
    return (*numbers, float("inf"))[:4]


def main() -> int:
    tags = sys.argv[1:]
    if not tags:
        command = ["git", "-C", str(ROOT), "tag", "--points-at", "HEAD", "v*"]
        tags = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    found = problems(ROOT, tags)
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
