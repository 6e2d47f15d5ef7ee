"""The stages of a run in order, and the key that says whether a finished one still holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from weakseg.datasets import read
from weakseg.datasets.truth import masks_fingerprint
from weakseg.errors import ConfigError
from weakseg.masks.corrections import fingerprint
from weakseg.recipe import Recipe, SegConfig, WalkConfig

SCHEMA = 1  # raise it when a stage computes something else from the same recipe: finished stages then run again
WITHOUT_EFFECT = {"workers", "checkpoint_every_s", "compile", "pcm_mib"}  # fields that change how, not what
# A field that is added to a recipe is left out of keys while it has the value given here, with which everything is as
# it was before the field came: what finished then still holds.
ADDED_LATER: Mapping[str, Mapping[str, Any]] = {
    "OptimConfig": {"precision": "float32", "clip_norm": None},
    "ThresholdConfig": {"area": 0.3},
    "CrfConfig": {"resolution": "full", "early_stop": False, "backend": "lattice"},
    "PseudoLabelConfig": {"band_above": None, "soft": False},
    "SegConfig": {"network": "deeplab_v3plus", "rounds": 1, "sure": 0.8, "corrections": None, "prohibitive": False},
    "WalkConfig": {"background": None},
    "AffinityConfig": {"network": "affinitynet", "train_radius": None},
    "EvaluateConfig": {"seg_crf": None},
}


@dataclass(frozen=True)
class Stage:
    """module: has `run(recipe, folder, *, stage, progress) -> summary`; named, so that weakseg does not import it.

    inputs: stages whose results it reads.
    settings: what of the recipe it depends on, beyond its inputs.
    data: the splits whose images or tags it reads. truth: whether it opens true masks.
    parallel: whether every process takes part, where there are several.
    """

    module: str
    inputs: tuple[str, ...]
    settings: Callable[[Recipe], Any]
    data: Callable[[Recipe], tuple[str, ...]] = lambda _: ()
    truth: Callable[[Recipe], bool] = lambda _: False
    parallel: bool = False


def all_splits(recipe: Recipe) -> tuple[str, ...]:
    """The training split first, then the scored ones, each once."""
    return tuple(dict.fromkeys([recipe.data.train, *recipe.evaluate.splits]))


def _train_split(recipe: Recipe) -> tuple[str, ...]:
    return (recipe.data.train,)


def _train_settings(recipe: Recipe) -> Any:
    """Of the sections of methods only those of the methods in use, which have the methods' names."""
    train = recipe.train
    sections = {name for name, value in vars(train).items() if is_dataclass(value)} - {
        "optim",
        *train.method.split("+"),
    }
    used = {name: _saliency_by_content(name, value) for name, value in vars(train).items() if name not in sections}
    return [recipe.backbone, used]


def _saliency_by_content(name: str, section: Any) -> Any:
    """A method's section with what is in its folder of saliency maps, if it has one, in place of the folder's name."""
    saliency = getattr(section, "saliency", None)
    if saliency is None or saliency.folder is None:
        return section
    if not Path(saliency.folder).is_dir():
        raise ConfigError(f"train.{name}.saliency.folder: expected a folder of grey PNGs, got {saliency.folder!r}")
    return replace(section, saliency=replace(saliency, folder=fingerprint(Path(saliency.folder))))


def _cam_settings(recipe: Recipe) -> Any:
    """A layer was added later: where none is named, keys are as they were."""
    layer = [] if recipe.cam.layer is None else [recipe.cam.layer]
    return [recipe.cam.method, recipe.cam.scales, recipe.cam.flip, *layer]


def _tuned(recipe: Recipe) -> bool:
    return recipe.pseudo_label.threshold.rule == "validation_split"


def _pseudo_label_settings(recipe: Recipe) -> Any:
    tuning = [recipe.data.tune, recipe.data.scored_classes] if _tuned(recipe) else []
    return [recipe.pseudo_label, recipe.cam.normalisation, *tuning]


def _train_seg_settings(recipe: Recipe) -> Any:
    """With several rounds a network relabels the training images by the views of the evaluation.

    Corrections count by their content.
    """
    config = recipe.train_seg
    if config is not None and config.corrections is not None:
        config = replace(config, corrections=fingerprint(Path(config.corrections)))
    again = config is not None and config.rounds > 1
    return [config, *([recipe.evaluate.seg_scales, recipe.evaluate.seg_flip] if again else [])]


STAGES: Mapping[str, Stage] = {
    "train": Stage("training.train_classifier", (), _train_settings, _train_split, parallel=True),
    "cam": Stage("training.make_cams", ("train",), _cam_settings, all_splits),
    "pseudo_label": Stage("training.pseudo_label", ("cam",), _pseudo_label_settings, truth=_tuned),
    "affinity": Stage(
        "training.train_affinity",
        ("train", "pseudo_label"),
        lambda r: [r.affinity and replace(r.affinity, walk=WalkConfig(radius=r.affinity.walk.radius))],
        _train_split,
        parallel=True,
    ),
    "random_walk": Stage(
        "training.walk",
        ("cam", "pseudo_label", "affinity"),
        lambda r: [r.affinity and r.affinity.walk, r.cam.normalisation],
        all_splits,
    ),
    "train_seg": Stage(
        "training.train_segmentation",
        ("train", "pseudo_label", "random_walk"),
        _train_seg_settings,
        truth=lambda r: r.train_seg is not None and r.train_seg.supervision == "full",
        parallel=True,
    ),
    "train_seg_full": Stage(
        "training.train_segmentation",
        ("train",),
        lambda r: [
            r.train_seg and replace(r.train_seg, rounds=1, sure=SegConfig().sure, corrections=None, prohibitive=False)
        ],
        _train_split,
        truth=lambda _: True,
        parallel=True,
    ),
    "evaluate": Stage(
        "training.evaluate",
        ("cam", "pseudo_label", "random_walk", "train_seg", "train_seg_full"),
        lambda r: [r.evaluate, r.data.scored_classes],
        all_splits,
        truth=lambda _: True,
    ),
    "bundle": Stage(
        "export.bundle_from_run",
        ("train", "pseudo_label", "random_walk", "train_seg", "evaluate"),
        lambda r: [r.name, r.export],
    ),
    "report": Stage("weakseg.report", ("evaluate", "bundle"), lambda r: [r.name]),
}


def mask_stage(recipe: Recipe) -> str:
    """The stage whose pseudo-masks the segmentation network learns from (run_folder.mask_path)."""
    return "pseudo_label" if recipe.affinity is None else "random_walk"


def plan(recipe: Recipe) -> list[str]:
    """Names of the recipe's stages, in order.

    Raises:
        ConfigError: an upper bound of a segmentation network that is left out.
    """
    if recipe.upper_bound and recipe.train_seg is None:
        raise ConfigError(
            "upper_bound trains a twin of the segmentation network, and train_seg is none, so there is no such "
            "network: set --train_seg default, or --upper_bound False"
        )
    left_out = set() if recipe.upper_bound else {"train_seg_full"}
    if recipe.affinity is None:
        left_out |= {"affinity", "random_walk"}
    if recipe.train_seg is None:
        left_out |= {"train_seg", "train_seg_full"}
    return [name for name in STAGES if name not in left_out]


def stage_keys(recipe: Recipe) -> dict[str, str]:
    """{stage: sha256} over its settings, the seed, its data and the keys of its inputs: equal keys, equal results.

    Raises:
        DatasetError: the data cannot be read; every image is looked at (its size), none is decoded.
    """
    splits = {split: _data_fingerprint(recipe, split) for split in all_splits(recipe)}
    masks = masks_fingerprint(recipe.data, all_splits(recipe))
    weights = _file_hash(recipe.backbone.weights)
    keys: dict[str, str] = {}
    for name in plan(recipe):
        stage = STAGES[name]
        keys[name] = _sha256(
            {
                "schema": SCHEMA,
                "stage": name,
                "seed": recipe.seed,
                "settings": effective(stage.settings(recipe)),
                "weights": weights,
                "data": [splits[split] for split in stage.data(recipe)],
                "masks": masks if stage.truth(recipe) else None,
                "inputs": [keys[other] for other in stage.inputs if other in keys],
            }
        )
    return keys


def _data_fingerprint(recipe: Recipe, split: str) -> str:
    dataset = read(recipe.data, split)
    samples = [[sample.id, sample.tags, sample.image.stat().st_size] for sample in dataset]
    return _sha256([split, dataset.classes.names, samples])


def _file_hash(name: str | None) -> str | None:
    """Content of a weights file; a name such as `imagenet` stands for itself."""
    if name is None or not Path(name).is_file():
        return name
    with Path(name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def effective(value: Any) -> Any:
    """Settings as plain values: what has no effect on results is left out, and so is what ADDED_LATER says."""
    if is_dataclass(value) and not isinstance(value, type):
        later = ADDED_LATER.get(type(value).__name__, {})
        settings = {field.name: getattr(value, field.name) for field in fields(value)}
        return effective({k: v for k, v in settings.items() if k not in later or v != later[k]})
    if isinstance(value, dict):
        return {key: effective(item) for key, item in value.items() if key not in WITHOUT_EFFECT}
    if isinstance(value, (list, tuple)):
        return [effective(item) for item in value]
    return value


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
