import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from weakseg.datasets import Dataset, coco_index, read
from weakseg.datasets.check import check
from weakseg.datasets.coco_index import cache_path, index
from weakseg.datasets.commands import main
from weakseg.datasets.stats import stats
from weakseg.datasets.truth import has_truth, open_truth, trusted
from weakseg.errors import DatasetError, SealedTruthError, UnknownClassError
from weakseg.recipe import DataConfig

CATEGORIES = {1: "person", 90: "cat", 17: "dog"}  # out of order, with holes
SECRET = 123456.75  # in every segmentation, box and area
LONG_AGO = (1_500_000_000, 1_500_000_000)

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/weakseg/coco"


def annotation(number: int, image: int, category: int, **more: Any) -> dict[str, Any]:
    ring = [0, 0, SECRET, 0, SECRET, 2, 0, 2]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": [ring],
        "bbox": [0, 0, SECRET, 2],
        "area": SECRET,
        "iscrowd": 0,
    } | more


def instances(**files: list[int]) -> dict[str, Any]:
    """Images by name, each with the categories of its annotations."""
    images = [{"id": 500 - n, "file_name": name, "height": 4, "width": 6} for n, name in enumerate(files)]
    pairs = [(500 - n, category) for n, categories in enumerate(files.values()) for category in categories]
    return {
        "info": {"year": 2020},
        "images": images,
        "annotations": [annotation(n, *pair) for n, pair in enumerate(pairs)],
        "categories": [{"id": number, "name": name, "supercategory": "x"} for number, name in CATEGORIES.items()],
    }


def write(path: Path, content: object, *, settled: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    if settled:
        os.utime(path, LONG_AGO)


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (len(path.parts) % 5, hash(path.name) % 200, 1)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """COCO's own layout, with four images."""
    root = tmp_path / "set"
    train = instances(**{"a.jpg": [90, 1, 90], "b.jpg": [17], "c.jpg": []})
    train["annotations"].reverse()
    write(root / "annotations/instances_train.json", train)
    write(root / "annotations/instances_val.json", instances(**{"d.jpg": [1]}))
    for name in ("train/a.jpg", "train/b.jpg", "train/c.jpg", "val/d.jpg"):
        write_image(root / name)
    return root


@pytest.fixture
def config(root: Path) -> DataConfig:
    return DataConfig(root=str(root), format="coco")


def tags(dataset: Dataset) -> dict[str, list[str]]:
    return {sample.id: [dataset.classes.names[c] for c in sample.tags] for sample in dataset}


def content_of(root: Path, split: str = "train") -> dict[str, Any]:
    """Read by another process: this one may have sealed it."""
    path = root / f"annotations/instances_{split}.json"
    return json.loads(subprocess.run(["cat", path], capture_output=True, check=True).stdout)


def edited(root: Path, edit: Edit, split: str = "train") -> None:
    content = content_of(root, split)
    edit(content)
    write(root / f"annotations/instances_{split}.json", content, settled=False)


# Reading --------------------------------------------------------------------------------------------------------------


def test_tags_are_the_categories_of_the_annotations(config: DataConfig) -> None:
    dataset = read(config, "train")
    assert tags(dataset) == {"a": ["person", "cat"], "b": ["dog"], "c": []}
    assert dataset.classes.names == ("person", "dog", "cat"), "in the order of the ids"
    assert [sample.image for sample in dataset] == [Path(config.root) / "train" / f"{i}.jpg" for i in "abc"]
    assert tags(read(config, "val")) == {"d": ["person"]}
    assert read(config, "val").classes == dataset.classes


def test_samples_are_a_sequence(config: DataConfig) -> None:
    samples = read(config, "train").samples
    assert len(samples) == 3 and samples[-1] == samples[2] == list(samples)[2]
    assert samples[::2] == (samples[0], samples[2]) and samples[:16] == tuple(samples)
    assert samples[0].tag_vector(3).tolist() == [True, False, True]
    with pytest.raises(IndexError):
        samples[3]


@pytest.mark.parametrize("folder", ["train", "images/train", "images", "."])
def test_where_images_may_be(root: Path, folder: str, config: DataConfig) -> None:
    here = root / "elsewhere"
    (root / "train").rename(here)
    (root / folder).parent.mkdir(exist_ok=True)
    if folder == ".":
        for path in here.iterdir():
            path.rename(root / path.name)
    else:
        here.rename(root / folder)
    assert [sample.image for sample in read(config, "train")] == [root / folder / f"{i}.jpg" for i in "abc"]


def test_a_tune_list_of_training_images(root: Path, config: DataConfig) -> None:
    write(root / "annotations/instances_tune.json", instances(**{"b.jpg": [17]}))
    config = replace(config, tune="tune")
    (sample,) = read(config, "tune")
    assert sample == read(config, "train").samples[1]


def test_the_file_itself_as_root(tmp_path: Path) -> None:
    write(tmp_path / "set/labels.json", instances(**{"x/a.jpg": [1], "b.png": []}))
    write_image(tmp_path / "set/images/x/a.jpg")
    write_image(tmp_path / "set/images/b.png")
    config = DataConfig(root=str(tmp_path / "set/labels.json"), format="coco")
    assert tags(read(config, "train")) == tags(read(config, "val")) == {"x/a": ["person"], "b": []}


def test_classes_txt_gives_the_order_and_may_lack_categories_that_nobody_uses(root: Path, config: DataConfig) -> None:
    (root / "classes.txt").write_text("background\ncat\nowl\nperson\ndog\n")
    assert read(config, "train").classes.names == ("cat", "owl", "person", "dog")
    assert tags(read(config, "train"))["a"] == ["cat", "person"]
    (root / "classes.txt").write_text("person\ncat\n")
    assert tags(read(config, "val")) == {"d": ["person"]}
    with pytest.raises(UnknownClassError, match=r"instances_train.json: category 17: unknown class 'dog'"):
        read(config, "train")


def test_a_category_called_background_is_no_class(root: Path, config: DataConfig) -> None:
    edited(root, lambda content: content["categories"].append({"id": 0, "name": "background"}))
    edited(root, lambda content: content["annotations"].append(annotation(77, 498, 0)))
    dataset = read(config, "train")
    assert dataset.classes.names == ("person", "dog", "cat") and tags(dataset)["c"] == []
    with trusted("scorer", __name__):
        assert not open_truth(config, "train", opener="scorer").mask("c").any()


def test_crowds_are_tags_too(root: Path, config: DataConfig) -> None:
    edited(root, lambda content: content["annotations"].append(annotation(9, 498, 17, iscrowd=1)))
    assert tags(read(config, "train"))["c"] == ["dog"]


def test_a_category_is_the_same_in_every_split(root: Path, config: DataConfig) -> None:
    edited(root, lambda content: content["categories"].append({"id": 3, "name": "owl"}), "val")
    assert read(config, "train").classes.names == ("person", "owl", "dog", "cat")
    edited(root, lambda content: content["categories"].append({"id": 3, "name": "bat"}))
    with pytest.raises(DatasetError, match="'bat' and 'owl' with the id 3"):
        read(config, "train")


@given(data=st.data())
def test_any_file_is_read_as_by_hand(data, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ids of any size and order, lists in any order."""
    number = st.integers(-(2**63), 2**63 - 1)
    image_ids = data.draw(st.lists(number, unique=True, max_size=6))
    category_ids = data.draw(st.lists(number, unique=True, min_size=1, max_size=5))
    pairs = st.tuples(st.sampled_from(image_ids), st.sampled_from(category_ids), st.booleans())
    drawn = data.draw(st.lists(pairs, max_size=12)) if image_ids else []
    lists = {
        "images": [{"id": n, "file_name": f"{at}.png", "height": 5, "width": at + 1} for at, n in enumerate(image_ids)],
        "annotations": [
            {"image_id": i, "category_id": c, "segmentation": [[1, 2, 3, 4, 5, 6]] if mask else []}
            for i, c, mask in drawn
        ],
        "categories": [{"id": n, "name": f"class {n}"} for n in category_ids],
    }
    content = {key: lists[key] for key in data.draw(st.permutations(list(lists)))}
    path = tmp_path_factory.mktemp("any") / "instances.json"
    write(path, content, settled=False)
    raw = path.read_bytes()
    found = index(path)
    assert found.names == tuple(f"{at}.png" for at in range(len(image_ids))) and not found.problems
    assert [*found.categories] == sorted(category_ids)
    ids = [*found.categories]
    for row, number_of_image in enumerate(image_ids):
        mine = [one for one in lists["annotations"] if one["image_id"] == number_of_image]
        shown = [ids[at] for at in found.tags[found.tag_starts[row] : found.tag_starts[row + 1]]]
        assert shown == sorted({one["category_id"] for one in mine})
        spans = found.spans[found.span_starts[row] : found.span_starts[row + 1]].tolist()
        assert [json.loads(raw[begin:end]) for begin, end in spans] == mine
        assert found.sizes[row].tolist() == [5, row + 1]
        some = any(one["segmentation"] for one in lists["annotations"])
        assert found.has_mask[row] == (some and all(one["segmentation"] for one in mine))


KEYS = st.sampled_from(["id", "file_name", "image_id", "category_id", "name", "height", "width", "segmentation"])
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 2)
    | st.floats()
    | st.sampled_from(["a", "..", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
)


@given(content=st.fixed_dictionaries(dict.fromkeys(["images", "annotations", "categories"], st.lists(ANYTHING))))
def test_whatever_a_file_holds_is_read_or_complained_about(content, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "instances.json"
    write(path, content, settled=False)
    found = index(path)
    n_told = len(found.problems) + len(found.names) + len(found.categories) + len(found.spans)
    assert n_told == sum(map(len, content.values()))
    assert len(found.names) == len(found.sizes) == len(found.has_mask) == len(found.tag_starts) - 1


# Problems -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["images"].append(7), r"images\[3\]: expected an object"),
        (lambda c: c["images"].append({"id": 500, "file_name": "e.jpg"}), r"images\[3\]: expected an id .* got 500"),
        (lambda c: c["images"].append({"id": True, "file_name": "e.jpg"}), r"images\[3\]: expected an id .* got True"),
        (lambda c: c["images"].append({"id": 2**63, "file_name": "e.jpg"}), r"images\[3\]: expected an id"),
        (lambda c: c["images"].append({"id": 7}), r"images\[3\]: expected a file_name .* got None"),
        (lambda c: c["images"].append({"id": 7, "file_name": "../e.jpg"}), r"images\[3\]: expected a file_name"),
        (lambda c: c["images"].append({"id": 7, "file_name": "/e.jpg"}), r"images\[3\]: expected a file_name"),
        (lambda c: c["images"].append({"id": 7, "file_name": "\ud800.jpg"}), r"images\[3\]: expected a file_name"),
        (lambda c: c["images"].append({"id": 7, "file_name": "a.png"}), r"images\[3\]: expected every image once"),
        (lambda c: c["categories"].append({"id": 1, "name": "owl"}), r"categories\[3\]: expected an id"),
        (lambda c: c["categories"].append({"id": 2, "name": " "}), r"categories\[3\]: expected a name"),
        (lambda c: c["annotations"].append({"image_id": 500}), r"annotations\[4\]: expected whole numbers"),
        (lambda c: c["annotations"].append(annotation(9, 7, 1)), r"at byte \d+: expected the id of an image .* got 7"),
        (lambda c: c["annotations"].append(annotation(9, 500, 2)), r"expected the id of a category .* got 2"),
        (lambda c: c.pop("annotations"), "got no list of annotations"),
        (lambda c: c.update(images={}), "got no list of images"),
        (lambda c: c["categories"].append({"id": 2, "name": "cat"}), "class names must differ, got cat"),
        (lambda c: c["images"].clear(), r"expected the id of an image"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(root, config, edit: Edit, message: str) -> None:
    edited(root, edit)
    for _ in range(2):  # also when it comes from the cache
        with pytest.raises(DatasetError, match=message):
            read(config, "train")
        os.utime(root / "annotations/instances_train.json", LONG_AGO)


def test_missing_things(root: Path, config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"annotations of split 'test' in \S*instances_test.json, got no such file"):
        read(config, "test")
    with pytest.raises(DatasetError, match="got no such file"):
        read(replace(config, root=str(tmp_path / "absent")), "train")
    (root / "train/b.jpg").unlink()
    with pytest.raises(DatasetError, match=r"expected the image \S*train/b.jpg, got no such file"):
        read(config, "train")
    (root / "annotations/instances_val.json").write_text("{")
    with pytest.raises(DatasetError, match="instances_val.json: expected JSON at byte 1"):
        read(config, "val")
    write(root / "annotations/instances_train.json", instances())
    with pytest.raises(DatasetError, match="got an empty split"):
        read(config, "train")


# The index in the cache -----------------------------------------------------------------------------------------------


def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are parsed from now on, by a process that knows none yet."""
    files: list[Path] = []
    make = coco_index._made

    def made(path: Path, key: tuple[int, int]) -> coco_index.Index:
        files.append(path)
        return make(path, key)

    coco_index._kept.cache_clear()
    monkeypatch.setattr(coco_index, "_made", made)
    return files


def same(one: coco_index.Index, two: coco_index.Index) -> bool:
    pairs = [(getattr(one, field.name), getattr(two, field.name)) for field in fields(coco_index.Index)]
    return all(type(a) is type(b) and np.array_equal(a, b) for a, b in pairs)


def test_a_file_is_parsed_once(config: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = parsed(monkeypatch)
    first = read(config, "train")
    assert len(files) == len(list(cache.iterdir())) == 2
    assert [*read(config, "train")] == [*first] and len(files) == 2
    coco_index._kept.cache_clear()  # as another process
    assert [*read(config, "train")] == [*first] and len(files) == 2


def test_the_cache_has_all_of_the_index(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "annotations/instances_train.json"
    made = index(path)
    coco_index._kept.cache_clear()
    monkeypatch.setattr(coco_index, "_made", None)
    assert same(index(path), made)


def test_a_file_that_changed_is_parsed_again(root: Path, config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read(config, "train")
    files = parsed(monkeypatch)
    write(root / "annotations/instances_train.json", instances(**{"a.jpg": [17]}))
    assert tags(read(config, "train")) == {"a": ["dog"]} and len(files) == 1


def test_one_that_may_still_change_is_not_kept(root: Path, config: DataConfig, cache: Path) -> None:
    path = root / "annotations/instances_train.json"
    for category in (90, 17, 90, 17):  # files of one size, perhaps within a tick of the clock
        write(path, instances(**{"a.jpg": [category]}), settled=False)
        assert tags(read(config, "train")) == {"a": [CATEGORIES[category]]}
    assert not any("train" in kept.name for kept in cache.iterdir())


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"PK\x03\x04"])
def test_a_damaged_cache_is_made_again(root: Path, config: DataConfig, cache: Path, damage, monkeypatch) -> None:
    first = [*read(config, "train")]
    kept = cache_path(root / "annotations/instances_train.json")
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert len(parsed(monkeypatch)) == 0
    assert [*read(config, "train")] == first
    assert kept.read_bytes() == whole


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_damage_of_the_cache_is_fatal(at: int, bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("damage")
    path, where = folder / "instances.json", folder / "cache.npz"
    write(path, instances(**{"a.jpg": [1], "b.jpg": []}))
    key = (path.stat().st_size, path.stat().st_mtime_ns)
    made = coco_index._made(path, key)
    coco_index._keep(where, key, made)
    data = bytearray(where.read_bytes())
    data[at % len(data)] ^= 1 << bit
    where.write_bytes(data)
    found = coco_index._cached(where, key)
    assert found is None or same(found, made)


def test_another_state_or_an_older_index_is_not_taken(root: Path, cache: Path, monkeypatch) -> None:
    path = root / "annotations/instances_train.json"
    index(path)
    key = (path.stat().st_size, path.stat().st_mtime_ns)
    assert coco_index._cached(cache_path(path), key) is not None
    assert coco_index._cached(cache_path(path), (key[0] + 1, key[1])) is None
    assert coco_index._cached(cache_path(path), (key[0], key[1] + 1)) is None
    monkeypatch.setattr(coco_index, "SCHEMA", coco_index.SCHEMA + 1)
    assert coco_index._cached(cache_path(path), key) is None


def test_without_a_cache_folder_it_works_too(config: DataConfig, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(read(config, "train")) == 3
    coco_index._kept.cache_clear()
    monkeypatch.setattr(coco_index, "cache_path", lambda path: Path("~nobody-at-all").expanduser())
    assert len(read(config, "train")) == 3


def test_a_file_that_changes_while_it_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "annotations/instances_train.json"
    take_all = coco_index._Reading.take_all

    def meanwhile(self, found: Iterator[Any]) -> None:
        take_all(self, found)
        os.utime(path, (1, 1))

    monkeypatch.setattr(coco_index._Reading, "take_all", meanwhile)
    coco_index._kept.cache_clear()
    with pytest.raises(DatasetError, match="changed while it was read"):
        index(path)


# The seal -------------------------------------------------------------------------------------------------------------


def test_the_annotations_are_sealed_from_the_first_read_on(root: Path, config: DataConfig, tmp_path: Path) -> None:
    train = root / "annotations/instances_train.json"
    (root / "annotations/person_keypoints_val.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(train)
    read(config, "train")
    ways: list[Callable[[], object]] = [
        train.read_text,
        Path(os.path.relpath(train)).open,
        lambda: os.open(train, os.O_RDONLY),
        lambda: np.fromfile(train),
        (root / "annotations/instances_val.json").read_bytes,
        (root / "annotations/person_keypoints_val.json").read_bytes,
        (tmp_path / "link.json").read_text,
    ]
    for way in ways:
        with pytest.raises(SealedTruthError, match="training from image-level labels must not see it"):
            way()
    assert (root / "train/a.jpg").read_bytes()


def test_pycocotools_cannot_look_either(root: Path, config: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "annotations/instances_train.json"
    assert len(COCO(str(path)).anns) == 4
    read(config, "train")
    with pytest.raises(SealedTruthError):
        COCO(str(path))


def test_a_linked_file_is_sealed_where_it_really_is(root: Path, config: DataConfig, tmp_path: Path) -> None:
    path = root / "annotations/instances_train.json"
    path.rename(tmp_path / "real.json")
    path.symlink_to(tmp_path / "real.json")
    read(config, "train")
    for name in (path, tmp_path / "real.json"):
        with pytest.raises(SealedTruthError):
            name.read_text()


def test_a_file_as_root_seals_itself_and_nothing_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "set.json", instances(**{"a.jpg": [1]}))
    (tmp_path / "set.json.txt").write_text("beside it")
    write_image(tmp_path / "a.jpg")
    read(DataConfig(root=str(tmp_path / "set.json"), format="coco"), "train")
    with pytest.raises(SealedTruthError):
        (tmp_path / "set.json").read_text()
    assert (tmp_path / "set.json.txt").read_text() == "beside it"


def test_nothing_of_masks_boxes_or_areas_is_kept(root: Path, config: DataConfig, cache: Path) -> None:
    """SECRET stands in each of them; every number of the index is looked at."""
    dataset = read(config, "train")
    found = index(root / "annotations/instances_train.json")
    assert SECRET in content_of(root)["annotations"][0]["bbox"]
    arrays = [value for value in vars(found).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 6 and not any(array.dtype.kind == "f" for array in arrays)
    assert {"segmentation", "bbox", "area", "iscrowd"}.isdisjoint(vars(found))
    written = b"".join(path.read_bytes() for path in cache.iterdir())
    for kept in (pickle.dumps(dataset), written):
        assert str(int(SECRET)).encode() not in kept
        assert np.float64(SECRET).tobytes() not in kept and np.int64(SECRET).tobytes() not in kept


WORKER = """
import multiprocessing, sys
from weakseg.datasets import read
from weakseg.errors import SealedTruthError
from weakseg.recipe import DataConfig

def method(sample):
    try:
        open(sample.image.parent.parent / "annotations/instances_train.json")
    except SealedTruthError:
        return "sealed"
    return "open"

if __name__ == "__main__":
    samples = read(DataConfig(root=sys.argv[1], format="coco"), "train").samples
    for start in ("fork", "spawn"):
        with multiprocessing.get_context(start).Pool(1) as pool:
            print(start, *pool.map(method, samples))
"""


def test_worker_processes_are_sealed_too(root: Path, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(WORKER)
    environment = {key: value for key, value in os.environ.items() if key != "WEAKSEG_SEALED"}
    environment["PYTHONPATH"] = os.getcwd()
    command = [sys.executable, tmp_path / "job.py", root]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split("\n") == ["fork sealed sealed sealed", "spawn sealed sealed sealed", ""]


def test_the_door_is_named_in_three_modules() -> None:
    door = re.compile(r"\bopen_sealed\(|\b_unlocked\b")
    users = {
        str(path)
        for package in ("weakseg", "training", "export", "serve")
        for path in Path(package).rglob("*.py")
        if door.search(path.read_text())
    }
    folder = "weakseg/datasets/"
    assert users == {folder + name for name in ("sealed.py", "truth.py", "coco_index.py", "coco_masks.py")}


# Verbs ----------------------------------------------------------------------------------------------------------------


def test_check_finds_everything_in_one_pass(root: Path, config: DataConfig) -> None:
    assert [f.message for f in check(config) if f.level == "error"] == []
    edited(root, lambda c: c["images"].append({"id": 500, "file_name": "e.jpg"}))
    edited(root, lambda c: c["annotations"].append(annotation(9, 499, 17, segmentation=[])))
    edited(root, lambda c: c["annotations"].append(annotation(9, 498, 17, segmentation=[[1, 2]])))
    edited(root, lambda c: c["images"].append({"id": 1, "file_name": "missing.jpg"}))
    edited(root, lambda c: c["images"][0].update(height=9), "val")
    for workers in (1, 2):
        found = [f"{f.level}: {f.where}: {f.message}" for f in check(config, workers=workers)]
        for part in (
            "error: .*images.3.: expected an id that is a whole number of its own",
            "error: .*expected the image .*missing.jpg",
            "warning: .*b.jpg: expected a mask in .*instances_train.json: b, got none",
            "error: .*c.jpg: .*instances_train.json: c: expected a polygon",
            "error: .*d.jpg: .*d: expected the size of its image, 6x4, got 6x9",
        ):
            assert any(re.match(part, line) for line in found), (part, found)


def test_check_goes_on_where_a_file_is_damaged(root: Path, config: DataConfig) -> None:
    (root / "annotations/instances_val.json").write_text('{"images": [')
    errors = [f.message for f in check(config) if f.level == "error"]
    assert len(errors) == 1 and "instances_val.json: expected JSON at byte 12" in errors[0]


def test_stats_and_the_verbs(root: Path, config: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert stats(read(config, "train")).counts == (1, 1, 1)
    assert main(["stats", str(root), "--format", "coco", "--json"]) == 0
    train, _ = json.loads(capsys.readouterr().out)
    assert train["classes"] == {"person": 1, "dog": 1, "cat": 1}
    assert main(["check", str(root), "--format", "coco"]) == 0
    assert "0 errors" in capsys.readouterr().out


def test_boxes_alone_are_no_truth(root: Path, config: DataConfig) -> None:
    for split in ("train", "val"):
        edited(root, lambda c: [one.update(segmentation=[]) for one in c["annotations"]], split)
    assert not has_truth(config) and tags(read(config, "train"))["b"] == ["dog"]
    assert [f.message for f in check(config) if f.level == "error"] == []
