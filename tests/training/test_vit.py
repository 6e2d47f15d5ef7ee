"""ViT and DeiT as backbones: what transformers computes, for images of any size."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.cams.networks import photographs, transformer
from training.models import CamClassifier, build_backbone, load_model, save_model
from training.models.backbone import Backbone
from weakseg.recipe import BackboneConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'weakseg[hf]'")

KINDS = {"ViT": 1, "DeiT": 2}  # class tokens; DeiT's second is for distillation


def classifier_in(folder: Path, kind: str) -> Any:
    """A classifier of transformers as its hub would hand it out."""
    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{kind}Config")(**small, image_size=64, patch_size=16)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForImageClassification")._from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)  # DeiT's tokens and positions start at 0, and attention all but uniform
    model.save_pretrained(folder)
    return model.base_model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (16, 16), (67, 45)])
def test_it_is_transformers_own_network(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    theirs = classifier_in(tmp_path, kind)
    backbone: Any = build_backbone(BackboneConfig(name=f"hf:{tmp_path}", freeze_stages=0)).eval()
    network, n = backbone.network, KINDS[kind]
    assert network.n_tokens == n
    network.keep_attention()
    x = backbone.padded(backbone.normalise(photographs(2, *size)))
    assert x.shape[2] % 16 == x.shape[3] % 16 == 0
    with torch.no_grad():
        ours = network(x)
        wanted = theirs(x, interpolate_pos_encoding=True, output_attentions=True, output_hidden_states=True)
    last = ours.feature_maps[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(last, wanted.last_hidden_state[:, n:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.norm(ours.tokens), wanted.last_hidden_state[:, :n], rtol=1e-4, atol=1e-5)
    assert len(ours.attention) == len(wanted.attentions) == 4
    for mean, heads in zip(ours.attention, wanted.attentions, strict=True):
        torch.testing.assert_close(mean, heads.mean(dim=1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mean.sum(dim=2), torch.ones(mean.shape[:2]))
        assert mean.std() > 0.01, "attention is not uniform"


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_class_token_as_a_token_of_ours(tmp_path: Path, kind: str) -> None:
    """The same result for ViT, which has no other token."""
    classifier_in(tmp_path, kind)
    backbone: Any = build_backbone(BackboneConfig(name=f"hf:{tmp_path}", freeze_stages=0)).eval()
    x = backbone.normalise(photographs(2, 32, 48))
    with torch.no_grad():
        own, ours = backbone.network(x), backbone.network(x, backbone.network.class_token()[None])
        many = backbone.network(x, torch.randn(81, 16))
    assert ours.tokens.shape == (2, 1, 16) and many.tokens.shape == (2, 81, 16)
    assert many.feature_maps[0].shape == own.feature_maps[0].shape == (2, 16, 2, 3)
    same = torch.allclose(ours.feature_maps[-1], own.feature_maps[-1], atol=1e-6)
    assert same == (kind == "ViT")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(96, 64), (67, 45), (1, 1)])
def test_five_maps_of_the_stated_strides_and_channels(kind: str, size: tuple[int, int]) -> None:
    backbone = build_backbone(transformer(kind)).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, *size))
    assert backbone.strides == (4, 4, 16, 16, 16) and backbone.channels == (16,) * 5
    assert [tuple(m.shape[2:]) for m in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in backbone.strides]


def test_a_size_that_is_no_multiple_is_padded_with_the_mean_colour() -> None:
    backbone = build_backbone(transformer()).eval()
    images = photographs(1, 40, 50)
    padded = backbone.mean.expand(1, 3, 48, 64).clone()
    padded[:, :, :40, :50] = images
    with torch.no_grad():
        a, b = backbone(images)[-1], backbone(padded)[-1]
    assert a.shape[2:] == b.shape[2:] == (3, 4)
    torch.testing.assert_close(a, b)


def frozen_layers(backbone: Backbone) -> list[bool]:
    blocks = next(m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) > 2)
    return [not any(p.requires_grad for p in block.parameters()) for block in blocks]


def test_stages_are_the_embedding_and_quarters_of_the_layers() -> None:
    backbone = build_backbone(replace(transformer(), freeze_stages=3))
    assert frozen_layers(backbone) == [True, True, False, False]
    assert not any(p.requires_grad for k, p in backbone.named_parameters() if "embeddings" in k)


def test_every_layer_learns() -> None:
    model = CamClassifier(build_backbone(transformer()), 3).train()
    model(photographs()).logits.square().sum().backward()
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 2)
    # Not every one: a bias of keys is the same for all of them, which softmax takes no notice of.
    assert all(p.grad is not None for p in blocks.parameters())
    assert all(any(p.grad.abs().sum() > 0 for p in block.parameters()) for block in blocks)


def test_a_stored_model_needs_neither_folder_nor_network(tmp_path: Path) -> None:
    classifier_in(tmp_path / "vit", "ViT")
    model = CamClassifier(build_backbone(BackboneConfig(name=f"hf:{tmp_path / 'vit'}", freeze_stages=0)), 2).eval()
    save_model(tmp_path / "m.pt", model, kind="classifier", classes=("a", "b"), method="cam")
    shutil.rmtree(tmp_path / "vit")
    loaded, _ = load_model(tmp_path / "m.pt", kind="classifier")
    with torch.no_grad():
        torch.testing.assert_close(model(photographs()).cam, loaded(photographs()).cam)
