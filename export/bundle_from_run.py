"""Stage `bundle`: what a run trained becomes a model bundle, if the exported graphs compute what torch computes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export import parity
from export.half import emulated
from export.labels_output import with_labels
from export.onnx_from_torch import onnx_from_graphs
from export.precisions import in_precisions
from export.statistics import presence_threshold, training_scores, training_statistics
from training import cams
from training.graphs import MAP_STRIDE, AffinityGraph, ClassifierGraph, SegmentationGraph
from training.models import load_model
from weakseg import bundle
from weakseg.bundle import Bundle
from weakseg.classes import ClassTable
from weakseg.datasets import Dataset, read
from weakseg.environment import git_commit
from weakseg.errors import ConfigError, WeightsError
from weakseg.image import read_image
from weakseg.manifest import (
    AFFINITY,
    CLASSIFIER,
    GRAPH_OUTPUTS,
    MULTISCALE,
    SEGMENTATION,
    CamSettings,
    Graph,
    Licences,
    Manifest,
    OutputKind,
    Precision,
    Provenance,
    palette_for,
)
from weakseg.preprocess import InputPolicy, prepare
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.run_folder import read_evaluations, read_json
from weakseg.threshold import Threshold
from weakseg.tolerance import CAM_MIN_SCORE, HALF_ERROR
from weakseg.version import __version__

PARITY_IMAGES = 3
PARITY_MAX_SIDE = 512  # enough to meet every layer; the multi-scale graph is slow on larger ones


def run(recipe: Recipe, folder: Path, *, stage: str, progress: Progress) -> dict[str, Any]:
    """Writes <folder>/<stage>/<name>/<version>/. `n_images` are those that parity was checked on.

    Where the CAM method cannot be exported there is no bundle, and the summary says why; `export_run` raises.
    """
    reason = why_no_bundle(recipe)
    if reason is not None:
        progress.say(f"bundle: none: {reason}")
        return {"n_images": 0, "bundle": None, "reason": reason}
    return export_run(recipe, folder, folder / stage, progress)


def export_run(recipe: Recipe, folder: Path, models: Path, progress: Progress) -> dict[str, Any]:
    """Export the networks of a run folder to <models>/<name>/<version>/; nothing is left there if that fails.

    Returns:
        {"n_images", "bundle": its folder, "sha256", "mib", "parity": {file: {output: worst difference}}}.
    Raises:
        ParityError: a graph differs from torch by more than its precision may. WeightsError: a network is missing.
        ConfigError: the CAM method cannot be exported. BundleError: the bundle cannot be written.
    """
    train = read(recipe.data, recipe.data.train)
    graphs = trained_graphs(recipe, folder, train.classes)
    progress.say(f"bundle: exporting {', '.join(graphs)}")
    files = onnx_from_graphs(graphs, {"weakseg.model": f"{recipe.export.name}/{recipe.export.version}"})
    manifest = make_manifest(recipe, folder, graphs, train, progress)
    forms = in_precisions(files, recipe.export.precisions, manifest, train, progress)
    if SEGMENTATION in forms:
        forms[SEGMENTATION] = {precision: with_labels(data) for precision, data in forms[SEGMENTATION].items()}
    images = parity_images(read(recipe.data, recipe.evaluate.splits[-1] if recipe.evaluate.splits else train.split))
    progress.say("bundle: comparing torch with the exported graphs")
    reports = gate(graphs, forms, images, recipe)
    made = bundle.write(
        models,
        replace(
            manifest,
            graphs={name: with_variants(graph, name, forms[name]) for name, graph in manifest.graphs.items()},
            parity=tuple(report.record() for report in reports.values()),
        ),
        {file_name(name, precision): data for name, form in forms.items() for precision, data in form.items()},
    )
    return {
        "n_images": len(images),
        "bundle": str(made.folder),
        "sha256": made.sha256,
        "mib": round(_n_bytes(made) / 2**20, 1),
        "parity": {name: report.summary() for name, report in reports.items()},
    }


def why_no_bundle(recipe: Recipe) -> str | None:
    """What keeps the CAM method of a recipe out of a graph, and what to do; None = nothing."""
    method = cams.get(recipe.cam.method)
    if method.EXPORTABLE:
        return None
    return (
        f"cam method {recipe.cam.method} {getattr(method, 'WHY_NOT', 'cannot be exported')}: "
        "set --cam.method to a forward-only one, such as cam"
    )


def trained_graphs(recipe: Recipe, folder: Path, classes: ClassTable) -> dict[str, nn.Module]:
    """{graph name: module in evaluation mode, on the CPU} of the networks that the run has."""
    reason = why_no_bundle(recipe)
    if reason is not None:
        raise ConfigError(reason)
    method = cams.get(recipe.cam.method)
    classifier = _load(folder / "train" / "classifier.pt", "classifier", classes)
    graphs: dict[str, nn.Module] = {CLASSIFIER: ClassifierGraph(classifier, method)}
    if (recipe.cam.scales, recipe.cam.flip) != ((1.0,), False):
        graphs[MULTISCALE] = ClassifierGraph(classifier, method, recipe.cam.scales, recipe.cam.flip)
    if recipe.affinity is not None:
        graphs[AFFINITY] = AffinityGraph(_load(folder / "affinity" / "affinity.pt", "affinity", classes))
    segmentation = folder / "train_seg" / "segmentation.pt"
    if recipe.train_seg is not None and segmentation.is_file():  # the folder may have one of another recipe
        graphs[SEGMENTATION] = SegmentationGraph(_load(segmentation, "segmentation", classes))
    return {name: graph.eval() for name, graph in graphs.items()}


def gate(
    graphs: dict[str, nn.Module],
    forms: dict[str, dict[Precision, bytes]],
    images: Sequence[NDArray[np.uint8]],
    recipe: Recipe,
) -> dict[str, parity.ParityReport]:
    """{file: what it differs from torch by}, before anything is written where it could be served from.

    16 bits are emulated: the graph that a GPU executes as it stands would be widened here.
    """
    reports = {}
    with tempfile.TemporaryDirectory(prefix="weakseg-export-") as temporary:
        for name, form in forms.items():
            for precision, data in form.items():
                path = Path(temporary) / file_name(name, precision)
                path.write_bytes(emulated(data) if precision in HALF_ERROR else data)
                reports[path.name] = parity.check(
                    name,
                    graphs[name],
                    path,
                    images,
                    normalisation=recipe.cam.normalisation,
                    precision=precision,
                    min_score=CAM_MIN_SCORE.get(recipe.cam.method, 0.0),
                )
    return reports


def file_name(graph: str, precision: Precision) -> str:
    return f"{graph}.onnx" if precision == "fp32" else f"{graph}.{precision}.onnx"


def with_variants(graph: Graph, name: str, precisions: Iterable[Precision]) -> Graph:
    return replace(graph, variants={other: file_name(name, other) for other in precisions if other != "fp32"})


def parity_images(dataset: Dataset) -> list[NDArray[np.uint8]]:
    """The first images of different sizes, looked for among a few dozen."""
    found: dict[tuple[int, ...], NDArray[np.uint8]] = {}
    for sample in dataset.samples[:36]:
        image = prepare(read_image(sample.image), InputPolicy(PARITY_MAX_SIDE))
        found.setdefault(image.shape, image)
        if len(found) == PARITY_IMAGES:
            break
    return list(found.values())


def make_manifest(
    recipe: Recipe, folder: Path, graphs: dict[str, nn.Module], train: Dataset, progress: Progress
) -> Manifest:
    """Everything that the run knows about its model; `files` is filled in when the bundle is written."""
    scores = training_scores(train, folder)
    tags = np.stack([sample.tag_vector(len(train.classes)) for sample in train])
    presence = presence_threshold(scores, tags)
    outputs: tuple[OutputKind, ...] = ("cam", "pseudo_mask")
    return Manifest(
        name=recipe.export.name,
        version=recipe.export.version,
        classes=train.classes.names,
        palette=palette_for(train.classes),
        input=InputPolicy(max_side=recipe.export.max_side),
        outputs=(*outputs, "segmentation") if SEGMENTATION in graphs else outputs,
        graphs={
            name: Graph(
                file_name(name, "fp32"),
                GRAPH_OUTPUTS[name],
                stride=int(getattr(graph, "stride", MAP_STRIDE)),
                views=int(getattr(graph, "n_views", 1)),
            )
            for name, graph in graphs.items()
        },
        presence=presence,
        background=Threshold.from_dict(read_json(folder / "pseudo_label" / "threshold.json")),
        pseudo_label=recipe.pseudo_label,
        walk=None if recipe.affinity is None else recipe.affinity.walk,
        cam=CamSettings(recipe.cam.method, recipe.cam.scales, recipe.cam.flip, recipe.cam.normalisation),
        method=recipe.train.method,
        provenance=Provenance(__version__, torch.__version__, git_commit(), recipe.name, recipe.seed),
        licences=Licences(recipe.export.data_licence, recipe.export.weights_licence),
        metrics=tuple(_without_curve(record) for record in read_evaluations(folder)),
        training=training_statistics(train, scores, presence, progress),
    )


def _load(path: Path, kind: str, classes: ClassTable) -> nn.Module:
    model, names = load_model(path, kind=kind)
    if names != classes.names:
        raise WeightsError(
            f"{path} was trained on the classes {', '.join(names)}, the recipe's data has {', '.join(classes.names)}: "
            "export with the data that it was trained on"
        )
    return model


def _without_curve(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "curve"}


def _n_bytes(made: Bundle) -> int:
    return sum(path.stat().st_size for path in made.folder.rglob("*") if path.is_file())
