"""One folder per class, images at any depth below it. The folder `background` holds images without any class.

With splits, <root>/<split>/<class>/…; without, <root>/<class>/… and every split is the whole. An image that shows
several classes is linked (symbolic link) into each of their folders: one file is one sample, however often it appears.
"""

from __future__ import annotations

from pathlib import Path

from weakseg.datasets.common import (
    BACKGROUND_NAMES,
    IMAGE_SUFFIXES,
    Complain,
    class_table,
    read_class_list,
    stop,
    tag_indices,
    unique,
)
from weakseg.datasets.sample import Dataset, Sample
from weakseg.errors import DatasetError
from weakseg.recipe import DataConfig


def load(config: DataConfig, split: str, complain: Complain = stop) -> Dataset:
    """The images below the class folders, sorted by path."""
    root = Path(config.root)
    if not root.is_dir():
        raise DatasetError(f"expected a dataset folder, got {root}: no such folder")
    bases = _bases(root, config)
    if split not in bases:
        raise DatasetError(
            f"expected the folder {root / split} with one folder per class, got splits {', '.join(bases)}"
        )
    base = bases[split]
    classes = class_table(_class_names(root, bases), root)
    names_of: dict[Path, list[str]] = {}
    first: dict[Path, Path] = {}
    for folder in _class_folders(base):
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
                continue
            if not path.is_file():
                complain(str(path), "expected an image file, got a folder or a broken link")
                continue
            names = names_of.setdefault(path.resolve(), [])
            first.setdefault(path.resolve(), path)
            names.extend([folder.name] if folder.name not in BACKGROUND_NAMES else [])
    samples = []
    for file, path in first.items():
        tags = tag_indices(names_of[file], classes, str(path), complain)
        samples.append((str(path), Sample(path.relative_to(base).with_suffix("").as_posix(), path, tags)))
    return Dataset(classes, unique(samples, complain), split, root)


def _class_folders(base: Path) -> list[Path]:
    return [path for path in sorted(base.iterdir()) if path.is_dir() and not path.name.startswith(".")]


def _bases(root: Path, config: DataConfig) -> dict[str, Path]:
    """The folder that holds each split's class folders.

    A split has its own if <root>/<split> holds folders (a folder of images by that name is a class). If any split has,
    the others are missing; if none has, all are the root.
    """
    splits = [split for split in (config.train, config.val, config.tune) if split]
    own = {split: root / split for split in splits if (root / split).is_dir() and _class_folders(root / split)}
    return own or dict.fromkeys(splits, root)


def _class_names(root: Path, bases: dict[str, Path]) -> tuple[str, ...]:
    """classes.txt, else the sorted folder names of all splits."""
    if (root / "classes.txt").is_file():
        return read_class_list(root / "classes.txt")
    found = {folder.name for base in bases.values() for folder in _class_folders(base)}
    return tuple(sorted(found - BACKGROUND_NAMES))
