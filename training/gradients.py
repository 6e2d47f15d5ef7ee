"""Activations of a layer and the gradients of every class's score by them: what CAM methods with gradients share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from weakseg.errors import ConfigError

# In evaluation it does nothing: what it gives is what the head sees, in the classifiers of training.models but two: the
# steps of erasing have one each, and scores of class tokens do not go through it.
LAST_LAYER = "dropout"


def class_maps(
    model: nn.Module, images: Tensor, layer: str | None, weigh: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """logits (B, C), and for every class c the map ReLU(weigh(A, dS_c/dA)), (B, C, h, w).

    A (B, K, h, w) is what the layer gives, S_c the logit of c. There is one forward pass, in evaluation mode, whose
    graph begins behind the layer; the classes go backwards over it one by one, each for all images at once: no image's
    score depends on another. Nothing here has a gradient after, and the modes of every module and of autograd are as
    they were, whatever is raised. Works in torch.inference_mode.

    Args:
        model: gives logits, or something that has `logits`. Of a DistributedDataParallel its module is taken.
        layer: name of a module that runs once; of a tuple the first tensor counts. None = LAST_LAYER.
        weigh: function of A and one class's gradient, without either's.
    Raises:
        ConfigError: no such layer; it does not run, or several times; it gives no maps, or no score depends on them.
    """
    model = unwrapped(model)
    name = LAST_LAYER if layer is None else layer
    module = _layer(model, name, chosen=layer is not None)
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        scores, activation = _forward(model, module, name, images.clone() if images.is_inference() else images)
        values, maps = activation.detach(), []
        for c in range(scores.shape[1]):
            one = torch.zeros_like(scores)
            one[:, c] = 1
            again = c + 1 < scores.shape[1]
            gradient = None
            if scores.requires_grad:
                (gradient,) = torch.autograd.grad(scores, activation, one, retain_graph=again, allow_unused=True)
            if gradient is None:
                raise ConfigError(f"no score depends on what layer {name!r} gives: name one on the way to the head")
            maps.append(weigh(values, gradient).relu())
        return scores.detach(), torch.stack(maps, dim=1)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module in a DistributedDataParallel, whose own bookkeeping counts on a backward pass to all parameters."""
    return model.module if isinstance(model, (DistributedDataParallel, DataParallel)) else model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; after it every module is in the mode that it had, which need not be that of its parent."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _forward(model: nn.Module, module: nn.Module, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Scores, and the leaf of their graph; within torch.no_grad, which ends what the hook begins."""
    leaves: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: tuple[Tensor, ...], output: object) -> object:
        first, *others = output if type(output) is tuple else (output,)
        if not isinstance(first, Tensor) or first.ndim != 4:
            got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise ConfigError(f"layer {name!r} gives {got}, expected maps (B, K, h, w): name a convolution or a block")
        leaves.append(first.detach().requires_grad_())
        torch.set_grad_enabled(True)
        followed = leaves[-1].clone()  # a layer behind may work in place, which a leaf does not allow
        return (followed, *others) if type(output) is tuple else followed

    handle = module.register_forward_hook(cut)
    try:
        output = model(images)
    finally:
        handle.remove()
    if len(leaves) != 1:
        raise ConfigError(
            f"layer {name!r} runs {len(leaves)} times in a forward pass, expected once: name the block that it is in"
        )
    return output if isinstance(output, Tensor) else output.logits, leaves[0]


def _layer(model: nn.Module, name: str, chosen: bool) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name not in modules or name == "":
        inner = [other for other in modules if other.endswith(f".{name}")]
        if inner and not chosen:
            raise ConfigError(
                f"the classifier has no layer {name!r}, but parts that have one: choose cam method cam, for maps of "
                f"all parts, or set cam.layer to {inner[0]}, for those of one"
            )
        convolutions = [other for other, module in modules.items() if isinstance(module, nn.Conv2d)]
        near = get_close_matches(name, modules, n=3) or convolutions[-3:]
        raise ConfigError(f"the classifier has no layer {name!r}: set cam.layer to one, such as {', '.join(near)}")
    return modules[name]
