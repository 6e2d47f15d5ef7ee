"""Where torch runs."""

from __future__ import annotations

import os

import torch

from weakseg.errors import ConfigError


def pick_device() -> torch.device:
    """The first CUDA device if there is one, else the CPU; under torchrun, process i of a machine takes device i.

    Raises:
        ConfigError: more processes than devices.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, n_devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= n_devices:
        raise ConfigError(f"expected at most one process a CUDA device: torchrun --nproc-per-node {n_devices}")
    return torch.device("cuda", index)
