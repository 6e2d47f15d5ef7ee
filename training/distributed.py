"""Several processes train one model: each takes its share of every batch, and gradients are averaged.

Not DistributedDataParallel: its hooks count on one forward pass through a wrapper per backward pass, and a method may
call its model several times a step, or parts of it. Averaging after the backward pass is right for all of them, and
costs only that communication does not overlap with computation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.device import pick_device
from weakseg.errors import TrainingError
from weakseg.progress import Progress

LONGEST_WAIT = timedelta(days=30)  # for the first process, which runs alone between trainings
BUCKET_BYTES = 32 * 2**20


def rank() -> int:
    """0 in the first process, and where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join() -> None:
    """Meet the other processes that torchrun has started."""
    device = pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)


def leave() -> None:
    dist.destroy_process_group()


def tell(word: str | None) -> None:
    """To the processes that `hear`."""
    with _together():
        dist.broadcast_object_list([word], src=0, device=torch.device("cpu"))


def hear() -> str | None:
    """What the first process tells; None also when it is gone, of which it has said why."""
    words: list[str | None] = [None]
    try:
        dist.broadcast_object_list(words, src=0, device=torch.device("cpu"))
    except RuntimeError:
        return None
    return words[0]


def prepare(model: nn.Module, progress: Progress) -> None:
    """Same weights everywhere; batch norm that learns takes its statistics over all processes where it can."""
    if size() == 1:
        return
    model.train()
    learning = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    if next(model.parameters()).device.type == "cuda":
        for name in learning:  # not all at once: frozen ones must stay what `keep_bn_in_eval` looks for
            model.set_submodule(name, nn.SyncBatchNorm.convert_sync_batchnorm(model.get_submodule(name)))
    elif learning:
        progress.say(
            f"warning: {len(learning)} batch norms learn from each process's own images (PyTorch joins them on CUDA "
            "alone); results differ from one process's"
        )
    for tensor in model.state_dict().values():
        whole = tensor.contiguous()  # channels-last ones are not
        with _together():
            dist.broadcast(whole, src=0)
        tensor.copy_(whole)


def mean(values: dict[str, float]) -> dict[str, float]:
    """Means over the processes; all give the same keys in the same order."""
    if size() == 1:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    _add_up(total)
    return dict(zip(values, (total / size()).tolist(), strict=True))


def wait() -> None:
    """Until every process is here."""
    if size() > 1:
        _add_up(torch.zeros(1))


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace gradients by their means over the processes; where none has one, there is none after."""
    if size() == 1:
        return
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    _add_up(used)
    gradients = [_gradient(p) for p, n in zip(parameters, used.tolist(), strict=True) if n]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        _add_up(flat)
        flat /= size()
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of BUCKET_BYTES or a little more."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.nbytes for t in bucket) >= BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _add_up(tensor: Tensor) -> None:
    with _together():
        dist.all_reduce(tensor)


@contextmanager
def _together() -> Iterator[None]:
    """Around what needs every process. If one has gone, the first says so and the others follow in silence."""
    try:
        yield
    except RuntimeError as error:
        if rank() > 0:
            raise SystemExit(1) from error
        raise TrainingError(
            "another process of this training has stopped: its own message says why; without one it was killed, "
            "perhaps for lack of memory. The last checkpoint is kept: run the same command again"
        ) from error
