"""Backbones of Hugging Face: tiny random ones, written to a folder as their hub would hand them out."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.models import CamClassifier, DeepLabV3Plus, build_backbone, load_model, save_model
from training.models.backbone import Backbone
from weakseg.errors import ConfigError, WeightsError
from weakseg.recipe import BackboneConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'weakseg[hf]'")
from training.models.hf import four_of  # noqa: E402

PYRAMID = {"depths": [1, 1, 1, 1]}
TRANSFORMER = {"hidden_size": 16, "num_attention_heads": 2}
ARCHITECTURES = {
    "convnext": ("ConvNextConfig", {"hidden_sizes": [8, 16, 24, 32], **PYRAMID}),
    "resnet": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], **PYRAMID}),
    "swin": ("SwinConfig", {"embed_dim": 8, "num_heads": [1, 2, 2, 2], "window_size": 4, **PYRAMID}),
    "pvt_v2": ("PvtV2Config", {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 2], **PYRAMID}),
    "dinov2": ("Dinov2Config", {"num_hidden_layers": 5, "image_size": 56, "patch_size": 14, **TRANSFORMER}),
}


def folder_of(root: Path, name: str) -> BackboneConfig:
    """A folder as `hf:` takes it, with random weights."""
    cls, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    network = transformers.AutoBackbone.from_config(getattr(transformers, cls)(**settings))
    network.save_pretrained(root / name)
    return BackboneConfig(name=f"hf:{root / name}", freeze_stages=0)


def changed(config: BackboneConfig, **changes: object) -> Backbone:
    return build_backbone(replace(config, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("size", [(96, 64), (67, 45)])
def test_five_maps_of_the_stated_strides_and_channels(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    backbone = build_backbone(folder_of(tmp_path, name)).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, *size))
    assert tuple(m.shape[1] for m in maps) == backbone.channels
    assert [tuple(m.shape[2:]) for m in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in backbone.strides]
    assert backbone.strides == ((4, 4, 16, 16, 16) if name == "dinov2" else (4, 4, 8, 16, 16))


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ([4, 8, 16, 32], [0, 1, 2, 3]),
        ([2, 4, 4, 8, 16, 32], [2, 3, 4, 5]),
        ([4, 8, 16], [0, 0, 1, 2]),
        ([16] * 12, [2, 5, 8, 11]),
        ([14] * 5, [1, 2, 3, 4]),
        ([16], [0, 0, 0, 0]),
    ],
)
def test_four_of_many_maps(strides: list[int], expected: list[int]) -> None:
    assert four_of(strides) == expected


@pytest.mark.parametrize("name", ["convnext", "dinov2"])
def test_cells_lie_on_their_pixels(tmp_path: Path, name: str) -> None:
    """A patchify network of strides 32 or 14 answers a vertical edge where it is, also on the grid of stride 16."""
    backbone = build_backbone(folder_of(tmp_path, name)).eval()
    x = torch.zeros(1, 3, 224, 448)
    x[..., 224:] = 255
    with torch.no_grad():
        last = backbone(x)[-1][0].mean(dim=1)  # (K, 28)
    assert last.shape[1] == 28
    changes = (last[:, 1:] - last[:, :-1]).norm(dim=0)
    assert changes.argmax() + 1 == 14


def test_weights_are_the_folders(tmp_path: Path) -> None:
    config = folder_of(tmp_path, "convnext")
    first, second = build_backbone(config), build_backbone(config)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    random = changed(config, weights="random")
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), random.parameters(), strict=True))


def test_a_folder_of_other_weights_lists_what_lacks(tmp_path: Path) -> None:
    config = folder_of(tmp_path, "convnext")
    path = tmp_path / "convnext" / "model.safetensors"
    state = {k: v for k, v in load_file(path).items() if "stages.2" not in k}
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lack \d+ tensors: .*stages\.2"):
        build_backbone(config)


@pytest.mark.parametrize(
    ("name", "n", "frozen_blocks"), [("convnext", 1, 0), ("convnext", 2, 1), ("dinov2", 3, 2), ("swin", 4, 3)]
)
def test_stages_are_the_embedding_and_quarters_of_the_blocks(
    tmp_path: Path, name: str, n: int, frozen_blocks: int
) -> None:
    backbone = changed(folder_of(tmp_path, name), freeze_stages=n)
    blocks = next(m for m in backbone.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 2)
    assert [any(p.requires_grad for p in block.parameters()) for block in blocks] == [
        i >= frozen_blocks for i in range(len(blocks))
    ]
    assert not next(p for k, p in backbone.named_parameters() if "patch_embeddings" in k).requires_grad


def test_everything_can_be_frozen_and_batch_norm_is(tmp_path: Path) -> None:
    config = folder_of(tmp_path, "resnet")
    assert not any(p.requires_grad for p in changed(config, freeze_stages=5).parameters())
    norms = [m for m in build_backbone(config).train().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(m.training or m.weight.requires_grad for m in norms)


@pytest.mark.parametrize("name", ["swin", "dinov2"])
def test_every_block_learns(tmp_path: Path, name: str) -> None:
    model = CamClassifier(build_backbone(folder_of(tmp_path, name)), 3).train()
    model(torch.rand(2, 3, 64, 64) * 255).logits.square().sum().backward()
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 2)
    assert all(p.grad is not None for p in blocks.parameters())


@pytest.mark.parametrize("name", ["convnext", "dinov2"])
def test_a_stored_model_needs_neither_folder_nor_network(tmp_path: Path, name: str) -> None:
    config = folder_of(tmp_path, name)
    model = DeepLabV3Plus(build_backbone(config), 2, width=8).eval()
    save_model(tmp_path / "m.pt", model, kind="segmentation", classes=("a", "b"), method="x")
    shutil.rmtree(tmp_path / name)
    loaded, _ = load_model(tmp_path / "m.pt", kind="segmentation")
    x = torch.rand(1, 3, 32, 48) * 255
    with torch.no_grad():
        torch.testing.assert_close(model(x), loaded(x))
    assert loaded(x).shape == (1, 3, 8, 12)


def test_stride_8_is_refused_where_the_network_has_it_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has a stride of 32 and no dilation: set --backbone.output_stride 16"):
        changed(folder_of(tmp_path, "convnext"), output_stride=8)


def test_weights_of_another_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be None \(its own\) or 'random', got 'imagenet'"):
        changed(folder_of(tmp_path, "convnext"), weights="imagenet")


def test_a_network_that_is_no_backbone(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="bert is not a backbone to transformers"):
        build_backbone(BackboneConfig(name=f"hf:{tmp_path / 'bert'}"))


def test_a_network_for_one_size_of_images(tmp_path: Path) -> None:
    network = transformers.HieraConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
    network.save_pretrained(tmp_path / "hiera")
    with pytest.raises(ConfigError, match="cannot take images of"):
        build_backbone(BackboneConfig(name=f"hf:{tmp_path / 'hiera'}", weights="random"))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot get .*none .*expected an id on huggingface\.co"):
        build_backbone(BackboneConfig(name=f"hf:{tmp_path / 'none'}"))


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"needs transformers: pip install 'weakseg\[hf\]'"):
        build_backbone(BackboneConfig(name="hf:facebook/dinov2-small"))
