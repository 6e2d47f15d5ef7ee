"""weakseg: image-level labels in, pixel masks out, served."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weakseg.version import __version__

if TYPE_CHECKING:
    from weakseg.model import Model as Model
    from weakseg.model import load as load
    from weakseg.result import Result as Result

__all__ = ["Model", "Result", "__version__", "load"]

_LAZY = {"load": "weakseg.model", "Model": "weakseg.model", "Result": "weakseg.result"}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import weakseg.errors` in a small client does not read OpenCV.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'weakseg' has no attribute {name!r}")
