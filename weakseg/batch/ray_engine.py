"""The engine of many machines: Ray Data over actors that each hold the model.

Items stream to the actors, rows stream back, both bounded by Ray's back-pressure. Actors write an image's files
themselves, as threads of the local engine do, and to the same bytes: output and input must lie where every node finds
them, a shared file system or an object store. What an actor did that died is done again by another one.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from weakseg.batch.inputs import Item
from weakseg.batch.job import Engine, Stopping
from weakseg.batch.labeller import Assignment, Labeller, Outcome
from weakseg.errors import BundleError, WeaksegError

BATCH = 8  # images a task: rows of fewer are lost with a node, more of them keep actors busy


class RayLabeller:
    """What an actor is: a labeller that is made once."""

    def __init__(self, assignment: Assignment, model_sha256: str, config_sha256: str) -> None:
        import cv2

        cv2.setNumThreads(1)
        self._label = Labeller(assignment)
        self._label.config_sha256 = config_sha256
        if self._label.segmenter.model_sha256 != model_sha256:
            raise BundleError(
                f"expected the model {model_sha256[:12]} on every node, this one has "
                f"{self._label.segmenter.model_sha256[:12]}: give all the same bundle"
            )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        outcomes = [self._label(item_from_json(text)) for text in batch["item"]]
        return {"outcome": np.array([json.dumps(asdict(outcome)) for outcome in outcomes], dtype=object)}


def ray_engine(assignment: Assignment, address: str | None, workers: int | None) -> Engine:
    """workers: actors; None = as many as the cluster has cores at the start."""

    def engine(items: Iterable[Item], labeller: Labeller, stopping: Stopping) -> Iterator[Outcome]:
        import ray
        import ray.data
        from ray.exceptions import RayTaskError

        ours = not ray.is_initialized()
        if ours:
            # Left to itself ray.init would take the cluster that was last started here, which may be long gone.
            where = address or os.environ.get("RAY_ADDRESS") or "local"
            with handlers_kept():
                ray.init(address=where, log_to_driver=False, logging_level=logging.WARNING, include_dashboard=False)
        try:
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns of the line above
            context.execution_options.preserve_order = False
            cluster: Any = ray.cluster_resources()  # type: ignore[no-untyped-call]
            n_actors = workers or max(1, int(cluster.get("CPU", 1)))
            texts = [{"item": item_to_json(item)} for item in items]
            rows = ray.data.from_items(texts, override_num_blocks=max(1, -(-len(texts) // BATCH))).map_batches(
                RayLabeller,
                fn_constructor_args=(everywhere(assignment), labeller.segmenter.model_sha256, labeller.config_sha256),
                batch_size=BATCH,
                compute=ray.data.ActorPoolStrategy(size=n_actors),
                num_cpus=1,
            )
            for row in rows.iter_rows():
                yield Outcome(**json.loads(row["outcome"]))
                if stopping():
                    break
        except RayTaskError as error:
            if isinstance(error.cause, (WeaksegError, OSError)):
                raise error.cause from None
            raise
        finally:
            if ours:
                ray.shutdown()

    return engine


@contextmanager
def handlers_kept() -> Iterator[None]:
    """ray.init makes SIGTERM end the process; the job has its own way to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def everywhere(assignment: Assignment) -> Assignment:
    """The same for workers that have another working directory."""
    backend = assignment.backend
    paths = {name: path.resolve() for name in ("bundle", "public_key") if (path := getattr(backend, name)) is not None}
    return replace(assignment, output=absolute(assignment.output), backend=replace(backend, **paths))


def absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def item_to_json(item: Item) -> str:
    return json.dumps(asdict(replace(item, path=absolute(item.path))))


def item_from_json(text: str) -> Item:
    fields = json.loads(text)
    tags = fields.pop("tags")
    return Item(**fields, tags=None if tags is None else tuple(tags))
