"""How a job is doing: a bar on a terminal, a JSON line every ten seconds elsewhere, Prometheus' textfile, timings."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from weakseg.batch.labeller import Outcome
from weakseg.progress import LINE_EVERY_S, Progress

logger = logging.getLogger(__name__)

STAGES = ("read", "decode", "infer", "postprocess", "store")


class Telemetry:
    """Counts outcomes. `close` it, or use `with`.

    Args:
        total, done: images of the shard, and those of earlier runs among them.
        silent: say nothing on stderr.
        timings: file that a line for each image is appended to; never a part of the output.
        textfile: *.prom for the textfile collector of Prometheus' node exporter, replaced as the job goes on.
    """

    def __init__(
        self, total: int, done: int, failed: int, *, silent: bool, timings: Path | None, textfile: Path | None
    ) -> None:
        self.total, self.done, self.failed, self.first = total, done, failed, done
        self.began = self._said = time.monotonic()
        self.reasons: Counter[str] = Counter()
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._textfile = textfile
        mode = "silent" if silent or not sys.stderr.isatty() else "bar"
        self._lines = mode == "silent" and not silent
        self._bar_context = Progress("bar" if mode == "bar" else "silent").task("pseudo-label", total, initial=done)
        self._bar = self._bar_context.__enter__()
        self._timings_path = timings
        self._timings: IO[str] | None = None

    def count(self, outcome: Outcome) -> None:
        row = outcome.row
        self.done += 1
        if row["status"] == "failed":
            self.failed += 1
            self.reasons[row["error"]["reason"]] += 1
        for stage in STAGES:
            self.seconds[stage] += outcome.seconds.get(stage, 0.0)
        try:
            self._note_timings(row["uri"], outcome.seconds)
        except OSError as error:
            self._give_up_timings(error)
        self._bar.update(1, failed=self.failed)
        if time.monotonic() - self._said >= LINE_EVERY_S:
            self._said = time.monotonic()
            self._publish()

    @property
    def images_per_s(self) -> float:
        """Of this run."""
        return (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)

    def report(self) -> dict[str, Any]:
        left_s = (self.total - self.done) / self.images_per_s if self.done > self.first else None
        return {
            "done": self.done,
            "failed": self.failed,
            "total": self.total,
            "images_per_s": round(self.images_per_s, 3),
            "eta_s": None if left_s is None else round(left_s, 1),
        }

    def close(self) -> None:
        self._bar_context.__exit__(None, None, None)
        if self._timings is not None:
            with suppress(OSError):  # a full disk has been told of already
                self._timings.close()
        if self._textfile is not None:
            with suppress(OSError):
                self._write_textfile(self._textfile)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _note_timings(self, uri: str, seconds: dict[str, float]) -> None:
        if self._timings_path is None:
            return
        if self._timings is None:  # not before there is something to write: a job may have nothing to do
            self._timings_path.parent.mkdir(parents=True, exist_ok=True)
            self._timings = self._timings_path.open("a", encoding="utf-8", buffering=1)  # whole lines
        rounded = {name: round(value, 6) for name, value in seconds.items()}
        self._timings.write(json.dumps({"uri": uri, **rounded}) + "\n")

    def _give_up_timings(self, error: OSError) -> None:
        """They are not worth a job."""
        logger.warning("no timings from here on: %s: %s", self._timings_path, error.strerror or error)
        self._timings_path, self._timings = None, None

    def _publish(self) -> None:
        if self._lines:
            print(json.dumps(self.report()), file=sys.stderr, flush=True)
        if self._textfile is not None:
            try:
                self._write_textfile(self._textfile)
            except OSError as error:
                logger.warning("%s could not be written: %s", self._textfile, error.strerror or error)

    def _write_textfile(self, path: Path) -> None:
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

        registry = CollectorRegistry()
        images = Gauge("weakseg_batch_images", "Images of the shard that are finished.", ["status"], registry=registry)
        images.labels("ok").set(self.done - self.failed)
        images.labels("failed").set(self.failed)
        Gauge("weakseg_batch_images_expected", "Images of the shard.", registry=registry).set(self.total)
        rate = Gauge("weakseg_batch_images_per_second", "Images finished a second in this run.", registry=registry)
        rate.set(self.images_per_s)
        stages = Gauge("weakseg_batch_stage_seconds", "Time of all images in a stage.", ["stage"], registry=registry)
        for stage in STAGES:
            stages.labels(stage).set(self.seconds[stage])
        Gauge("weakseg_batch_updated_timestamp_seconds", "When this was written.", registry=registry).set(time.time())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_to_textfile(str(path), registry)
