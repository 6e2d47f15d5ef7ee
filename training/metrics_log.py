"""metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from weakseg.files import write_bytes_atomic

LOG_EVERY = 10  # steps


class MetricsLog:
    """Means over LOG_EVERY steps; `last` holds the latest. Lines past the resumed step are dropped."""

    def __init__(self, folder: Path, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._truncate(start)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        self.pending: list[dict[str, float]] = []
        self.n_images, self.since = 0, time.monotonic()
        self.last: dict[str, float] = {}

    def add(self, step: int, epoch: int, values: dict[str, float], lr: float, n_images: int) -> None:
        self.pending.append(values)
        self.n_images += n_images
        if (step + 1) % LOG_EVERY:
            return
        self.last = {key: sum(v[key] for v in self.pending) / len(self.pending) for key in values}
        seconds = time.monotonic() - self.since
        row = {"step": step, "epoch": epoch, "seconds": seconds, "images_per_s": self.n_images / seconds}
        with self.path.open("a") as file:
            file.write(json.dumps(row | {"lr": lr} | self.last) + "\n")
        for key, value in (self.last | {"lr": lr, "images_per_s": row["images_per_s"]}).items():
            self.board.add_scalar(key, value, step)
        self.pending, self.n_images, self.since = [], 0, time.monotonic()

    def pictures(self, pictures: dict[str, Tensor], step: int) -> None:
        for name, picture in pictures.items():
            self.board.add_image(name, picture, step)

    def close(self) -> None:
        self.board.close()

    def _truncate(self, start: int) -> None:
        lines = self.path.read_text().splitlines() if self.path.is_file() and start > 0 else []
        kept = [line for line in lines if json.loads(line)["step"] < start]
        write_bytes_atomic(self.path, "".join(line + "\n" for line in kept).encode())
