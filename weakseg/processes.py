"""One run in several processes, as torchrun starts them: the first leads, the others help with the stages that train.

    torchrun --nproc-per-node 2 -m weakseg run RECIPE

Every process is started with the same arguments. The first runs the stages; the others wait and take part in those that
it calls. What they talk through is torch's, so it is named, not imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

CREW = "training.distributed"


def rank() -> int:
    """0 in the first process, and where there is only one."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def leading() -> Iterator[None]:
    """In the first process, around all stages: the others join before and are let go after.

    After an error nothing is told: they may be in the middle of a step, and notice that the first has gone.
    """
    if size() == 1:
        yield
        return
    crew = import_module(CREW)
    crew.join()
    yield
    crew.tell(None)
    crew.leave()


def call(stage: str) -> None:
    """In the first process: the others run this stage too, now."""
    if size() > 1:
        import_module(CREW).tell(stage)


def follow(run_stage: Callable[[str], object]) -> None:
    """In the other processes: run what the first calls, until it lets go."""
    crew = import_module(CREW)
    crew.join()
    while (stage := crew.hear()) is not None:
        run_stage(stage)
    crew.leave()
