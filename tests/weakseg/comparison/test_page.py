"""The report of a comparison and its picture."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.weakseg.comparison.conftest import write_maps, write_scores
from weakseg.comparison import page
from weakseg.comparison.comparison import Comparison
from weakseg.comparison.jobs import Terms
from weakseg.datasets import Sample
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.report import panel

SILENT = Progress("silent")


@pytest.fixture
def comparison(squares: Recipe, recipe_file: Path, tmp_path: Path) -> Comparison:
    root, terms = tmp_path / "comparison", Terms(str(recipe_file))
    for name in ("cam", "seam"):
        write_maps(root / f"{name}-0", squares)
        for split, miou in (("train", 0.4), ("val", 0.3)):
            write_scores(root / f"{name}-0", split, cam=miou, cam_crf=0.5 if name == "seam" else 0.2)
    return Comparison(root, terms, terms.base(), {"cam": [0], "seam": [0], "acol": [0]}, {"acol": {0: "<no> room"}})


class Tags(HTMLParser):
    """Checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open += [] if tag in ("meta", "img", "input", "line", "polyline") else [tag]

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(comparison: Comparison) -> None:
    page.write(comparison, SILENT)
    text = (comparison.root / "report.html").read_text()
    Tags(text)
    assert not re.search(r'(src|href)="(?!data:)', text) and "@import" not in text
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Failed",
        "Split train",
        "Split val",
        "mIoU of the CAMs by threshold",
        "Maps",
        "What is equal, and what is chosen where",
    ]
    assert "acol, seed 0: &lt;no&gt; room" in text
    assert text.count("<polyline") == 2, "a line for each method that has maps"
    assert '<td class="best" data-v="0.5">50.0</td>' in text and '<td data-v="0.2">20.0</td>' in text


def test_the_picture_has_a_row_for_each_method_that_has_maps(comparison: Comparison) -> None:
    page.write(comparison, SILENT)
    data = (comparison.root / "panel.webp").read_bytes()
    assert len(data) < panel.LIMIT_BYTES
    with Image.open(io.BytesIO(data)) as picture:
        rows = (picture.height - panel.HEADER_PX) / (panel.CELL_PX[1] + panel.GAP_PX)
        columns = (picture.width - panel.LABEL_PX) / (panel.CELL_PX[0] + panel.GAP_PX)
        assert (rows, columns) == (2 + 2, 3), "one of the four images of val shows nothing"
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    top = panel.HEADER_PX + panel.CELL_PX[1] + panel.GAP_PX
    truth = pixels[top : top + panel.CELL_PX[1], panel.LABEL_PX :]
    image = pixels[panel.HEADER_PX : panel.HEADER_PX + panel.CELL_PX[1], panel.LABEL_PX :]
    assert np.abs(truth - image).max() > 60, "the true mask lies over it"


def test_nothing_to_show_yet(comparison: Comparison) -> None:
    empty = replace(comparison, root=comparison.root / "empty")
    page.write(empty, SILENT)
    assert [path.name for path in empty.root.iterdir()] == ["report.html"]
    assert "Maps" not in re.findall(r"<h2>(.*?)</h2>", (empty.root / "report.html").read_text())


def sample(i: int, *tags: int) -> Sample:
    return Sample(id=f"{i:03d}", image=Path("none"), tags=tags)


def test_images_are_the_first_of_each_class_in_turn() -> None:
    samples = [sample(0, 1), sample(1, 1), sample(2), sample(3, 0, 1), sample(4, 0), sample(5, 2), sample(6, 1)]
    assert [one.id for one in panel.spread(samples, [0, 1, 2, 9], 6)] == ["003", "000", "005", "004", "001", "006"]
    assert [one.id for one in panel.spread(samples, [0, 1, 2], 2)] == ["003", "000"]


@given(st.lists(st.lists(st.integers(0, 9), max_size=3, unique=True), max_size=12), st.integers(1, 6))
def test_no_image_is_shown_twice_and_classes_are_spread(tags: list[list[int]], n: int) -> None:
    samples = [sample(i, *of_image) for i, of_image in enumerate(tags)]
    shown = panel.spread(samples, range(10), n)
    ids = [one.id for one in shown]
    assert len(ids) == len(set(ids)) == min(n, sum(bool(of_image) for of_image in tags))
    assert shown == panel.spread(samples, range(10), n)
    there = {c for of_image in tags for c in of_image}
    if len(there) <= n:
        assert {c for one in shown for c in one.tags} == there
