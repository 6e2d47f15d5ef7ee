"""Everything a training needs to go on, in one file that is tied to the settings it was made with."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from weakseg.files import write_bytes_atomic


class Stateful(Protocol):
    """Model, optimiser, loss scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Checkpoint:
    """<folder>/checkpoint.pt with the states of `parts` by name, and the step to go on from."""

    def __init__(self, folder: Path, parts: Mapping[str, Stateful], fingerprint: dict[str, Any]) -> None:
        self.path, self.parts = folder / "checkpoint.pt", parts
        self.fingerprint = json.dumps(fingerprint, sort_keys=True)

    def save(self, step: int) -> None:
        buffer = io.BytesIO()
        states = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(states | {"step": step, "fingerprint": self.fingerprint}, buffer)
        write_bytes_atomic(self.path, buffer.getvalue())

    def load(self) -> int:
        """The step to go on from: 0 without a checkpoint, or when it belongs to other settings."""
        if not self.path.is_file():
            return 0
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        if content["fingerprint"] != self.fingerprint:
            return 0
        for name, part in self.parts.items():
            if name in content:  # one from before loss scaling has no scaler
                part.load_state_dict(content[name])
        return int(content["step"])
