"""What comes out of an image: the one type that the Python API, the client, the batch job and the page return."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, fromarray

from weakseg.classes import BACKGROUND, ClassTable, ignore_value
from weakseg.errors import DataError, UsageError
from weakseg.files import write_bytes_atomic
from weakseg.masks.png import PROVENANCE, png_from_labels, provenance_text
from weakseg.quality import MaskQuality
from weakseg.threshold import Threshold

if TYPE_CHECKING:
    from weakseg.model import Refinement

MaskKind: TypeAlias = Literal["segmentation", "pseudo_mask"]
MASK_KINDS: tuple[MaskKind, ...] = ("segmentation", "pseudo_mask")
_HATCH_PX = 8  # period of the stripes over IGNORE


@dataclass(frozen=True, eq=False)
class Result:
    """Everything that was asked for of one image; what was not is None or empty.

    classes, palette: names, and (n, 3) uint8 RGB by mask value.
    height, width: of the image, upright unless its orientation was to be ignored; label maps have this size.
    segmentation, pseudo_mask: (height, width) label maps; a pseudo-mask holds IGNORE where it is undecided.
    heatmaps: {class name: (h, w) float32 in [0, 1]} of the present classes, at a quarter of the network's input; each
        covers the whole image.
    scores: {class name: in [0, 1]} of all classes; present: names of those that count as being in the image.
    model: "name/version"; model_sha256: of its manifest.
    threshold: where the background of the pseudo-mask begins, and who chose that.
    refinement: what else made the pseudo-mask: band, crf (None = none); empty where a server does not say.
    refined_by: what sharpened it, in a word. refinement_cut_short: a server had no time for what was asked, so it is as
        refine="none" makes it.
    quality: {mask: how sure it is of itself} of the masks, see `weakseg.quality`.
    seconds: time per stage: decode, infer, postprocess.
    image: (height, width, 3) uint8 RGB, for `overlay`.
    """

    classes: ClassTable
    palette: NDArray[np.uint8]
    height: int
    width: int
    segmentation: NDArray[Any] | None = None
    pseudo_mask: NDArray[Any] | None = None
    heatmaps: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    present: tuple[str, ...] = ()
    model: str = ""
    model_sha256: str = ""
    threshold: Threshold | None = None
    refinement: dict[str, Any] = field(default_factory=dict)
    refined_by: Refinement | None = None
    refinement_cut_short: bool = False
    quality: dict[MaskKind, MaskQuality] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    image: NDArray[np.uint8] | None = None

    @property
    def mask(self) -> NDArray[Any]:
        """The segmentation, else the pseudo-mask."""
        return self._labels(None)[1]

    @property
    def mask_kinds(self) -> tuple[MaskKind, ...]:
        """Which masks there are, the segmentation first."""
        return tuple(kind for kind in MASK_KINDS if getattr(self, kind) is not None)

    def legend(self) -> dict[str, tuple[int, int, int]]:
        """{class name: RGB} of the classes in `mask`, by mask value."""
        mask = self.mask
        values = [int(v) for v in np.unique(mask) if v not in (BACKGROUND, ignore_value(mask))]
        return {self.classes.names[v - 1]: self._colour(v) for v in values}

    def overlay(self, alpha: float = 0.5, image: NDArray[np.uint8] | None = None) -> Image:
        """The image with `mask` over it: background as it is, IGNORE hatched in its colour.

        Args:
            alpha: opacity of the colours, in [0, 1].
            image: (height, width, 3) uint8 RGB, where the result does not carry its own.
        """
        photo = self.image if image is None else image
        if photo is None:
            raise UsageError("this result does not carry its image: pass overlay(image=...)")
        if photo.shape != (self.height, self.width, 3):
            raise DataError(f"image must be ({self.height}, {self.width}, 3), got {photo.shape}")
        return fromarray(_blend(photo, self.mask, self.palette, alpha))

    def save(self, path: str | Path) -> Path:
        """Write `mask` as an index PNG (.png), or everything as arrays (.npz); atomically.

        The .npz holds, as far as they are there: segmentation, pseudo_mask, each with <name>_provenance (JSON text),
        classes (C,) names, scores (C,), and heatmaps (K, h, w) with heatmap_classes (K,) names. No pickles.
        """
        path = Path(path)
        if path.suffix == ".png":
            write_bytes_atomic(path, self.mask_png())
        elif path.suffix == ".npz":
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **self._arrays())
            write_bytes_atomic(path, buffer.getvalue())
        else:
            raise UsageError(f"expected a path that ends in .png or .npz, got {str(path)!r}")
        return path

    def mask_png(self, kind: MaskKind | None = None) -> bytes:
        """`mask`, or the one of that kind, as an index PNG in the model's colours; its text says how it was made."""
        kind, labels = self._labels(kind)
        return png_from_labels(labels, self.palette[:256], self.mask_text(kind))

    def mask_text(self, kind: MaskKind) -> dict[str, str]:
        """`text` of a mask's PNG: model, and of pseudo-masks threshold and refinement."""
        fields: dict[str, Any] = {"mask": kind}
        if self.model:
            fields |= {"model": self.model, "model_sha256": self.model_sha256}
        if kind == "pseudo_mask" and self.threshold is not None:
            fields |= self.threshold.to_dict() | self.refinement
            if self.refinement_cut_short:
                fields["refinement_cut_short"] = True
        return provenance_text(fields)

    def _labels(self, kind: MaskKind | None) -> tuple[MaskKind, NDArray[Any]]:
        for one in self.mask_kinds:
            if kind in (None, one):
                return one, getattr(self, one)
        wanted = "mask" if kind is None else kind
        raise UsageError(f"this result has no {wanted}: ask for outputs=('segmentation',) or ('pseudo_mask',)")

    def _arrays(self) -> dict[str, Any]:
        arrays: dict[str, Any] = {"classes": np.array(self.classes.names)}
        for kind in self.mask_kinds:
            arrays[kind] = getattr(self, kind)
            arrays[f"{kind}_provenance"] = np.array(self.mask_text(kind)[PROVENANCE])
        if self.scores:
            arrays["scores"] = np.array([self.scores[name] for name in self.classes.names], dtype=np.float32)
        if self.heatmaps:
            arrays["heatmaps"] = np.stack(list(self.heatmaps.values()))
            arrays["heatmap_classes"] = np.array(list(self.heatmaps))
        return arrays

    def _colour(self, value: int) -> tuple[int, int, int]:
        red, green, blue = (int(v) for v in self.palette[value])
        return red, green, blue

    def _repr_png_(self) -> bytes | None:
        """How a notebook shows it: the overlay, or the mask where the image is not carried."""
        if not self.mask_kinds:
            return None
        if self.image is None:
            return self.mask_png()
        buffer = io.BytesIO()
        self.overlay().save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def __repr__(self) -> str:
        parts = [self.model, f"{self.width}x{self.height}", *self.mask_kinds]
        if self.mask_kinds:
            parts.append(f"shows {', '.join(self.legend()) or 'background only'}")
        if self.heatmaps:
            parts.append(f"heatmaps of {', '.join(self.heatmaps)}")
        return f"<Result {' · '.join(part for part in parts if part)}>"


def _blend(photo: NDArray[np.uint8], mask: NDArray[Any], palette: NDArray[np.uint8], alpha: float) -> NDArray[np.uint8]:
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha must lie in [0, 1], got {alpha}")
    ignore = ignore_value(mask)
    painted = mask != BACKGROUND
    rows, cols = np.ogrid[: mask.shape[0], : mask.shape[1]]
    painted &= (mask != ignore) | ((rows + cols) % _HATCH_PX < _HATCH_PX // 2)
    out = photo.copy()
    mixed = photo[painted] * (1 - alpha) + palette[mask[painted]] * alpha
    out[painted] = (mixed + 0.5).astype(np.uint8)
    return out
