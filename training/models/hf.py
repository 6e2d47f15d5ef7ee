"""Any `AutoBackbone` of Hugging Face transformers, ViT and DeiT as a backbone: `hf:<id on the hub or local folder>`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.backbone import Backbone
from training.models.layers import CANVAS, freeze
from training.models.vit import MODEL_TYPES, VitNetwork
from weakseg.errors import ConfigError, WeightsError
from weakseg.recipe import HF_PREFIX, BackboneConfig

PROBE = (224, 448)  # pixels; multiples of the patches and strides in use, and not square
EARLY = 4  # stride of the first two maps


class HfBackbone(Backbone):
    """Four of the network's maps, from early to late, as the five that every backbone has.

    A pyramid (ConvNeXt, Swin, ResNet) gives the last map of each stride, a plain transformer (DINOv2, ViT) the maps
    after each quarter of its layers. The first of the four, brought to stride 4, is both map 1 and map 2. Maps coarser
    than the output stride, and those of a stride of 14, are resampled to it: cells lie where they do in other
    backbones.

    config.weights: None = those of the id or folder, "random" = none; none either where `pretrained` is False.
    architecture: the network's own settings, as `self.architecture` had them; None = those of the id or folder.
    """

    architecture: dict[str, Any]

    def __init__(self, config: BackboneConfig, pretrained: bool, architecture: Mapping[str, Any] | None = None) -> None:
        super().__init__(config)
        if config.weights not in (None, "random"):
            raise ConfigError(
                f"backbone.weights of {config.name} must be None (its own) or 'random', got {config.weights!r}: "
                "for weights of yours give their folder as hf:<folder>"
            )
        name = config.name.removeprefix(HF_PREFIX)
        self.network = _network(name, pretrained and config.weights is None, architecture)
        self.architecture = self.network.config.to_dict()
        shapes = self._probe()
        picked = four_of([stride for _, stride in shapes])
        self._own = [(i, shapes[i][1]) for i in picked]  # index and stride of the four maps
        self._multiple = self._own[-1][1]
        if config.output_stride < min(self._multiple, CANVAS):
            raise ConfigError(
                f"{config.name} has a stride of {self._multiple} and no dilation: set --backbone.output_stride 16, "
                "or take resnet50 or resnet38d for a stride of 8"
            )
        late = (own if config.output_stride % own == 0 else config.output_stride for _, own in self._own[1:])
        self.strides = (EARLY, EARLY, *late)
        self.channels = tuple(shapes[i][0] for i in (picked[0], *picked))

    def _probe(self) -> list[tuple[int, int]]:
        """(channels, stride) of each map."""
        try:
            with torch.no_grad():
                maps = self.network.eval()(torch.zeros(1, 3, *PROBE)).feature_maps
        except Exception as error:  # of any type, the network is not ours
            raise ConfigError(f"{self.config.name} cannot take images of {PROBE} pixels: {error}") from error
        return [(m.shape[1], PROBE[0] // m.shape[2]) for m in maps]

    def freeze_parts(self) -> None:
        """As every backbone; stage 1 is what lies before the blocks, stages 2 to 5 are a quarter of the blocks each."""
        n = self.config.freeze_stages
        if self.config.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    freeze(module)
        if n == 5:
            freeze(self)
        if n in (0, 5):
            return
        blocks = next((m for m in self.network.modules() if isinstance(m, nn.ModuleList) and len(m) > 2), None)
        if blocks is None:
            raise ConfigError(f"{self.config.name} has no list of blocks: set --backbone.freeze_stages 0 or 5")
        inside = {id(p) for p in blocks.parameters()}
        for parameter in takewhile(lambda p: id(p) not in inside, self.network.parameters()):
            parameter.requires_grad_(False)
        freeze(blocks[: len(blocks) * (n - 1) // 4])

    def features(self, x: Tensor) -> list[Tensor]:
        maps = self.network(self.padded(x)).feature_maps
        parts = [self.on_grid(maps[i], k, x) for k, (i, _) in enumerate(self._own, 1)]
        return [parts[0], *parts]

    def padded(self, x: Tensor) -> Tensor:
        """With zeros, the mean colour, at the bottom and right: whole cells of the network's and of ours."""
        down, right = (_canvas(size, self._multiple) - size for size in x.shape[2:])
        return F.pad(x, (0, right, 0, down))

    def on_grid(self, maps: Tensor, k: int, x: Tensor) -> Tensor:
        """Maps of the padded x, on the network's grid that map k has, brought to the grid of ours for x."""
        return _at_stride(maps, self._own[k - 1][1], self.strides[k], x.shape[2], x.shape[3])


def four_of(strides: list[int]) -> list[int]:
    """Indices of four maps: the last at each of the coarsest strides; where fewer than three differ, every quarter."""
    last = sorted({stride: i for i, stride in enumerate(strides)}.values())
    if len(last) < 3:
        return [-(-len(strides) * k // 4) - 1 for k in (1, 2, 3, 4)]
    return [*last[:1] * (4 - len(last)), *last[-4:]]


def _canvas(size: int, multiple: int) -> int:
    """The next whole number of cells, at the network's stride, that covers whole cells of ours."""
    return _cells(_cells(size, CANVAS) * CANVAS, multiple) * multiple


def _cells(size: int, stride: int) -> int:
    return (size + stride - 1) // stride  # not -(-size // stride): ONNX divides towards zero


def _at_stride(x: Tensor, own: int, stride: int, height: int, width: int) -> Tensor:
    """Maps of one stride on the grid of another: ceil(H/stride) x ceil(W/stride) cells, half-pixel bilinear."""
    if own != stride:
        x = F.interpolate(x, scale_factor=own / stride, mode="bilinear", align_corners=False)
    return x[:, :, : _cells(height, stride), : _cells(width, stride)]


def _network(name: str, pretrained: bool, architecture: Mapping[str, Any] | None) -> Any:
    """The transformers model with every stage as an output, in float32."""
    try:
        from transformers import AutoBackbone, AutoConfig
        from transformers import logging as hf_logging
    except ImportError as error:
        raise ConfigError(f"backbone {HF_PREFIX}{name} needs transformers: pip install 'weakseg[hf]'") from error
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # it reports the norms below as missing
    try:
        config = AutoConfig.for_model(**architecture) if architecture else AutoConfig.from_pretrained(name)
        if config.model_type in MODEL_TYPES:
            return _vit(name, config, pretrained)
        config.out_features = [stage for stage in config.stage_names if stage != "stem"]
        network = AutoBackbone.from_config(config)
        if not pretrained:
            return network.float()
        # By the network's own class: AutoBackbone.from_pretrained of transformers 5 takes no local folders.
        return _with_weights(type(network), name, config)
    except OSError as error:
        raise WeightsError(
            f"cannot get {name} ({_first_line(error)}): expected an id on huggingface.co, and network, "
            "or a local folder with config.json and model.safetensors"
        ) from error
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{HF_PREFIX}{name} is not a backbone to transformers: {_first_line(error)}") from error
    finally:
        hf_logging.set_verbosity(verbosity)


def _vit(name: str, config: Any, pretrained: bool) -> VitNetwork:
    """These have no AutoBackbone; what AutoModel makes of them has the parts of one."""
    from transformers import AutoModel

    if pretrained:
        return VitNetwork(_with_weights(AutoModel, name, config, add_pooling_layer=False))
    return VitNetwork(AutoModel.from_config(config, add_pooling_layer=False).float())


def _with_weights(cls: Any, name: str, config: Any, **options: Any) -> Any:
    network, report = cls.from_pretrained(name, config=config, output_loading_info=True, **options)
    # Norms behind the stages exist in backbones alone; a classifier's file does not have them.
    missing = [key for key in report["missing_keys"] if "norm" not in key]
    if missing:
        raise WeightsError(f"the weights of {name} lack {len(missing)} tensors: {', '.join(sorted(missing)[:8])}")
    return network.float()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
