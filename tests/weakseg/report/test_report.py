import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weakseg import cli
from weakseg.classes import ClassTable
from weakseg.files import write_json_atomic
from weakseg.progress import Progress
from weakseg.recipe import DataConfig, EvaluateConfig, Recipe
from weakseg.report import recipe_of, run, write_report
from weakseg.report.page import duration

CLASSES = ClassTable(("<cat>", "dog"))
SILENT = Progress("silent")
VOID = {"meta", "img", "input", "line", "polyline"}


class Page(HTMLParser):
    """Checks that tags close in order and collects what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.headings, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["style"], ["script"]):
            return
        self.text += data + " "
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


@pytest.fixture
def made(tmp_path, fill_run):
    """(recipe, run folder) of 16 photographs with masks; `<cat>` needs escaping."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "SegmentationClass").mkdir()
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    truth, labels = {"train": {}, "val": {}}, {}
    for i in range(16):
        image_id, tags = f"image{i:02d}", (0,) if i % 3 else (0, 1)
        mask = np.zeros((48, 64), np.uint8)
        mask[10:30, 8 + i : 30 + i] = 1
        if 1 in tags:
            mask[25:45, 40:60] = 2
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(root / f"JPEGImages/{image_id}.png")
        Image.fromarray(mask).save(root / f"SegmentationClass/{image_id}.png")
        truth["val" if i < 14 else "train"][image_id] = (tags, mask)
        labels[image_id] = {"labels": [CLASSES.names[c] for c in tags]}
    for split, images in truth.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(images) + "\n")
    (root / "labels.json").write_text(json.dumps({"classes": list(CLASSES.names), "images": labels}))
    data = DataConfig(root=str(root), tags="labels.json")
    recipe = Recipe(name="test <run>", data=data, evaluate=EvaluateConfig(splits=("train", "val")))
    folder = tmp_path / "run"
    fill_run(folder, recipe, CLASSES, truth)
    return recipe, folder


def test_the_page_is_whole_and_needs_nothing_else(made):
    recipe, folder = made
    assert run(recipe, folder, stage="report", progress=SILENT) == {"n_images": 12}
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.headings == [
        "How good it is",
        "What comes out",
        "Class by class",
        "What each refiner changed",
        "Threshold and training",
        "Where the time went",
        "Every figure, with how it was made",
        "Recipe and environment",
    ]
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "url(http" not in text
    assert "@import" not in text
    assert len(page.images) == 12 * 4
    assert all(image["alt"] and image["src"].startswith("data:image/webp;base64,") for image in page.images)


def test_names_are_escaped(made):
    recipe, folder = made
    write_report(recipe, folder, folder / "report.html", SILENT)
    text = (folder / "report.html").read_text()
    assert "<cat>" not in text.replace("&lt;cat&gt;", "")
    assert "<h1>test &lt;run&gt;</h1>" in text


def test_figures_say_split_tags_and_rule_and_mark_the_oracle(made):
    recipe, folder = made
    write_report(recipe, folder, folder / "report.html", SILENT)
    record = json.loads((folder / "evaluate/cam-val.json").read_text())
    words = " ".join(Page((folder / "report.html").read_text()).text.split())
    card = words[words.index("How good it is") : words.index("CAM + CRF")]
    train = json.loads((folder / "evaluate/cam-train.json").read_text())["miou"]
    assert f"CAM {100 * record['miou']:.1f} train {100 * train:.1f} tags given t = 0.30, fixed oracle" in card
    weak, full = (
        json.loads((folder / f"evaluate/{what}-val.json").read_text())["miou"]
        for what in ("segmentation", "segmentation_full")
    )
    assert f"reaches {weak / full:.2f} of full supervision" in words


def test_what_a_refiner_changed(made):
    recipe, folder = made
    path = folder / "evaluate/refiner-crf-val.json"
    record = json.loads(path.read_text())
    assert record["warning"] is None
    write_report(recipe, folder, folder / "report.html", SILENT)
    page = Page((folder / "report.html").read_text())
    words = " ".join(page.text.split())
    changed = words[words.index("What each refiner changed") : words.index("Threshold and training")]
    before, after = (f"{100 * record['foreground'][when]:.1f}" for when in ("before", "after"))
    miou = f"{100 * record['miou']['before']:.1f} → {100 * record['miou']['after']:.1f}"
    assert f"the foreground goes from {before} to {after} %, mIoU from {miou.replace(' → ', ' to ')}" in changed
    assert f"crf val 14 {100 * record['agreement']:.1f} {before} → {after} 0 of 14 " in changed
    assert changed.strip().endswith(miou) and "Warning" not in page.headings


def test_a_refiner_that_harms_is_the_first_thing_said(made):
    recipe, folder = made
    path = folder / "evaluate/refiner-crf-val.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"miou": None, "warning": "the refiner <crf> lowers"}))
    write_report(recipe, folder, folder / "report.html", SILENT)
    text = (folder / "report.html").read_text()
    assert Page(text).headings[0] == "Warning"
    assert "<p>The refiner &lt;crf&gt; lowers.</p>" in text


def test_the_threshold_is_shown_with_its_provenance(made):
    recipe, folder = made
    write_report(recipe, folder, folder / "report.html", SILENT)
    assert "White line: t = 0.30, fixed: set in the recipe." in (folder / "report.html").read_text()


def test_images_are_ranked_by_their_own_iou(made):
    recipe, folder = made
    write_report(recipe, folder, folder / "report.html", SILENT)
    text = (folder / "report.html").read_text()
    words = " ".join(Page(text).text.split())
    shown = [float(value) for value in re.findall(r"IoU (\d+\.\d)", words[: words.index("Class by class")])]
    assert len(shown) == 12
    assert shown == sorted(shown, reverse=True)
    assert re.findall(r'<h3 class="group">(.*?)</h3>', text) == ["best", "around the median", "worst"]
    assert "of 14 images" in words


def test_a_perfect_prediction_has_iou_100_and_comes_first(made):
    recipe, folder = made
    best = folder / "evaluate/segmentation/val/image05.png"
    best.write_bytes((Path(recipe.data.root) / "SegmentationClass/image05.png").read_bytes())
    write_report(recipe, folder, folder / "report.html", SILENT)
    words = " ".join(Page((folder / "report.html").read_text()).text.split())
    row = words[words.index(" best ") :]
    assert "image05 &lt;cat&gt; IoU 100.0" in row.replace("<cat>", "&lt;cat&gt;")


def test_without_true_masks_it_shows_what_there_is(made, tmp_path):
    recipe, folder = made
    for path in (folder / "evaluate").glob("*.json"):
        path.unlink()
    blind = replace(recipe, data=replace(recipe.data, masks=str(tmp_path / "none")))
    assert write_report(blind, folder, folder / "report.html", SILENT) == 12
    page = Page((folder / "report.html").read_text())
    assert len(page.images) == 12 * 3
    assert "How good it is" not in page.headings
    assert "12 of 14 images, evenly spaced" in page.text


def test_a_run_that_has_just_begun_has_a_report(made, tmp_path):
    recipe, _ = made
    assert write_report(recipe, tmp_path / "empty", tmp_path / "report.html", SILENT) == 12
    assert Page((tmp_path / "report.html").read_text()).headings == ["What comes out", "Recipe and environment"]


def test_a_stage_that_had_nothing_to_do_took_no_time(made):
    recipe, folder = made
    done = {"key": "k", "seconds": 0.0, "cpu_seconds": 0.001, "n_images": 0, "images_per_s": None, "summary": {}}
    write_json_atomic(folder / "bundle/done.json", done)
    run(recipe, folder, stage="report", progress=SILENT)
    assert "<h2>Where the time went</h2>" in (folder / "report.html").read_text()


def test_the_verb_reads_the_recipe_from_the_folder(made, tmp_path, capsys):
    recipe, folder = made
    assert recipe_of(folder) == recipe
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "page.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "page.html"), "n_images": 12}
    assert (tmp_path / "page.html").is_file()


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "expected a run folder with config.json" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "said"), [(8.44, "8.4 s"), (61, "1 min 1 s"), (3599.7, "1 h 0 min"), (3900, "1 h 5 min")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said
