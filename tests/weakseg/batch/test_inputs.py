"""What there is to label, from everything that may be named."""

import io
import json
import os
import tarfile

import fsspec
import pytest

from weakseg.batch.inputs import Item, Question, find_items, read, shard_of
from weakseg.errors import DatasetError, ImageError, UsageError

PNG = b"\x89PNG one"


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jpg", "a.PNG", "sub/c.webp", "sub/.d.png", "notes.md", "sub/e.tar.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def listed(source, **options):
    return find_items(Question(str(source), **options))


def uris(source, **options):
    return [item.uri for item in listed(source, **options)]


def test_a_folder(folder):
    items = listed(folder)
    assert [item.uri for item in items] == ["a.PNG", "b.jpg", "sub/c.webp"]
    assert [item.key for item in items] == ["a", "b", "sub/c"]
    assert [item.size for item in items] == [5, 5, 10] and {item.tags for item in items} == {None}
    assert [read(item) for item in items] == [b"a.PNG", b"b.jpg", b"sub/c.webp"]


def test_a_glob_and_one_image(folder):
    assert uris(folder / "**" / "*.webp") == ["sub/c.webp"]
    assert uris(folder / "*.jpg") == ["b.jpg"]
    assert uris(folder / "b.jpg") == ["b.jpg"]


def test_a_list(folder):
    (folder / "list.txt").write_text(f"b.jpg\n\n# no image\nsub/c.webp\n{folder}/a.PNG\nmissing.png\n")
    items = listed(folder / "list.txt")
    assert [item.uri for item in items] == sorted([f"{folder}/a.PNG", "b.jpg", "missing.png", "sub/c.webp"])
    assert all(not item.key.startswith("/") for item in items)
    by_uri = {item.uri: item for item in items}
    assert read(by_uri["sub/c.webp"]) == b"sub/c.webp"
    with pytest.raises(ImageError, match="expected an image file, got: No such file") as caught:
        read(by_uri["missing.png"])
    assert caught.value.reason == "UNREADABLE"


def test_a_csv_with_tags(folder):
    (folder / "data.csv").write_text("image,tags,owner\nb.jpg,cat; dog,x\nsub/c.webp,,y\n")
    items = listed(folder / "data.csv")
    assert [(item.uri, item.tags) for item in items] == [("b.jpg", ("cat", "dog")), ("sub/c.webp", ())]
    assert read(items[1]) == b"sub/c.webp"
    (folder / "data.csv").write_text("image\nb.jpg\n")
    assert listed(folder / "data.csv")[0].tags is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,tags\na.jpg,cat\n", "expected a column `image`, got path,tags"),
        ("image,tags\n ,cat\n", "data.csv:2: expected an image path, got an empty one"),
        ("", "an empty file"),
    ],
)
def test_a_csv_that_cannot_be_used(folder, text, message):
    (folder / "data.csv").write_text(text)
    with pytest.raises(DatasetError, match=message):
        listed(folder / "data.csv")


def test_a_parquet_file(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = folder / "data.parquet"
    parquet.write_table(pyarrow.table({"image": ["b.jpg", "a.PNG"], "tags": [["cat"], None]}), path)
    assert [(item.uri, item.tags) for item in listed(path)] == [("a.PNG", None), ("b.jpg", ("cat",))]
    parquet.write_table(pyarrow.table({"image": ["b.jpg"], "tags": ["cat;dog"]}), path)
    assert listed(path)[0].tags == ("cat", "dog")
    parquet.write_table(pyarrow.table({"image": [b"bytes"]}), path)
    with pytest.raises(DatasetError, match="expected a column `image` of paths as text"):
        listed(path)
    path.write_bytes(b"no parquet")
    with pytest.raises(DatasetError, match="expected a Parquet file"):
        listed(path)


def shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_tar_shards(tmp_path):
    tags = json.dumps({"tags": ["cat"]}).encode()
    shard(tmp_path / "s-08.tar", {"a.jpg": b"one", "a.json": tags, "x/b.png": b"two", "x/b.cls": b"dog", "c.txt": b""})
    shard(tmp_path / "s-09.tar", {"a.jpg": b"three"})
    items = listed(f"{tmp_path}/s-{{08..09}}.tar")
    assert [(item.uri, item.key, item.tags) for item in items] == [
        ("s-08.tar#a.jpg", "s-08/a", ("cat",)),
        ("s-08.tar#x/b.png", "s-08/x/b", ("dog",)),
        ("s-09.tar#a.jpg", "s-09/a", None),
    ]
    assert [read(item) for item in items] == [b"one", b"two", b"three"]


def test_a_damaged_tar(tmp_path):
    path = tmp_path / "s.tar"
    shard(path, {"a.jpg": b"one" * 400, "b.jpg": b"two" * 400, "c.jpg": b"three"})
    whole = path.read_bytes()
    path.write_bytes(whole[:2050] + b"\xff" * 400 + whole[2450:])  # the header of the second member
    items = listed(path)
    assert [item.uri for item in items] == ["s.tar#", "s.tar#a.jpg"]
    assert read(items[1]) == b"one" * 400
    with pytest.raises(ImageError, match="members after this place are lost"):
        read(items[0])
    path.write_bytes(whole[:2600])  # in the middle of the second member
    cut = {item.uri: item for item in listed(path)}
    assert read(cut["s.tar#a.jpg"]) == b"one" * 400
    with pytest.raises(ImageError, match="the shard is cut off: it ends at byte 2600"):
        read(cut["s.tar#b.jpg"])


def test_a_bucket(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe({"/images/a.jpg": b"one", "/images/x/b.png": b"two", "/images/notes.txt": b""})
    fs.pipe_file("/images/list.txt", b"a.jpg\nmemory://images/x/b.png\ngone.png\n")
    try:
        items = listed("memory://images")
        assert [(item.uri, item.key, item.size) for item in items] == [("a.jpg", "a", 3), ("x/b.png", "x/b", 3)]
        assert [read(item) for item in items] == [b"one", b"two"]
        assert uris("memory://images/**/*.png") == ["x/b.png"]
        named = listed("memory://images/list.txt")
        assert [item.uri for item in named] == ["a.jpg", "gone.png", "memory://images/x/b.png"]
        assert read(named[0]) == b"one" and read(named[2]) == b"two" and named[2].key == "images/x/b"
        with pytest.raises(ImageError, match="expected an image file"):
            read(named[1])
    finally:
        fs.rm("/images", recursive=True)


def test_a_dataset_with_its_tags(tmp_path):
    for name in ("cat/1.jpg", "dog/2.jpg", "background/3.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    items = listed(tmp_path, dataset="folder")
    assert [(item.uri, item.key, item.tags) for item in items] == [
        ("background/3.jpg", "background/3", ()),
        ("cat/1.jpg", "cat/1", ("cat",)),
        ("dog/2.jpg", "dog/2", ("dog",)),
    ]


def test_outputs_never_meet(tmp_path):
    """Two images that differ in their ending, or in case alone; names that are too long or would leave the folder."""
    for name in ("a.jpg", "a.png", "B.jpg", "b.png", "c.jpg", "x" * 240 + ".jpg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "list.txt").write_text("a.jpg\na.png\nB.jpg\nb.png\nc.jpg\n../c.jpg\n" + "x" * 240 + ".jpg\n")
    keys = [item.key for item in listed(tmp_path / "list.txt")]
    assert len({key.casefold() for key in keys}) == len(keys) == 7
    assert {"a.jpg", "a.png", "B.jpg", "b.png"} <= set(keys)
    assert all(len(part.encode()) <= 230 and part not in ("", "..") for key in keys for part in key.split("/"))


def test_names_that_are_no_text(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(path, "wb") as file:
        file.write(b"x")
    (item,) = listed(tmp_path)
    assert item.uri == "caf\\xe9.jpg" and item.key == "caf/xe9" and read(item) == b"x"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nothing", "got nothing by that name"),
        (lambda path: path, "expected images in .*, got none"),
        (lambda path: path / "*.jpg", "expected images in .*, got none"),
    ],
)
def test_nothing_there(tmp_path, make, message):
    with pytest.raises(UsageError, match=message):
        listed(make(tmp_path))


def test_an_image_twice(tmp_path):
    (tmp_path / "list.txt").write_text("a.jpg\na.jpg\n")
    with pytest.raises(DatasetError, match=r"expected every image once, got 'a\.jpg' again"):
        listed(tmp_path / "list.txt")


def test_a_file_that_is_no_file(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    with pytest.raises(ImageError, match="Is a directory"):
        read(Item("x.jpg", "x", str(tmp_path / "x.jpg")))


def test_shards_do_not_move_when_images_come(tmp_path):
    items = [Item(f"{i}.jpg", str(i), f"{i}.jpg") for i in range(1000)]
    shards = [shard_of(items, i, 4) for i in range(4)]
    assert sorted(item.uri for part in shards for item in part) == sorted(item.uri for item in items)
    assert all(200 < len(part) < 300 for part in shards)
    more = [*items, Item("new.jpg", "new", "new.jpg")]
    assert all(set(old) <= set(shard_of(more, i, 4)) for i, old in enumerate(shards))
    assert shard_of(items, 0, 1) == items
