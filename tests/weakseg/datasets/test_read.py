import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from weakseg.datasets import Dataset, read
from weakseg.errors import DatasetError, UnknownClassError
from weakseg.recipe import DataConfig

WSSS_MINI = Path("../shared/data/wsss-mini")


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2)).save(path)


def tags(dataset: Dataset) -> dict[str, list[str]]:
    return {sample.id: [dataset.classes.names[c] for c in sample.tags] for sample in dataset}


@pytest.mark.parametrize("source", ["labels.json", "xml", "imagesets"])
@pytest.mark.parametrize("named", [False, True])
def test_voc_gives_the_same_from_every_source(make_voc, source: str, named: bool) -> None:
    config = make_voc(source)
    config = replace(config, tags=source) if named else config
    assert tags(read(config, "train")) == {"a": ["cat"], "b": ["cat", "dog"], "c": []}
    assert tags(read(config, "val")) == {"d": ["dog"]}
    assert tags(read(config, "tune")) == {"b": ["cat", "dog"]}
    assert read(config, "val").classes == read(config, "train").classes


@pytest.mark.parametrize("source", ["labels.json", "xml", "imagesets"])
def test_only_images_of_other_splits_may_be_without_labels(make_voc, source: str) -> None:
    config = make_voc(source)
    root = Path(config.root)
    write_image(root / "JPEGImages/e.jpg")
    for split in ("test", "tune"):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("e\nb\n")
    assert tags(read(config, "test")) == {"e": [], "b": ["cat", "dog"]}
    assert read(config, "test").classes == read(config, "train").classes
    with pytest.raises(DatasetError, match="expected tags for image 'e', got none"):
        read(config, "tune")


def test_auto_prefers_labels_json_then_xml(make_voc) -> None:
    config = make_voc("labels.json", "xml", "imagesets")
    root = Path(config.root)
    (root / "Annotations" / "a.xml").write_text("<annotation><object><name>dog</name></object></annotation>")
    assert tags(read(config, "train"))["a"] == ["cat"]
    (root / "labels.json").unlink()
    assert tags(read(config, "train"))["a"] == ["dog"]
    assert tags(read(replace(config, tags="imagesets"), "train"))["a"] == ["cat"]


def test_a_difficult_object_counts_as_present(make_voc) -> None:
    config = make_voc("imagesets")
    (Path(config.root) / "ImageSets" / "Main" / "dog_train.txt").write_text("a  0\nb  1\nc -1\n")
    assert tags(read(config, "train"))["a"] == ["cat", "dog"]


def test_tags_key_names_the_list(make_voc) -> None:
    config = make_voc()
    path = Path(config.root) / "labels.json"
    labels = json.loads(path.read_text())
    for entry in labels["images"].values():
        entry["boxes"] = ["dog"]
    path.write_text(json.dumps(labels))
    assert tags(read(replace(config, tags_key="boxes"), "train")) == {"a": ["dog"], "b": ["dog"], "c": ["dog"]}
    with pytest.raises(DatasetError, match=r"expected the key 'nope', got labels, boxes: set data.tags_key"):
        read(replace(config, tags_key="nope"), "train")


def test_classes_txt_gives_the_order_and_may_list_background(make_voc) -> None:
    config = make_voc("xml")
    (Path(config.root) / "classes.txt").write_text("background\ndog\ncat\nowl\n")
    assert read(config, "train").classes.names == ("dog", "cat", "owl")


def test_contradicting_class_orders_are_refused(make_voc) -> None:
    config = make_voc()
    (Path(config.root) / "classes.txt").write_text("dog\ncat\n")
    with pytest.raises(DatasetError, match="expected the classes of labels.json in the same order"):
        read(config, "train")


def test_main_list_and_other_suffixes(make_voc) -> None:
    config = make_voc("imagesets")
    root = Path(config.root)
    (root / "ImageSets" / "Segmentation" / "train.txt").rename(root / "ImageSets" / "Main" / "train.txt")
    (root / "JPEGImages" / "a.jpg").unlink()
    write_image(root / "JPEGImages" / "a.png")
    dataset = read(config, "train")
    assert [sample.image.name for sample in dataset] == ["a.png", "b.jpg", "c.jpg"]


def test_no_mask_is_ever_a_source_of_tags(make_voc) -> None:
    config = make_voc()
    (Path(config.root) / "labels.json").unlink()
    with pytest.raises(DatasetError, match="masks are never a source of tags"):
        read(config, "train")


@pytest.mark.parametrize(
    ("file", "text", "error", "message"),
    [
        ("ImageSets/Segmentation/train.txt", "a\nb\nzz\n", DatasetError, r"train.txt:3: expected tags for image 'zz'"),
        ("ImageSets/Segmentation/train.txt", "a\n\na\n", DatasetError, r"train.txt:3: expected every id once, got 'a'"),
        ("ImageSets/Segmentation/train.txt", "\n", DatasetError, r"got an empty split"),
        ("labels.json", "{", DatasetError, r"labels.json:1: expected JSON"),
        ("labels.json", "[]", DatasetError, r"labels.json: expected"),
        ("labels.json", '{"classes": [], "images": {}}', DatasetError, r"expected 1 to \d+ classes, got 0"),
        ("labels.json", '{"classes": "cat", "images": {}}', DatasetError, r"expected a list of names under 'classes'"),
        (
            "labels.json",
            '{"classes": ["cat", "dog"], "images": {"a": {"labels": ["dgo"]}}}',
            UnknownClassError,
            r"images\['a'\]: unknown class 'dgo': did you mean 'dog'",
        ),
        (
            "labels.json",
            '{"classes": ["cat"], "images": {"a": {"labels": "cat"}}}',
            DatasetError,
            r"images\['a'\]\['labels'\]: expected a list of class names, got 'cat'",
        ),
    ],
)
def test_voc_problems_name_file_and_place(make_voc, file: str, text: str, error, message: str) -> None:
    config = make_voc()
    (Path(config.root) / file).write_text(text)
    with pytest.raises(error, match=message):
        read(config, "train")


def test_voc_missing_things(make_voc, tmp_path: Path) -> None:
    config = make_voc()
    with pytest.raises(DatasetError, match="list of split 'test'"):
        read(config, "test")
    (Path(config.root) / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(DatasetError, match=r"train.txt:2: expected the image .*b.jpg .* got no such file"):
        read(config, "train")
    with pytest.raises(DatasetError, match="no such folder"):
        read(DataConfig(root=str(tmp_path / "absent")), "train")


@pytest.mark.parametrize(("flag", "line"), [("a 2", 1), ("a", 1)])
def test_bad_imageset_flag(make_voc, flag: str, line: int) -> None:
    config = make_voc("imagesets")
    (Path(config.root) / "ImageSets" / "Main" / "dog_train.txt").write_text(f"{flag}\n")
    with pytest.raises(DatasetError, match=rf"dog_train.txt:{line}: expected `<id> 1`"):
        read(config, "train")


def test_broken_xml(make_voc) -> None:
    config = make_voc("xml")
    (Path(config.root) / "Annotations" / "a.xml").write_text("<annotation>\n<object>")
    with pytest.raises(DatasetError, match=r"a.xml:2: expected XML"):
        read(config, "train")


@pytest.mark.parametrize("sample_id", ["../a", "/a", "a\\b"])
def test_ids_cannot_leave_the_folder(make_voc, sample_id: str) -> None:
    config = make_voc()
    root = Path(config.root)
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text(sample_id + "\n")
    with pytest.raises(DatasetError, match="train.txt:1"):
        read(config, "train")


def test_text_that_is_not_utf8(make_voc) -> None:
    config = make_voc()
    (Path(config.root) / "ImageSets" / "Segmentation" / "train.txt").write_bytes(b"a\n\xff\n")
    with pytest.raises(DatasetError, match="train.txt: expected UTF-8 text, got byte 0xff"):
        read(config, "train")


def test_one_class_only(tmp_path: Path) -> None:
    write_image(tmp_path / "owl" / "1.png")
    write_image(tmp_path / "background" / "2.png")
    dataset = read(DataConfig(root=str(tmp_path), format="folder"), "train")
    assert tags(dataset) == {"background/2": [], "owl/1": ["owl"]}
    assert dataset.samples[1].tag_vector(len(dataset.classes)).tolist() == [True]


def csv_config(tmp_path: Path, text: str) -> DataConfig:
    for name in ("a.png", "sub/b.png", "c.png"):
        write_image(tmp_path / name)
    (tmp_path / "set.csv").write_text(text, encoding="utf-8")
    return DataConfig(root=str(tmp_path / "set.csv"), format="csv")


def test_csv(tmp_path: Path) -> None:
    config = csv_config(tmp_path, "\ufeffimage,tags\r\na.png,owl; cat\r\nsub/b.png,\r\n\r\nc.png,owl;owl\r\n")
    dataset = read(config, "train")
    assert dataset.classes.names == ("cat", "owl")
    assert tags(dataset) == {"a": ["cat", "owl"], "sub/b": [], "c": ["owl"]}


def test_csv_with_ids_splits_and_class_list(tmp_path: Path) -> None:
    config = csv_config(tmp_path, "split,id,image,tags\ntrain,one,a.png,owl\nval,two,c.png,owl\n")
    (tmp_path / "classes.txt").write_text("zebra\nowl\n")
    assert read(config, "train").classes.names == ("zebra", "owl")
    assert tags(read(config, "val")) == {"two": ["owl"]}
    with pytest.raises(DatasetError, match="empty split"):
        read(config, "tune")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "set.csv:1: expected the columns image,tags .* got an empty file"),
        ("image,label\na.png,x\n", "got image,label"),
        ("image,tags\na.png,x,y\n", "set.csv:2: expected 2 values"),
        ("image,tags\na.png\n", "set.csv:2: expected 2 values"),
        ("image,tags\na.png,x\nno.png,x\n", "set.csv:3: expected the image .*no.png, got no such file"),
        ("image,tags\n,x\n", "set.csv:2: expected an image path"),
        ('image,tags\n"a.png,x\n', "expected CSV"),
        ("image,tags\na.png,x\na.png,x\n", "set.csv:3: expected every id once"),
        ("image,tags\na.png,\n", "expected 1 to .* classes, got 0"),
    ],
)
def test_csv_problems_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(csv_config(tmp_path, text), "train")


def test_csv_path_outside_its_folder_gets_a_safe_id(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "set.csv").write_text("image,tags\n../a.png,x\n")
    dataset = read(DataConfig(root=str(tmp_path / "lists" / "set.csv"), format="csv"), "train")
    assert [sample.id for sample in dataset] == ["a"]


def test_csv_unknown_class(tmp_path: Path) -> None:
    config = csv_config(tmp_path, "image,tags\na.png,owll\n")
    (tmp_path / "classes.txt").write_text("owl\n")
    with pytest.raises(UnknownClassError, match="set.csv:2: unknown class 'owll': did you mean 'owl'"):
        read(config, "train")


def test_folder_with_links_has_one_sample_a_file(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "deep" / "1.jpg")
    write_image(tmp_path / "dog" / "2.JPG")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    os.symlink(tmp_path / "cat" / "deep" / "1.jpg", tmp_path / "dog" / "also.jpg")
    dataset = read(DataConfig(root=str(tmp_path), format="folder"), "train")
    assert tags(dataset) == {"cat/deep/1": ["cat", "dog"], "dog/2": ["dog"]}


def test_folder_with_splits_shares_the_class_table(tmp_path: Path) -> None:
    for path in ("train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/eel/4.png"):
        write_image(tmp_path / path)
    config = DataConfig(root=str(tmp_path), format="folder")
    assert tags(read(config, "train")) == {"cat/1": ["cat"], "dog/2": ["dog"]}
    assert read(config, "val").classes.names == ("cat", "dog", "eel")
    with pytest.raises(DatasetError, match="one folder per class, got splits train, val"):
        read(replace(config, tune="tune"), "tune")


def test_folder_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    for path in ("train/1.png", "boat/2.png"):
        write_image(tmp_path / path)
    assert read(DataConfig(root=str(tmp_path), format="folder"), "train").classes.names == ("boat", "train")


def test_folder_same_id_twice(tmp_path: Path) -> None:
    for path in ("cat/1.png", "cat/1.jpg"):
        write_image(tmp_path / path)
    with pytest.raises(DatasetError, match="expected every id once, got 'cat/1' again"):
        read(DataConfig(root=str(tmp_path), format="folder"), "train")


@pytest.mark.skipif(not WSSS_MINI.is_dir(), reason="needs ../shared/data/wsss-mini")
def test_wsss_mini() -> None:
    config = DataConfig(root=str(WSSS_MINI), tune="tune", tags_key="voc_box_labels")
    sizes = {split: len(read(config, split)) for split in ("train", "val", "tune")}
    assert sizes == {"train": 1310, "val": 300, "tune": 100}
    from_lists = replace(config, tags="imagesets")
    packed = replace(config, tags_key="labels")
    assert read(from_lists, "tune").samples == read(packed, "tune").samples
