"""Figures of runs, their means over seeds, and the table."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.weakseg.comparison.conftest import write_costs, write_scores
from weakseg.classes import ClassTable
from weakseg.comparison import tables
from weakseg.comparison.comparison import Comparison, some
from weakseg.comparison.figures import mean_of, over_seeds, read_figures, summary
from weakseg.comparison.jobs import Terms
from weakseg.files import write_json_atomic
from weakseg.recipe import PseudoLabelConfig, Recipe
from weakseg.scoring import scores


@pytest.fixture
def comparison(squares: Recipe, recipe_file: Path, tmp_path: Path) -> Comparison:
    """Two seeds of cam, one of seam with a network and one that failed, and acol of which nothing is known."""
    root, terms = tmp_path / "comparison", Terms(str(recipe_file))
    for seed, miou in ((0, 0.40), (1, 0.44)):
        write_scores(root / f"cam-{seed}", "train", cam=miou, cam_crf=miou + 0.02)
        write_scores(root / f"cam-{seed}", "val", cam=miou - 0.1, cam_crf=0.5)
        write_costs(root / f"cam-{seed}", 100.0 * (seed + 1), 500.0)
    write_scores(root / "seam-1", "train", cam=0.5, cam_crf=0.6)
    write_scores(root / "seam-1", "val", cam=0.45, cam_crf=0.4)
    write_scores(root / "seam-1-segmentation", "val", cam=0.45, cam_crf=0.4, segmentation=0.55)
    write_costs(root / "seam-1", 500.0, 600.0)
    write_json_atomic(root / "seam-1/cam/done.json", {"key": "k", "cpu_seconds": 30.0, "n_images": 60})
    seeds = {"cam": [0, 1], "seam": [0, 1], "acol": [0]}
    errors = {"seam": {0: "no | room"}, "acol": {0: "killed by SIGKILL"}}
    return Comparison(root, terms, terms.base(), seeds, errors, left_out=["class_tokens is left out: it needs a ViT"])


def test_mean_and_spread_are_over_the_seeds_that_are_there(comparison: Comparison) -> None:
    found = comparison.summaries()
    cam, seam = found["cam"][0], found["seam"][0]
    assert cam["train"]["cam"].mean == pytest.approx(0.42)
    assert cam["train"]["cam"].sd == pytest.approx(0.04 / np.sqrt(2))
    assert (seam["val"]["cam"].sd, seam["val"]["cam"].n) == (None, 1)
    assert seam["val"]["segmentation"].mean == 0.55 and "segmentation" not in seam["train"]
    assert cam["train"]["fp"].mean == pytest.approx(0.2) and cam["train"]["fn"].mean == pytest.approx(0.15)
    assert "ece" not in cam["train"], "records of before calibration was counted have none"
    assert found["acol"] == ({}, {})


def test_costs_are_multiples_of_the_same_seed(comparison: Comparison) -> None:
    costs = comparison.summaries()["seam"][1]
    assert costs["train_cpu_ratio"].mean == pytest.approx(500 / 200), "seed 1 of cam took 200 s"
    assert costs["train_peak_ratio"].mean == pytest.approx(1.2)
    assert costs["cam_cpu_seconds"].mean == pytest.approx(0.5)
    write_costs(comparison.root / "seam-1", None, 600.0)
    assert "train_cpu_ratio" not in comparison.summaries()["seam"][1], "of a resumed training nothing is said"


def test_calibration_is_read_where_it_is(tmp_path: Path) -> None:
    write_scores(tmp_path, "val", cam=0.5)
    path = tmp_path / "evaluate/cam-val.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ece": 0.07, "brier": None}))
    found = read_figures(tmp_path, tmp_path / "none", tmp_path)
    assert found.splits["val"]["ece"] == 0.07 and "brier" not in found.splits["val"]


@given(hnp.arrays(np.int64, (4, 5), elements=st.integers(0, 50)))
def test_the_three_shares_sum_to_one(matrix: np.ndarray) -> None:
    record = scores(matrix).to_dict(ClassTable(("cat", "dog", "cow")))
    if record["miou"] is not None:
        parts = [record["miou"], mean_of(record["fp"]), mean_of(record["fn"])]
        assert sum(part or 0.0 for part in parts) == pytest.approx(1)


def test_nothing_has_no_mean() -> None:
    assert summary([]) is None and over_seeds([]) == ({}, {}) and mean_of({"cat": None}) is None


def test_the_table(comparison: Comparison) -> None:
    train, val, costs = tables.tables(comparison)
    assert train.header == ["method", "seeds", "CAM", "CAM + CRF", "too much", "missed", "boundary F"]
    assert train.rows[0] == ["cam", "2", "42.0 ± 2.8", "44.0 ± 2.8", "20.0 ± 0.0", "15.0 ± 0.0", "50.0 ± 0.0"]
    assert val.rows[1] == ["seam", "1", "45.0", "40.0", "55.0", "20.0", "15.0", "50.0"]
    assert val.rows[2] == ["acol", "0", *"------"]
    assert costs.rows[1] == ["seam", "1", "2.50", "1.20", "500", "600", "0.50"]
    text = tables.as_text(comparison)
    assert "failed: acol, seed 0: killed by SIGKILL" in text and "class_tokens is left out" in text


def test_markdown_has_as_many_cells_in_every_line(comparison: Comparison) -> None:
    comparison.seeds["a|b"] = [0]
    parts = [part for part in tables.as_markdown(comparison).split("\n\n") if part.startswith("|")]
    assert len(parts) == 3
    for part in parts:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in part.splitlines()}) == 1


def test_the_best_are_chosen_on_the_training_split(comparison: Comparison) -> None:
    for name, on_train, on_val in (("a", 0.9, 0.1), ("b", 0.8, 0.2), ("c", 0.1, 0.99)):
        comparison.seeds[name] = [0]
        write_scores(comparison.root / f"{name}-0", "train", cam=1 - on_train, cam_crf=on_train)
        write_scores(comparison.root / f"{name}-0", "val", cam=on_val, cam_crf=on_val)
    assert some(comparison) == ["cam", "seam", "a", "b"]
    comparison.base = replace(comparison.base, pseudo_label=PseudoLabelConfig(crf=None))
    assert some(comparison) == ["cam", "seam", "c"], "without a CRF by the maps themselves, of which seam's are second"
