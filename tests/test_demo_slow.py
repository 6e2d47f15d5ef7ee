"""The whole demo on few images for a few steps: every stage is real, none has time to become good."""

import json
from pathlib import Path

import pytest

from weakseg import cli

SHORT = ["--n-train", "24", "--n-val", "12", "--train.optim.epochs", "1", "--train_seg.optim.epochs", "1"]


@pytest.mark.slow
def test_from_nothing_to_served_masks_and_a_report(tmp_path, capsys):
    arguments = ["demo", "--folder", str(tmp_path / "run"), "--data.root", str(tmp_path / "data"), *SHORT, "--json"]
    assert cli.main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["served"]["n_images"] == 12
    assert first["served"]["agreement"] >= 0.999
    assert (tmp_path / "run/report.html").is_file()
    assert (Path(first["bundle"]) / "manifest.json").is_file()

    assert cli.main(arguments) == 0  # nothing is done twice
    again = json.loads(capsys.readouterr().out)
    assert again["stages"] == first["stages"]
