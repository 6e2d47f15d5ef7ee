"""Runs beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weakseg.cli import main


def write_run(folder: Path, **miou: float | None) -> str:
    (folder / "evaluate").mkdir(parents=True)
    for what, value in miou.items():
        record = {"what": what, "split": "val", "miou": value, "boundary_f": 0.5}
        (folder / f"evaluate/{what}-val.json").write_text(json.dumps(record))
    return str(folder)


def test_a_row_a_run_a_column_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / "a", cam=0.4, segmentation=0.5), write_run(tmp_path / "b", cam=0.45)]
    assert main(["compare", *runs]) == 0
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines() if line.strip(" -"))
    assert header[-2:] == ["cam", "segmentation"]
    assert [row[-2:] for row in rows] == [["40.0", "50.0"], ["45.0", "-"]]


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", cam=0.4)
    assert main(["compare", run, "--metric", "boundary_f", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == {run: {"cam": 0.5}}


def test_a_run_without_that_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", write_run(tmp_path / "a", cam=0.4), "--split", "test"]) == 2
    assert "has no evaluation of the split 'test'" in capsys.readouterr().err
