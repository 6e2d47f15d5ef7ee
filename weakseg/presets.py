"""Published settings by name: `affinity=AFFINITY["seam"]` in a recipe, `--affinity seam` on the command line.

They are for PASCAL VOC 2012, photographs of 500 px. The backgrounds (1 - max)^alpha that go with them are settings of
`pseudo_label` (weakseg.cam.threshold_from_alpha): psa labels of alpha 4 and 32 and a walk of 16, SEAM 4, 24, 6. IRN has
the thresholds .05 and .30 for its labels, and its walk meets a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from weakseg.recipe import AffinityConfig, OptimConfig, Recipe, SeamConfig, WalkConfig

# Wang et al., CVPR 2020, and YudeWang/SEAM train_aff.py, infer_aff.py
_SEAM = AffinityConfig(
    output_stride=8,
    walk=WalkConfig(radius=5, beta=8.0, steps=2**6, band=0.0),
    optim=OptimConfig(
        epochs=8, batch_size=8, crop_px=448, long_side_px=(500, 500), lr=0.01, momentum=0.0, weight_decay=5e-4
    ),
)
# Ahn & Kwak, CVPR 2018, and jiwoon-ahn/psa train_aff.py, infer_aff.py
_PSA = replace(_SEAM, walk=replace(_SEAM.walk, steps=2**8), optim=replace(_SEAM.optim, lr=0.1))
# Ahn, Cho & Kwak, CVPR 2019, and jiwoon-ahn/irn run_sample.py, train_irn.py; its backbone is a ResNet-50. The authors
# average the boundaries of image and mirror image, which is not done here.
_IRN = AffinityConfig(
    network="irn",
    output_stride=16,
    train_radius=10,
    walk=WalkConfig(radius=5, beta=10.0, steps=2**8, background=0.25, band=0.0),
    optim=OptimConfig(
        epochs=3,
        batch_size=32,
        crop_px=512,
        long_side_px=(250, 750),  # 0.5 to 1.5 times the 500 pixels of a photograph
        jitter=0.0,
        lr=0.1,
        momentum=0.0,
        weight_decay=1e-4,
        new_lr_scale=1.0,
    ),
)

AFFINITY: Mapping[str, AffinityConfig] = {"default": AffinityConfig(), "seam": _SEAM, "psa": _PSA, "irn": _IRN}


def _seam(recipe: Recipe) -> Recipe:
    """Refined maps of less than the image's size are blots; plain maps gain from them."""
    scales = tuple(scale for scale in recipe.cam.scales if scale >= 1) or recipe.cam.scales
    return replace(
        recipe,
        train=replace(recipe.train, seam=SeamConfig(rescale=0.5)),
        cam=replace(recipe.cam, method="pcm", scales=scales, normalisation="minmax"),
    )


def _class_tokens(recipe: Recipe) -> Recipe:
    return replace(recipe, cam=replace(recipe.cam, method="attention"))


def _seeds(section: str) -> Callable[[Recipe], Recipe]:
    """A network from scratch has no weights that the learning rate could cost it."""

    def preset(recipe: Recipe) -> Recipe:
        if recipe.backbone.weights is not None:
            return recipe
        config = replace(getattr(recipe.train, section), lr_scale=1.0)
        return replace(recipe, train=replace(recipe.train, **{section: config}))

    return preset


# What a training method wants of a recipe beside its name.
_METHODS: Mapping[str, Callable[[Recipe], Recipe]] = {
    "seam": _seam,
    "class_tokens": _class_tokens,
    "sec": _seeds("sec"),
    "dsrg": _seeds("dsrg"),
    "guided": _seeds("guided"),
}


def with_method(recipe: Recipe, method: str) -> Recipe:
    """The recipe with another training method, or several (`seam+hide_and_seek`), and the maps that go with it."""
    for part in method.split("+"):
        if part in _METHODS:
            recipe = _METHODS[part](recipe)
    name = f"{recipe.name}-{method}"
    export = replace(recipe.export, name=f"{recipe.export.name}-{method.replace('+', '-').replace('_', '-')}")
    return replace(recipe, name=name, train=replace(recipe.train, method=method), export=export)
