"""The layout of COCO, with any class names; a split is an instances file:

    annotations/instances_<split>.json    images (id, file_name), annotations (image_id, category_id), categories
    <split>/<file_name>                   the images; or images/<split>/, images/, or for `tune` those of `train`
    classes.txt                           names in the order of the mask values

Or the root is such a .json file itself, images relative to it or to images/ beside it; every split is then the whole.

Tags are the categories of an image's annotations, crowds and small objects included, as COCO's image-level labels are
usually made. An image without annotations shows only background. Class names are those of classes.txt, else of the
categories in the order of their ids, which may have holes; a category called background is no class. An id is the
image's file name without its suffix.

Segmentations, boxes and areas are true masks: the annotations are sealed, see weakseg.datasets.truth. What is read here
is an index of them (weakseg.datasets.coco_index), and a sample is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from os.path import isfile
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import BACKGROUND, ClassTable
from weakseg.datasets.coco_index import Index, image_id, index
from weakseg.datasets.common import BACKGROUND_NAMES, Complain, class_table, read_class_list, stop
from weakseg.datasets.sample import Dataset, Sample
from weakseg.errors import DatasetError, UnknownClassError
from weakseg.recipe import DataConfig


class Samples(Sequence[Sample]):
    """Samples of an index. As objects, COCO's training images would take a second and 60 MB at every start."""

    def __init__(self, found: Index, rows: NDArray[np.int64], folder: Path, class_of: NDArray[np.int64]) -> None:
        """rows: (n,) images of the index. class_of: class indices of its categories, -1 = none."""
        self._found, self._rows, self._folder, self._class_of = found, rows, folder, class_of

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, item: int) -> Sample: ...
    @overload
    def __getitem__(self, item: slice) -> tuple[Sample, ...]: ...

    def __getitem__(self, item: int | slice) -> Sample | tuple[Sample, ...]:
        if isinstance(item, slice):
            return tuple(self[at] for at in range(*item.indices(len(self))))
        row = self._rows[item]
        name = self._found.names[row]
        start, end = self._found.tag_starts[row : row + 2]
        tags = self._class_of[self._found.tags[start:end]]
        return Sample(image_id(name), self._folder / name, tuple(sorted(tags[tags >= 0].tolist())))


def load(config: DataConfig, split: str, complain: Complain = stop) -> Dataset:
    """The images of one instances file, in its order."""
    path = instances_file(config, split)
    found = index(path)
    for where, message in found.problems:
        complain(where, message)
    classes = _class_table(config, split)
    class_of = _class_of_category(found, classes, path, complain)
    folder = _images_folder(config, split, found)
    there = [isfile(f"{folder}/{name}") for name in found.names]
    for name in (name for name, is_there in zip(found.names, there, strict=True) if not is_there):
        complain(str(path), f"expected the image {folder / name}, got no such file")
    samples = Samples(found, np.flatnonzero(there), folder, class_of)
    return Dataset(classes, samples, split, _folder(config))


def instances_file(config: DataConfig, split: str) -> Path:
    """The annotations of a split; raises DatasetError where there are none."""
    root = Path(config.root)
    path = root / "annotations" / f"instances_{split}.json" if root.is_dir() else root
    if not path.is_file():
        raise DatasetError(f"expected COCO's annotations of split {split!r} in {path}, got no such file")
    return path


def annotation_paths(config: DataConfig) -> Iterator[Path]:
    """What holds annotations: the folder of them, with captions and keypoints, and the files of the recipe's splits."""
    root = Path(config.root)
    yield from [root / "annotations"] if root.is_dir() else []
    yield from _files(config)  # a file in the folder may be a link to one elsewhere


def indexes(config: DataConfig, *others: str) -> Iterator[Index]:
    """Of every split of the recipe, and of others, that has annotations, each once; unreadable ones are left out."""
    for path in _files(config, *others):
        with suppress(DatasetError):
            yield index(path)


def mask_values(found: Index, classes: ClassTable) -> Mapping[int, int]:
    """{category id: mask value} of the categories that are classes, or background."""
    names = dict.fromkeys(BACKGROUND_NAMES, BACKGROUND) | {name: value for value, name in enumerate(classes.names, 1)}
    return {number: names[name] for number, name in found.categories.items() if name in names}


def _files(config: DataConfig, *others: str) -> tuple[Path, ...]:
    paths = []
    for split in (config.train, config.val, config.tune, *others):
        with suppress(DatasetError):
            paths += [instances_file(config, split)] if split else []
    return tuple(dict.fromkeys(paths))


def _folder(config: DataConfig) -> Path:
    root = Path(config.root)
    return root if root.is_dir() else root.parent


def _images_folder(config: DataConfig, split: str, found: Index) -> Path:
    """The first of those where images may be that has the first image."""
    root, here = Path(config.root), _folder(config)
    splits = dict.fromkeys((split, config.train)) if root == here else {}
    folders = [folder for name in splits for folder in (here / name, here / "images" / name)]
    folders += [here, here / "images"]
    return next((folder for folder in folders for name in found.names[:1] if (folder / name).is_file()), folders[0])


def _class_table(config: DataConfig, split: str) -> ClassTable:
    """classes.txt, else the categories of all splits, so that each has the same table."""
    listed = _folder(config) / "classes.txt"
    if listed.is_file():
        return class_table(read_class_list(listed), listed)
    names: dict[int, str] = {}
    for found in (index(instances_file(config, split)), *indexes(config)):
        for number, name in found.categories.items():
            if names.setdefault(number, name) != name:
                raise DatasetError(
                    f"{config.root}: expected a category to be the same in every split, got {names[number]!r} and "
                    f"{name!r} with the id {number}: give both files the same categories"
                )
    return class_table(tuple(names[n] for n in sorted(names) if names[n] not in BACKGROUND_NAMES), config.root)


def _class_of_category(found: Index, classes: ClassTable, path: Path, complain: Complain) -> NDArray[np.int64]:
    """Class index of each category, -1 = none; one that annotations have and the table lacks is complained about."""
    used = set(np.unique(found.tags).tolist())
    class_of = np.full(len(found.categories), -1)
    for position, (number, name) in enumerate(found.categories.items()):
        if position not in used or name in BACKGROUND_NAMES:
            continue
        try:
            class_of[position] = classes.index(name)
        except UnknownClassError as error:
            complain(f"{path}: category {number}", str(error), UnknownClassError)
    return class_of
