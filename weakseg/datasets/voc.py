"""The layout of PASCAL VOC, with any class names:

    JPEGImages/<id>.jpg                   also .jpeg, .png, .webp
    ImageSets/Segmentation/<split>.txt    one id a line; ImageSets/Main/<split>.txt where that is missing
    labels.json                           {"classes": [names], "images": {id: {<tags_key>: [names]}}}
    Annotations/<id>.xml                  object/name; the parts of an object are not objects
    ImageSets/Main/<class>_<split>.txt    `id 1`, `id 0` (there, but difficult), `id -1`
    classes.txt                           names in the order of the mask values
    SegmentationClass/<id>.png            sealed, see weakseg.datasets.truth; nothing here looks at it

Tags come from exactly one source: labels.json, XML or ImageSets/Main. `auto` takes the first of these that exists.
Of every image of data.train, data.val and data.tune it must say something, if only that there is nothing. Images of
another split that it does not speak of have no tags: VOC publishes none for its test images.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from weakseg.classes import ClassTable
from weakseg.datasets.common import (
    BACKGROUND_NAMES,
    Complain,
    class_table,
    read_class_list,
    read_lines,
    read_text,
    stop,
    tag_indices,
    unique,
)
from weakseg.datasets.sample import Dataset, Sample
from weakseg.errors import DatasetError
from weakseg.recipe import DataConfig

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG")

# names of the classes in an image, and where that is written; None = nothing is said about this image
TagSource = Callable[[str], tuple[str, list[str]] | None]


def load(config: DataConfig, split: str, complain: Complain = stop) -> Dataset:
    """One split of a VOC-layout folder, in the order of its list."""
    root = Path(config.root)
    source = _source_name(root, config)
    if source == "labels.json":
        labels = _labels_json(root)
        names, tags_of = (_json_classes(labels, config, root), _json_tags(labels, config, root))
    elif source == "xml":
        names, tags_of = _xml_classes(root, config), _xml_tags(root)
    else:
        names, tags_of = (_imageset_classes(root, config), _imageset_tags(root, config, split, complain))
    classes = class_table(_ordered(root, names), root)
    if split not in _splits(config):
        tags_of = _none_where_silent(tags_of)
    samples = [
        (where, sample)
        for where, sample_id in _split_lines(root, split)
        if (sample := _sample(root, sample_id, where, classes, tags_of, complain))
    ]
    return Dataset(classes, unique(samples, complain), split, root)


def _sample(
    root: Path, sample_id: str, where: str, classes: ClassTable, tags_of: TagSource, complain: Complain
) -> Sample | None:
    tags: tuple[int, ...] = ()
    try:
        if (said := tags_of(sample_id)) is None:
            complain(where, f"expected tags for image {sample_id!r}, got none in its label source")
        else:
            tags = tag_indices(said[1], classes, said[0], complain)
    except DatasetError as error:
        complain(where, str(error))
    candidates = [root / "JPEGImages" / f"{sample_id}{suffix}" for suffix in IMAGE_SUFFIXES]
    image = next((path for path in candidates if path.is_file()), None)
    if image is None:
        complain(where, f"expected the image {candidates[0]} (or .jpeg, .png, .webp), got no such file")
        return None
    return Sample(sample_id, image, tags)


def _none_where_silent(tags_of: TagSource) -> TagSource:
    return lambda sample_id: tags_of(sample_id) or ("", [])


def _split_lines(root: Path, split: str) -> list[tuple[str, str]]:
    """("file:line", id) of a split's list."""
    candidates = [root / "ImageSets" / folder / f"{split}.txt" for folder in ("Segmentation", "Main")]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise DatasetError(f"expected the list of split {split!r} in {candidates[0]}, got no such file")
    return [(where, line.split()[0]) for where, line in read_lines(path)]


def _source_name(root: Path, config: DataConfig) -> str:
    if not root.is_dir():
        raise DatasetError(f"expected a dataset folder, got {root}: no such folder")
    if config.tags != "auto":
        return config.tags
    if (root / "labels.json").is_file():
        return "labels.json"
    if (root / "Annotations").is_dir():
        return "xml"
    if any((root / "ImageSets" / "Main").glob("*_*.txt")):
        return "imagesets"
    raise DatasetError(
        f"{root}: expected image-level labels in labels.json, Annotations/*.xml or ImageSets/Main/<class>_<split>.txt, "
        "got none of them: masks are never a source of tags"
    )


def _ordered(root: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """The class names in mask order: classes.txt where there is one, else as the label source has them."""
    path = root / "classes.txt"
    return read_class_list(path) if path.is_file() else names


def _labels_json(root: Path) -> dict[str, Any]:
    path = root / "labels.json"
    try:
        labels = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}:{error.lineno}: expected JSON, got: {error.msg}") from error
    if not isinstance(labels, dict) or not isinstance(labels.get("images"), dict):
        raise DatasetError(f'{path}: expected {{"classes": [names], "images": {{id: {{...}}}}}}, got something else')
    return labels


def _json_tags(labels: dict[str, Any], config: DataConfig, root: Path) -> TagSource:
    def tags_of(sample_id: str) -> tuple[str, list[str]] | None:
        where = f"{root / 'labels.json'}: images[{sample_id!r}]"
        entry = labels["images"].get(sample_id)
        if entry is None:
            return None
        if not isinstance(entry, dict) or config.tags_key not in entry:
            known = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise DatasetError(f"{where}: expected the key {config.tags_key!r}, got {known}: set data.tags_key")
        names = entry[config.tags_key]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DatasetError(f"{where}[{config.tags_key!r}]: expected a list of class names, got {names!r}")
        return where, names

    return tags_of


def _json_classes(labels: dict[str, Any], config: DataConfig, root: Path) -> tuple[str, ...]:
    names = labels.get("classes")
    if names is None:
        return _all_names(_json_tags(labels, config, root), labels["images"])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DatasetError(f"{root / 'labels.json'}: expected a list of names under 'classes', got {names!r}")
    classes = tuple(names[1:] if names and names[0] in BACKGROUND_NAMES else names)
    if (root / "classes.txt").is_file() and classes != read_class_list(root / "classes.txt"):
        raise DatasetError(f"{root / 'classes.txt'}: expected the classes of labels.json in the same order, got others")
    return classes


def _xml_tags(root: Path) -> TagSource:
    def tags_of(sample_id: str) -> tuple[str, list[str]] | None:
        path = root / "Annotations" / f"{sample_id}.xml"
        if not path.is_file():
            return None
        try:
            objects = ET.fromstring(read_text(path)).findall("object")
        except ET.ParseError as error:
            raise DatasetError(f"{path}:{error.position[0]}: expected XML, got: {error}") from error
        names = [item.findtext("name", "").strip() for item in objects]  # direct child: object/part/name is no tag
        return str(path), names

    return tags_of


def _xml_classes(root: Path, config: DataConfig) -> tuple[str, ...]:
    """Sorted names in the annotations of every configured split, so that each split has the same table."""
    if (root / "classes.txt").is_file():
        return ()
    ids = {sample_id for split in _splits(config) for _, sample_id in _split_lines_if_there(root, split)}
    return _all_names(_xml_tags(root), ids)


def _all_names(tags_of: TagSource, ids: Iterable[str]) -> tuple[str, ...]:
    """Sorted union; an image whose tags cannot be read is left to the one who asks for that image."""
    names: set[str] = set()
    for sample_id in ids:
        with suppress(DatasetError):
            names.update((tags_of(sample_id) or ("", []))[1])
    return tuple(sorted(names))


def _imageset_classes(root: Path, config: DataConfig) -> tuple[str, ...]:
    """Sorted class names in the file names of ImageSets/Main."""
    main = root / "ImageSets" / "Main"
    endings = [f"_{split}.txt" for split in (*_splits(config), "trainval")]
    found = {path.name.removesuffix(end) for end in endings for path in main.glob(f"*{end}")}
    if not found:
        raise DatasetError(f"{main}: expected <class>_{config.train}.txt files, got none")
    return tuple(sorted(found))


def _imageset_tags(root: Path, config: DataConfig, split: str, complain: Complain) -> TagSource:
    """Tags from ImageSets/Main. A split without files of its own (`tune`) is looked up in those of the other splits."""
    main = root / "ImageSets" / "Main"
    present: dict[str, list[str]] = {}
    where_of: dict[str, str] = {}
    for name in _imageset_classes(root, config):
        for candidate in dict.fromkeys((split, "trainval", *_splits(config))):
            path = main / f"{name}_{candidate}.txt"
            for where, line in read_lines(path) if path.is_file() else ():
                sample_id, flag = (*line.split(), "", "")[:2]
                if flag not in ("1", "0", "-1"):
                    complain(where, f"expected `<id> 1`, `<id> 0` or `<id> -1`, got {line!r}")
                    continue
                names = present.setdefault(sample_id, [])
                where_of.setdefault(sample_id, where)
                if flag != "-1":
                    names.append(name)

    def tags_of(sample_id: str) -> tuple[str, list[str]] | None:
        return (where_of[sample_id], present[sample_id]) if sample_id in present else None

    return tags_of


def _splits(config: DataConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys(split for split in (config.train, config.val, config.tune) if split))


def _split_lines_if_there(root: Path, split: str) -> list[tuple[str, str]]:
    try:
        return _split_lines(root, split)
    except DatasetError:
        return []
