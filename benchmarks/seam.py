"""What a step of SEAM costs beside a step of the plain classifier: `python -m benchmarks.seam` (`make bench-seam`).

CPU seconds of forward and backward on random images, the two taking turns; random weights, which cost what trained ones
do. ResNet38d at batch 2, crop 224; MobileNetV2 at batch 8, stride 8, crop 224.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context

import torch

from benchmarks.line import line
from benchmarks.measure import flops, resident_mib, sgemm_rate, took_turns
from training import methods
from training.data import Batch
from training.loop import Moment
from training.models import build_backbone
from weakseg.recipe import BackboneConfig, TrainConfig

N_CLASSES, CROP = 20, 224
# backbone -> images a step, the share of the plain step's speed to keep
BACKBONES = {"mobilenet_v2": (8, 0.74), "resnet38d": (2, 0.87)}
AUTHORS_STEP_S = 13.3  # CPU seconds of the authors' SEAM step of ResNet38d; the lower of two measurements


def main() -> None:
    for name, (batch_size, goal) in BACKBONES.items():
        seam, plain = step(name, "seam", batch_size), step(name, "cam", batch_size)
        seconds = took_turns(seam, plain)
        line(f"seam.step_vs_plain.{name}", 1 / seconds[0], 1 / seconds[1], unit="steps/s", goal=goal)
        if name == "resnet38d":
            line("seam.r38_step_cpu_s", seconds[0], unit="CPU s", cost=True, goal=11.5)
            with get_context("spawn").Pool(1) as alone:
                line("seam.r38_peak_mib", alone.apply(peak_mib, ("resnet38d", batch_size)), unit="MiB", cost=True)
            line("seam.r38_bound_cpu_s", flops(seam) / sgemm_rate(), unit="CPU s", cost=True)
    line("seam.r38_params", n_parameters(), unit="parameters", goal=105_070_912)


def peak_mib(backbone: str, batch_size: int) -> float:
    """Of a process that does nothing but SEAM steps; the authors' takes 2,540 MiB with ResNet38d."""
    run = step(backbone, "seam", batch_size)
    run()
    run()
    return resident_mib("VmHWM")


def step(backbone: str, method: str, batch_size: int) -> Callable[[], None]:
    """Forward and backward of one batch."""
    torch.manual_seed(0)
    config = TrainConfig(method=method)
    made = methods.get(method)
    model = made.build(build_backbone(BackboneConfig(name=backbone, output_stride=8)), N_CLASSES, config).train()
    model.to(memory_format=torch.channels_last)
    losses = made.losses_of(config)
    images = torch.randint(0, 256, (batch_size, 3, CROP, CROP), dtype=torch.uint8)
    tags = torch.zeros(batch_size, N_CLASSES)
    tags[:, 0] = tags[0, 1] = 1  # one class an image, the first has two
    batch = Batch(images.contiguous(memory_format=torch.channels_last), tags, None, ["random"] * batch_size)

    def run() -> None:
        torch.stack(list(losses(model, batch, Moment(0, 0, 0.0)).values())).sum().backward()
        model.zero_grad(set_to_none=True)

    return run


def n_parameters() -> int:
    backbone = build_backbone(BackboneConfig(name="resnet38d", output_stride=8), pretrained=False)
    return sum(parameter.numel() for parameter in backbone.parameters())


if __name__ == "__main__":
    main()
