from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings

from weakseg.bundle import open_bundle
from weakseg.classes import ClassTable
from weakseg.manifest import Licences, palette_for
from weakseg.model_card import card
from weakseg.recipe import CrfConfig, PseudoLabelConfig

TOY_2 = Path(__file__).parents[1] / "data" / "bundles_of_schema_2"
RECORD = {
    "what": "pseudo_mask",
    "split": "val",
    "tags": "given",
    "threshold": {"t": 0.4296875, "rule": "otsu", "provenance": "no mask seen"},
    "crf": None,
    "scales": [0.5, 1.0],
    "flip": True,
    "n_images": 300,
    "miou": 0.61281,
    "coverage": 0.775,
    "iou": {"background": 0.9, "red": None},
    "scored_classes": ["red"],
}


@pytest.fixture
def manifest():
    return open_bundle(TOY_2).manifest


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_hub_reads_it(manifest):
    """huggingface_hub parses the front matter as the hub does."""
    made = ModelCard(card(replace(manifest, metrics=(RECORD,))))
    assert made.data.library_name == "weakseg"
    assert made.data.pipeline_tag == "image-segmentation"
    assert made.data.model_name == "toy/2"
    [result] = made.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("mean_iou", 0.6128, "val")
    assert result.metric_name == (
        "mIoU of pseudo-masks, tags given, threshold 0.43 (otsu), 4 views, background and 1 classes, "
        "over 77.5 % of the pixels"
    )
    assert made.text.lstrip().startswith("<!-- Made by weakseg")


def test_figures_stand_with_their_conditions(manifest):
    text = card(replace(manifest, metrics=(RECORD,)))
    assert "| pseudo-masks | val | 300 | given | 0.43 (otsu) | 4 | 77.5 | - | 61.3 |" in text
    assert "mIoU is over the background and 1 of the 3 classes: red." in text
    assert "| red | - |" in text


@pytest.mark.parametrize("missing", ["split", "tags", "miou", "what"])
def test_a_figure_without_its_conditions_is_not_quoted(manifest, missing):
    record = {key: value for key, value in RECORD.items() if key != missing}
    text = card(replace(manifest, metrics=(record,)))
    assert "model-index" not in text
    assert "comes without an evaluation" in text


def test_the_fully_supervised_network_is_marked_as_another(manifest):
    record = RECORD | {"what": "segmentation_full", "tags": "none"}
    text = card(replace(manifest, metrics=(record,)))
    assert "| *another network, trained on true masks* |" in text
    assert "is not in this bundle" in text
    assert "model-index" not in text
    assert "By class" not in text


def test_views_that_the_graph_does_not_have(manifest):
    text = card(replace(manifest, metrics=(RECORD | {"what": "segmentation"},)))
    assert "looks at one view: expect a little less" in text
    assert "expect a little less" not in card(manifest)


@pytest.mark.parametrize(
    ("data", "weights", "expected"),
    [
        ("Apache-2.0", "apache-2.0", "apache-2.0"),
        ("Apache-2.0", "MIT", "other"),
        ("research only", "research only", "other"),
        ("unknown", "unknown", "other"),
    ],
)
def test_a_licence_is_named_only_where_there_is_one(manifest, data, weights, expected):
    text = card(replace(manifest, licences=Licences(data, weights)))
    assert front_matter(text)["license"] == expected
    assert f"- licence of the training images: {data}\n" in text


def test_what_must_be_installed(manifest):
    assert '`pip install "weakseg[serve]"`' in card(manifest)
    refined = replace(manifest, pseudo_label=PseudoLabelConfig(crf=CrfConfig()))
    assert '`pip install "weakseg[serve,refine]"`' in card(refined)


def test_classes_that_were_hardly_trained(manifest):
    training = replace(manifest.training, n_images=100, class_frequency={"red": 0.2, "green": 0.19})
    text = card(replace(manifest, training=training))
    assert "Hardly trained, on fewer than 20 images each: green, blue." in text
    assert "brightness" not in card(replace(manifest, training=None))


def test_many_classes_and_no_masks(manifest):
    table = ClassTable(tuple(f"c{i}" for i in range(400)))
    many = replace(manifest, classes=table.names, palette=palette_for(table))
    assert "| … | 100 more, in manifest.json |  |" in card(many)
    assert "| 65535 | IGNORE" in card(many)
    assert "result.heatmaps" in card(replace(manifest, outputs=("cam",)))


def with_text(text):
    """A card in which every free text is this one."""
    plain = open_bundle(TOY_2).manifest
    return card(
        replace(
            plain,
            classes=(text, "green-", "blue-"),
            licences=Licences(text, text),
            metrics=(RECORD | {"split": text, "scored_classes": [text]},),
            parity=({"graph": text, "runtime": text, text: 0.5},),
        )
    )


def structure(text):
    """Headings, and the number of cells of each row of a table."""
    lines = text.split("\n---\n")[1].splitlines()
    return [line if line[0] == "#" else line.replace(r"\|", "").count("|") for line in lines if line[:1] in ("#", "|")]


@settings(max_examples=50)
@given(st.text(min_size=1).filter(str.strip))
def test_no_text_becomes_markup(text):
    """Whatever classes, licences and splits are called: the front matter is YAML, the sections and tables are ours."""
    made = with_text(text)
    assert front_matter(made)["license"] == "other"
    assert structure(made) == structure(with_text("plain"))
