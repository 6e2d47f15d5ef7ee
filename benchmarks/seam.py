"""What a step of SEAM costs beside a step of the plain classifier: `python -m benchmarks.seam` (`make bench-seam`).

CPU seconds of forward and backward on random images, the two taking turns; random weights, which cost what trained ones
do. ResNet38d at batch 2, crop 224; MobileNetV2 at batch 8, stride 8, crop 224.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

from benchmarks.line import line
from training import methods
from training.data import Batch
from training.loop import Moment
from training.models import build_backbone
from weakseg.recipe import BackboneConfig, TrainConfig

N_CLASSES, CROP, ROUNDS = 20, 224, 5
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
    # Not getrusage's ru_maxrss, which a started process takes over from the one that forked it.
    peak = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024


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


def took_turns(*ways: Callable[[], None]) -> list[float]:
    """Median CPU seconds of each."""
    seconds: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way()
    for _ in range(ROUNDS):
        for measured, way in zip(seconds, ways, strict=True):
            began = time.process_time()
            way()
            measured.append(time.process_time() - began)
    return [median(measured) for measured in seconds]


def flops(run: Callable[[], None]) -> float:
    """Multiply-adds of the step's convolutions and matrix products, times two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def sgemm_rate(n: int = 2048) -> float:
    """FLOP per CPU second of a large float32 matrix product."""
    a, b = torch.rand(n, n), torch.rand(n, n)
    a @ b
    began = time.process_time()
    for _ in range(5):
        a @ b
    return 5 * 2 * n**3 / (time.process_time() - began)


def n_parameters() -> int:
    backbone = build_backbone(BackboneConfig(name="resnet38d", output_stride=8), pretrained=False)
    return sum(parameter.numel() for parameter in backbone.parameters())


if __name__ == "__main__":
    main()
