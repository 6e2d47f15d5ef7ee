"""True masks, sealed: only openers that are named here may see them, everything else raises SealedTruthError.

Training from image-level labels must never look at a mask, not even by accident. Two guards see to it:

- `open_truth` takes the name of its opener and checks that the calling module is the one this name belongs to.
- `seal` (called by weakseg.datasets.read) puts what holds masks under a process-wide audit hook: reading one in
  any way that goes through Python's `open` raises (weakseg.datasets.sealed).

Masks are PNGs in a folder or, of COCO's instances files, drawn from the annotations. What those files say of tags is in
an index that holds no mask (weakseg.datasets.coco_index); the files themselves are sealed.

It is a guard against mistakes, not against malice. Native readers (cv2.imread, torchvision.io.read_file) raise no audit
event; a test keeps them out of the packages.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from weakseg.classes import ClassTable, ignore_value, mask_dtype
from weakseg.datasets import coco, sealed
from weakseg.datasets.coco_index import index
from weakseg.datasets.coco_masks import CocoMasks
from weakseg.datasets.common import stop
from weakseg.datasets.formats import load
from weakseg.errors import DataError, DatasetError, SealedTruthError, UnknownClassError
from weakseg.recipe import DataConfig

# opener -> modules that may use the name (each with its submodules)
OPENERS: dict[str, tuple[str, ...]] = {
    "scorer": ("training.evaluate",),
    "validation_split": ("training.pseudo_label",),  # ids of the list `config.tune` only
    "full_supervision": ("training.train_segmentation",),
    "report": ("weakseg.report",),  # shows truth beside predictions, ranks the images that it shows
    "data_check": ("weakseg.datasets.check",),
}


class Masks(Protocol):
    """Where the masks of a dataset are; it pickles."""

    def where(self, sample_id: str) -> str: ...
    def has(self, sample_id: str) -> bool: ...
    def read(self, sample_id: str, n_classes: int) -> NDArray[np.uint8] | NDArray[np.uint16]: ...


@dataclass(frozen=True)
class MaskFolder:
    """Label maps <folder>/<id>.png."""

    folder: Path

    def where(self, sample_id: str) -> str:
        return str(self._path(sample_id))

    def has(self, sample_id: str) -> bool:
        return self._path(sample_id).is_file()

    def read(self, sample_id: str, n_classes: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
        path = self._path(sample_id)
        with sealed.open_sealed(path) as file:
            return label_map_from_png(file.read(), n_classes, path)

    def _path(self, sample_id: str) -> Path:
        return self.folder / f"{sample_id}.png"


@dataclass(frozen=True)
class Truth:
    """The masks of one split. Holding one is the permission; it pickles, so that workers can read masks.

    ids: samples of the split; a mask of any other id raises.
    """

    masks: Masks
    classes: ClassTable
    ids: tuple[str, ...]

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.ids)

    def has(self, sample_id: str) -> bool:
        """Whether there is a mask of this id."""
        return sample_id in self._known and self.masks.has(sample_id)

    def where(self, sample_id: str) -> str:
        """Where the mask of this id is or would be."""
        return self.masks.where(sample_id)

    def mask(self, sample_id: str, size: tuple[int, int] | None = None) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """The label map of one sample, for its upright image.

        Args:
            size: (H, W) of the decoded image, where the caller knows it.
        Returns:
            (H, W) uint8, or uint16 above 254 classes: 0 = background, class index + 1, 255 (65535) = IGNORE.
        Raises:
            SealedTruthError: the id is not in this split.
            DatasetError: no mask, not a label map, or another size than the image.
            UnknownClassError: a value above the number of classes.
        """
        if sample_id not in self._known:
            raise SealedTruthError(f"expected an id of the opened split ({len(self.ids)} ids), got {sample_id!r}")
        labels = self.masks.read(sample_id, len(self.classes))
        if size is not None and labels.shape != tuple(size):
            raise DatasetError(
                f"{self.where(sample_id)}: expected the size of its image, {size[1]}x{size[0]}, "
                f"got {labels.shape[1]}x{labels.shape[0]}"
            )
        return labels


def open_truth(config: DataConfig, split: str, *, opener: str) -> Truth:
    """The masks of one split, for those who may see them.

    Args:
        split: whose ids are opened; `validation_split` gets those of them that are in the list `config.tune`.
        opener: a name in OPENERS, used from one of its modules.
    Raises:
        SealedTruthError: unknown opener, a module that it does not belong to, or no tune list to open.
        DatasetError: the dataset has no masks.
    """
    _check_caller(opener, sys._getframe(1))
    if not has_truth(config):
        got = "got annotations without" if _drawn(config) else "got no such folder"
        where = config.root if _drawn(config) else masks_folder(config) or "data.masks"
        raise DatasetError(f"expected true masks in {where}, {got}: set data.masks")
    seal(config)
    # The check has told what is wrong with the lists, and still wants to see the masks of the rest.
    dataset = load(config, split, _overlook if opener == "data_check" else stop)
    ids = [sample.id for sample in dataset]
    if opener == "validation_split":
        if config.tune is None:
            raise SealedTruthError("validation_split may open the masks of data.tune only, got no such list: name one")
        tune = {sample.id for sample in load(config, config.tune)}
        ids = [sample_id for sample_id in ids if sample_id in tune]
    return Truth(_masks(config, split, dataset.classes), dataset.classes, tuple(ids))


def has_truth(config: DataConfig) -> bool:
    """Whether the dataset comes with true masks at all (some samples may still have none)."""
    if _drawn(config):
        return any(found.has_mask.any() for found in coco.indexes(config))
    folder = masks_folder(config)
    return folder is not None and folder.is_dir()


def masks_folder(config: DataConfig) -> Path | None:
    """Where the true masks are or would be, if in a folder: `config.masks`, else <root>/SegmentationClass for voc."""
    if config.masks is not None:
        return Path(config.masks)
    return Path(config.root) / "SegmentationClass" if config.format == "voc" else None


def masks_fingerprint(config: DataConfig, splits: Sequence[str]) -> list[list[Any]] | None:
    """Names and sizes of the masks, of COCO's files the hashes; the sealed files themselves stay closed."""
    if _drawn(config):
        return [["instances", found.sha256] for found in coco.indexes(config, *splits)] or None
    folder = masks_folder(config)
    if folder is None or not folder.is_dir():
        return None
    return sorted([str(path.relative_to(folder)), path.stat().st_size] for path in folder.rglob("*.png"))


def seal(config: DataConfig) -> None:
    """From now on reading what holds true masks by any other way than a Truth raises SealedTruthError."""
    folder = masks_folder(config)
    if folder is not None:
        sealed.seal(folder)
    if config.format == "coco":  # also where masks come from elsewhere: its annotations hold some
        for path in coco.annotation_paths(config):
            sealed.seal(path)


@contextmanager
def trusted(opener: str, module: str) -> Iterator[None]:
    """Let one more module use an opener's name inside the block: for tests and benchmarks that score something."""
    before = OPENERS[opener]
    OPENERS[opener] = (*before, module)
    try:
        yield
    finally:
        OPENERS[opener] = before


def label_map_from_png(data: bytes, n_classes: int, where: Path) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """(H, W) label map of palette or grey PNG bytes; values are checked against the number of classes."""
    try:
        with PngImageFile(io.BytesIO(data)) as image:
            mode, pixels = image.mode, np.asarray(image)
    except Exception as error:  # decoders raise whatever they met
        raise DatasetError(f"{where}: expected a PNG label map, got a file that cannot be decoded: {error}") from error
    dtype: np.dtype[np.unsignedinteger[Any]] = np.dtype(mask_dtype(n_classes))
    if mode not in ("P", "L", "1") and not mode.startswith("I;16"):
        raise DatasetError(f"{where}: expected palette or grey pixels that are class values, got {mode} pixels")
    if (pixels.dtype.itemsize == 2) != (dtype.itemsize == 2):
        raise DatasetError(f"{where}: expected {dtype} values for {n_classes} classes, got {pixels.dtype}")
    labels = pixels.astype(np.uint8) if dtype.itemsize == 1 else pixels.astype(np.uint16)
    unknown = np.unique(labels[(labels > n_classes) & (labels != ignore_value(labels))])
    if unknown.size:
        shown = ", ".join(map(str, unknown[:5]))
        raise UnknownClassError(f"{where}: expected values 0 to {n_classes} or {ignore_value(labels)}, got {shown}")
    return labels


def _drawn(config: DataConfig) -> bool:
    """Whether masks are drawn from COCO's annotations."""
    return config.format == "coco" and config.masks is None


def _masks(config: DataConfig, split: str, classes: ClassTable) -> Masks:
    if not _drawn(config):
        folder = masks_folder(config)
        assert folder is not None
        return MaskFolder(folder)
    path = coco.instances_file(config, split)
    found = index(path)
    return CocoMasks(path, found.sha256, coco.mask_values(found, classes))


def _overlook(_where: str, _message: str, _error: type[DataError] = DatasetError) -> None:
    """A Complain that does not."""


def _check_caller(opener: str, frame: FrameType) -> None:
    if opener not in OPENERS:
        raise SealedTruthError(f"expected an opener of true masks ({', '.join(OPENERS)}), got {opener!r}")
    spec = frame.f_globals.get("__spec__")  # under `python -m`, __name__ is __main__ and this still has the name
    caller = str(spec.name if spec is not None else frame.f_globals.get("__name__"))
    if not any(caller == module or caller.startswith(f"{module}.") for module in OPENERS[opener]):
        raise SealedTruthError(
            f"expected {' or '.join(OPENERS[opener])} to open true masks as {opener!r}, got module {caller}: "
            "training from image-level labels must not see them"
        )
