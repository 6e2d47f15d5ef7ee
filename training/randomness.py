"""Randomness as a function of (seed, epoch, sample id): workers, processes, kills and resumes do not change it."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def sample_rng(seed: int, epoch: int, sample_id: str) -> np.random.Generator:
    """The generator of one sample in one epoch."""
    return np.random.default_rng([seed, epoch, zlib.crc32(sample_id.encode())])


def epoch_order(seed: int, epoch: int, n: int) -> list[int]:
    """A permutation of 0..n-1."""
    return [int(i) for i in np.random.default_rng([seed, epoch, 0xE90C]).permutation(n)]


def seed_torch(seed: int, step: int, process: int = 0) -> None:
    """Dropout and the like: torch's generator as a function of (seed, step, process)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0]) >> 1)
