"""ViT and DeiT of transformers as a network of HfBackbone: maps of every layer, class tokens, attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weakseg.errors import ConfigError

MODEL_TYPES = ("vit", "deit")
MEAN_OF_HEADS = "weakseg_mean_of_heads"  # an attention of transformers by that name, see `mean_of_heads`


class VitOutput(NamedTuple):
    """Of a grid of h x w patches and n class tokens, T = n + h w.

    feature_maps: (B, D, h, w) after each layer, behind the final norm. tokens: (B, n, D), the class tokens after the
    last layer, before that norm. attention: (B, T, T) of each layer, the mean over its heads, rows add up to 1; ()
    where it is not kept.
    """

    feature_maps: list[Tensor]
    tokens: Tensor
    attention: tuple[Tensor, ...]


class VitNetwork(nn.Module):
    """A ViTModel or DeiTModel, for images of any size and any number of class tokens.

    forward: x (B, 3, H, W) normalised, sides multiples of the patch; position embeddings are interpolated to its grid.
        tokens (n, D), positions included, take the place of the network's own, which are one, and for DeiT one for
        distillation.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.config = network, network.config
        embeddings = network.embeddings
        self.n_tokens = embeddings.position_embeddings.shape[1] - embeddings.patch_embeddings.num_patches
        self.keeps_attention = False

    def keep_attention(self) -> None:
        """From now on `attention` is part of the output: of every head, it would be as many times as much to hold."""
        try:
            from transformers import AttentionInterface
        except ImportError as error:
            raise ConfigError("class tokens need transformers 4.51 or later: pip install -U transformers") from error
        AttentionInterface.register(MEAN_OF_HEADS, mean_of_heads)
        self.config._attn_implementation = MEAN_OF_HEADS
        self.keeps_attention = True

    def class_token(self) -> Tensor:
        """(D,) the network's own, its position included."""
        embeddings = self.network.embeddings
        return (embeddings.cls_token[0, 0] + embeddings.position_embeddings[0, 0]).detach()  # type: ignore[no-any-return]

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> VitOutput:
        with self._hooks(tokens) as last:
            out = self.network(
                x,
                interpolate_pos_encoding=True,
                output_hidden_states=True,
                output_attentions=self.keeps_attention,
            )
        n = self.n_tokens if tokens is None else tokens.shape[0]
        patch = self.config.patch_size
        grid = (x.shape[2] // patch, x.shape[3] // patch)
        layers = [*(self.norm(hidden) for hidden in out.hidden_states[1:-1]), out.last_hidden_state]
        by_channel = [layer[:, n:].transpose(1, 2) for layer in layers]
        maps = [layer.reshape(*layer.shape[:2], *grid) for layer in by_channel]
        return VitOutput(maps, last[0][:, :n], tuple(out.attentions) if self.keeps_attention else ())

    @contextmanager
    def _hooks(self, tokens: Tensor | None) -> Iterator[list[Tensor]]:
        """Behind the embeddings, tokens take their place; gives what the final norm is given.

        Whether that is the last of `hidden_states`, or what it makes of it, depends on transformers' version.
        """
        last: list[Tensor] = []

        def replaced(_module: nn.Module, _inputs: object, embedded: Tensor) -> Tensor:
            if tokens is None:
                return embedded
            return torch.cat([tokens.expand(embedded.shape[0], -1, -1), embedded[:, self.n_tokens :]], dim=1)

        def seen(_module: nn.Module, inputs: tuple[Tensor]) -> None:
            last.append(inputs[0])

        handles = [
            self.network.embeddings.register_forward_hook(replaced),
            self.network.layernorm.register_forward_pre_hook(seen),
        ]
        try:
            yield last
        finally:
            for handle in handles:
                handle.remove()

    def norm(self, x: Tensor) -> Tensor:
        """The final norm of tokens (…, D)."""
        return self.network.layernorm(x)  # type: ignore[no-any-return]


def mean_of_heads(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Attention as transformers calls it: (B, T, heads, d) and, in place of every head's weights, their mean (B, T, T).

    query, key, value: (B, heads, T, d).
    """
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1)
    dropped = nn.functional.dropout(weights, dropout, module.training)
    return (dropped @ value).transpose(1, 2), weights.mean(dim=1)
