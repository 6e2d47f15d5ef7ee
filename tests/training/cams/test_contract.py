"""What every file of training/cams promises, whatever its method."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.training.cams.networks import classifier_for, photographs, state_of
from training import cams
from training.losses import multilabel_soft_margin

N_CALLS = 200

every_method = pytest.mark.parametrize("name", cams.names())


@every_method
@pytest.mark.parametrize("n_classes", [1, 4, 81])
def test_maps_of_every_class(name: str, n_classes: int) -> None:
    model = classifier_for(name, n_classes).eval()
    images = photographs()
    with torch.no_grad():
        logits, maps = cams.get(name).maps(model, images)
        expected = model(images)
    assert maps.shape == (2, n_classes, *expected.cam.shape[2:]) and maps.dtype == torch.float32
    assert torch.isfinite(maps).all() and maps.min() >= 0 and maps.max() > 0
    torch.testing.assert_close(logits, expected.logits)


@every_method
def test_an_image_alone_or_in_a_batch(name: str) -> None:
    model, method, images = classifier_for(name, 4).eval(), cams.get(name), photographs(3)
    with torch.no_grad():
        together = method.maps(model, images)
        alone = [method.maps(model, images[i : i + 1]) for i in range(3)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


@every_method
def test_an_image_does_not_feel_its_neighbours(name: str) -> None:
    model, method, images = classifier_for(name, 4).eval(), cams.get(name), photographs(3)
    others = torch.cat([images[:1], 255 - images[1:]])
    with torch.no_grad():
        assert torch.equal(method.maps(model, images)[1][0], method.maps(model, others)[1][0])


@every_method
def test_nothing_is_written_to(name: str) -> None:
    model, images = classifier_for(name, 4).eval(), photographs()
    before = images.clone()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        cams.get(name).maps(model, images)
    assert torch.equal(images, before) and not images.requires_grad
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@every_method
def test_the_same_seed_the_same_maps(name: str) -> None:
    images = photographs()
    with torch.no_grad():
        first = cams.get(name).maps(classifier_for(name, 4).eval(), images)
        random = torch.get_rng_state()
        second = cams.get(name).maps(classifier_for(name, 4).eval(), images)
        again = cams.get(name).maps(classifier_for(name, 4).eval(), images)
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(first, second, again, strict=True))
    assert torch.equal(random, torch.get_rng_state()), "maps of a seed do not draw"


class Stumbling(nn.Module):
    """In the place of a layer: it breaks."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("stumbled")


@every_method
@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("breaks", [False, True])
def test_modes_and_hooks_are_as_they_were(name: str, around: type, breaks: bool) -> None:
    model = classifier_for(name, 2).train()
    model.dropout.eval()  # a part in a mode of its own
    if breaks:
        model.head = Stumbling()
    with around():
        before = state_of(model)
        if breaks:
            with pytest.raises(RuntimeError, match="stumbled"):
                cams.get(name).maps(model, photographs())
        else:
            cams.get(name).maps(model, photographs())
        assert state_of(model) == before


def n_objects() -> tuple[int, int]:
    """Tensors, and everything that the garbage collector knows."""
    gc.collect()
    things = gc.get_objects()
    return sum(issubclass(type(thing), Tensor) for thing in things), len(things)


@every_method
def test_memory_does_not_grow(name: str) -> None:
    model, method, images = classifier_for(name, 4).eval(), cams.get(name), photographs(1, 16, 16)
    counts = []
    with torch.no_grad():
        for _ in range(3):  # the first makes what is made once
            counts.append(n_objects())
            for _ in range(N_CALLS // 2):
                method.maps(model, images)
    counts.append(n_objects())
    assert len({tensors for tensors, _ in counts}) == 1
    assert counts[3][1] - counts[1][1] < N_CALLS // 2, "less than one object a call"


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_method
@pytest.mark.filterwarnings("ignore:Grad strides do not match")  # of 1x1 convolutions, whose strides mean nothing
def test_in_distributed_data_parallel(name: str, one_process: None) -> None:
    """The same maps; and the wrapper, which expects a backward pass after each forward pass, trains on."""
    model, images = classifier_for(name, 2).train(), photographs()
    with torch.no_grad():
        expected = cams.get(name).maps(model.eval(), images)
    wrapped = DistributedDataParallel(model.train(), find_unused_parameters=True)
    for _ in range(2):
        wrapped.eval()
        for a, b in zip(cams.get(name).maps(wrapped, images), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        wrapped.train()
        out = wrapped(images)
        multilabel_soft_margin(out.logits + out.cam.mean(dim=(2, 3)), torch.ones(2, 2)).backward()
    assert model.head.weight.grad is not None


@every_method
def test_it_exports_or_says_why_not(name: str) -> None:
    method = cams.get(name)
    assert isinstance(method.EXPORTABLE, bool)
    if not method.EXPORTABLE:
        assert method.WHY_NOT.split()[0] in ("needs", "has", "takes", "is")  # ends a sentence that the name begins
