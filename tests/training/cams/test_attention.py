"""Attention of class tokens: closed forms, beside transformers, sizes, what learns and what is exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.training.cams.networks import classifier_for, photographs, transformer
from tests.training.conftest import write_squares
from training import cams, methods
from training.graphs import ClassifierGraph
from training.models import TokenClassifier, build_backbone, load_model, save_model
from training.models.tokens import class_to_patch, patch_to_patch, rollout
from weakseg.cam_file import read_cam
from weakseg.errors import ConfigError
from weakseg.progress import Progress
from weakseg.recipe import BackboneConfig, ClassTokensConfig, OptimConfig, Recipe, TrainConfig
from weakseg.run import run

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'weakseg[hf]'")
attention = cams.get("attention")
MODES = {"per class": {}, "refined": {"refine": True}, "one token": {"per_class": False}}
every_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES)


def classifier(n_classes: int = 4, kind: str = "ViT", patch: int = 16, **options: bool) -> TokenClassifier:
    torch.manual_seed(0)
    return TokenClassifier(build_backbone(transformer(kind, patch)), n_classes, **options).eval()  # type: ignore[arg-type]


def stochastic(n_layers: int, n_batch: int, n: int) -> list[Tensor]:
    """Attention: rows that add up to 1."""
    return [m.softmax(dim=2) for m in torch.randn(n_layers, n_batch, n, n, generator=torch.Generator().manual_seed(0))]


def test_rollout_is_the_product_of_all_layers() -> None:
    layers = stochastic(3, 2, 5)
    whole = torch.eye(5).expand(2, 5, 5)
    for weights in layers:
        whole = (weights + torch.eye(5)) / 2 @ whole  # layer 1 first, so that it is the rightmost factor
    torch.testing.assert_close(rollout(layers, 2), whole[:, :2])
    torch.testing.assert_close(rollout(layers, 2).sum(dim=2), torch.ones(2, 2))


def test_rollout_by_hand() -> None:
    """The token looks at patch 1 in the second layer, which in the first has looked at patch 2."""
    first = torch.tensor([[[1.0, 0, 0], [0, 0, 1], [0, 0, 1]]])
    second = torch.tensor([[[0.0, 1, 0], [0, 1, 0], [0, 0, 1]]])
    assert torch.equal(rollout([first, second], 1), torch.tensor([[[0.5, 0.25, 0.25]]]))


def test_parts_of_attention() -> None:
    layers = stochastic(3, 2, 5)
    torch.testing.assert_close(class_to_patch(layers, 2, 2), (layers[1] + layers[2])[:, :2, 2:] / 2)
    torch.testing.assert_close(class_to_patch(layers, 2, 9), class_to_patch(layers, 2, 3))
    torch.testing.assert_close(patch_to_patch(layers, 2), (layers[0] + layers[1] + layers[2])[:, 2:, 2:] / 3)


@every_mode
@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_maps_are_attention_times_the_patches_cam(kind: str, options: dict[str, bool]) -> None:
    """Cell by cell, from the attention of the network itself."""
    model = classifier(3, kind, **options)
    images = photographs(2, 32, 48)
    with torch.no_grad():
        _, maps = attention.maps(model, images)
        out = model.backbone.network(model.backbone.normalise(images), model.tokens)
        positive = model.head(out.feature_maps[-1]).relu()
    n = 1 if options.get("per_class") is False else 3
    for b in range(2):
        for c in range(3):
            if n == 1:
                seen = rollout(out.attention, 1)[b, 0, 1:]
            else:
                seen = torch.stack([layer[b, c, n:] for layer in out.attention[-3:]]).mean(dim=0)
            expected = seen.reshape(2, 3) * positive[b, c]
            if "refine" in options:
                between = torch.stack([layer[b, n:, n:] for layer in out.attention]).mean(dim=0)
                expected = (between @ expected.flatten()).reshape(2, 3)
            torch.testing.assert_close(maps[b, c], expected)


@every_mode
def test_logits_are_the_tokens(options: dict[str, bool]) -> None:
    model, images = classifier(3, **options), photographs(2, 32, 48)
    with torch.no_grad():
        logits, _ = attention.maps(model, images)
        tokens = model.backbone.network(model.backbone.normalise(images), model.tokens).tokens
        one = model.linear is not None
        expected = model.linear(model.backbone.network.norm(tokens[:, 0])) if one else tokens.mean(dim=2)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_where_attention_is_uniform_maps_are_the_patches_cam(scale: float) -> None:
    """At every scale, and in its units: 1 / T of a token's attention falls on each of the T - n patches."""
    model = classifier(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "query" in name:
                parameter.zero_()
        images = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)
        graphs = [ClassifierGraph(model, method, (scale,)).eval() for method in (attention, cams.get("cam"))]
        ours, plain = (graph(images)["cam"] for graph in graphs)
    patches = 4 * 6 * scale**2
    torch.testing.assert_close(ours, plain * patches / (patches + 3), rtol=1e-4, atol=1e-6)


def test_classes_are_in_no_order() -> None:
    """Tokens and heads in another order give logits and maps in that order."""
    model, order = classifier(4), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        logits, maps = attention.maps(model, photographs())
        model.tokens.copy_(model.tokens[order])
        model.head.weight.copy_(model.head.weight[order])
        turned_logits, turned_maps = attention.maps(model, photographs())
    torch.testing.assert_close(turned_logits, logits[:, order], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(turned_maps, maps[:, order], rtol=1e-4, atol=1e-7)


@every_mode
@pytest.mark.parametrize("patch", [16, 14, 8])
@pytest.mark.parametrize("size", [(48, 64), (67, 45), (1, 1), (9, 130)])
def test_images_of_any_size(options: dict[str, bool], patch: int, size: tuple[int, int]) -> None:
    model = classifier(2, patch=patch, **options)
    with torch.no_grad():
        logits, maps = attention.maps(model, photographs(1, *size))
    stride = 8 if patch == 8 else 16
    assert maps.shape == (1, 2, -(-size[0] // stride), -(-size[1] // stride)) and logits.shape == (1, 2)
    assert torch.isfinite(maps).all() and maps.min() >= 0


def test_a_size_that_is_no_multiple_is_padded_with_the_mean_colour() -> None:
    model, images = classifier(2), photographs(1, 40, 50)
    padded = model.backbone.mean.expand(1, 3, 48, 64).clone()
    padded[:, :, :40, :50] = images
    with torch.no_grad():
        for a, b in zip(model(images), model(padded), strict=True):
            torch.testing.assert_close(a, b)


def test_no_gradient_flows_from_the_maps() -> None:
    model = classifier(2)
    assert not model(photographs()).attention.requires_grad


@every_mode
def test_everything_learns(options: dict[str, bool]) -> None:
    model = classifier(3, **options).train()
    batch = type("Batch", (), {"images": photographs(), "tags": torch.tensor([[1.0, 0, 0], [0, 1, 1]])})
    parts = methods.get("class_tokens").losses_of(TrainConfig())(model, batch, None)  # type: ignore[arg-type]
    assert set(parts) == {"classification", "patches"}
    torch.stack(list(parts.values())).sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"backbone.network.network.embeddings.cls_token"}, "the classifier's tokens are in its place"


@every_mode
def test_it_is_stored_and_read_again(tmp_path: Path, options: dict[str, bool]) -> None:
    model = classifier(2, **options)
    save_model(tmp_path / "m.pt", model, kind="classifier", classes=("a", "b"), method="class_tokens")
    again, _ = load_model(tmp_path / "m.pt", kind="classifier")
    with torch.no_grad():
        for a, b in zip(model(photographs()), again(photographs()), strict=True):
            assert torch.equal(a, b)


def test_class_tokens_start_around_the_networks_own() -> None:
    model = classifier(50)
    own = model.backbone.network.class_token()
    assert 0.01 < float((model.tokens.detach() - own).std()) < 0.03
    assert torch.equal(classifier(50, per_class=False).tokens[0], own)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: TokenClassifier(build_backbone(BackboneConfig(name="small_resnet")), 2),
            "class tokens need a ViT or DeiT of Hugging Face, got the backbone small_resnet: set --backbone.name hf:",
        ),
        (lambda: TokenClassifier(build_backbone(transformer()), 2, layers=0), "layers must be at least 1, got 0"),
        (lambda: classifier(per_class=False, refine=True), "refine is for maps of a token for each class"),
        (
            lambda: attention.maps(classifier_for("cam", 2), photographs()),
            "cam method attention needs a classifier of train method class_tokens",
        ),
    ],
)
def test_what_it_cannot_be(build: type, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_gradients_of_a_classifier_by_tokens_need_a_layer() -> None:
    """Its logits come from the tokens, not from what its CAM head sees; a layer of tokens is no map."""
    model, grad_cam = classifier(2), cams.get("grad_cam")
    layers = next(name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 2)
    with pytest.raises(ConfigError, match="no score depends on what layer 'dropout' gives"):
        grad_cam.maps(model, photographs())
    with pytest.raises(ConfigError, match=r"gives \(2, 14, 16\), expected maps"):
        grad_cam.maps(model, photographs(), layer=f"{layers}.1")
    patches = "backbone.network.network.embeddings.patch_embeddings.projection"
    _, maps = grad_cam.maps(model, photographs(), layer=patches)
    assert maps.shape == (2, 2, 3, 4)


def recipe_of(recipe: Recipe, epochs: int, per_class: bool = True) -> Recipe:
    optim = OptimConfig(
        epochs=epochs,
        batch_size=8,
        crop_px=64,
        long_side_px=(64, 64),
        optimizer="adamw",
        lr=1e-3,
        new_lr_scale=1.0,
        weight_decay=1e-2,
        warmup_steps=20,
        workers=0,
    )
    train = TrainConfig("class_tokens", 0.0, optim, class_tokens=ClassTokensConfig(per_class=per_class))
    return replace(
        recipe,
        backbone=replace(transformer(patch=8), freeze_bn=False),
        train=train,
        cam=replace(recipe.cam, method="attention", scales=(1.0,)),
        pseudo_label=replace(recipe.pseudo_label, crf=None),
        train_seg=None,
    )


@pytest.mark.parametrize("per_class", [True, False])
def test_through_the_stages(recipe: Recipe, tmp_path: Path, per_class: bool) -> None:
    done = run(recipe_of(recipe, 1, per_class), tmp_path, last="cam", progress=Progress("silent"))
    assert done["cam"]["n_images"] == 12
    files = [read_cam(path) for path in (tmp_path / "cam").rglob("*.npz")]
    assert all(file.cam.shape == (len(file.classes), 12, 16) and np.isfinite(file.cam).all() for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("per_class", [True, False])
def test_class_tokens_learn_where_objects_are(recipe: Recipe, tmp_path: Path, per_class: bool) -> None:
    """From image-level labels and random weights; the patches' CAM beside it does not."""
    write_squares(tmp_path / "squares", n=64)
    changed = recipe_of(recipe, 60, per_class)
    changed = replace(changed, data=replace(changed.data, root=str(tmp_path / "squares")))
    best = {}
    for method in ("cam", "attention"):
        method_of = replace(changed, cam=replace(changed.cam, method=method))
        run(method_of, tmp_path / "run", last="evaluate", progress=Progress("silent"))
        best[method] = json.loads((tmp_path / "run/evaluate/cam-val.json").read_text())["oracle"]["miou"]
    assert best["attention"] > max(0.6, best["cam"] + 0.1)


@pytest.mark.slow
@every_mode
@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_maps_are_the_same_in_onnx(tmp_path: Path, kind: str, options: dict[str, bool]) -> None:
    from export.onnx_from_torch import onnx_from_graphs
    from export.parity import check

    graph = ClassifierGraph(classifier(3, kind, **options), attention, (0.5, 1.0), flip=True).eval()
    path = tmp_path / "cam.onnx"
    path.write_bytes(onnx_from_graphs({"cam": graph})["cam"])
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((80, 112), (67, 45))]
    assert all(difference.ok for difference in check("classifier_multiscale", graph, path, images).differences)
