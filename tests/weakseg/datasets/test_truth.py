import os
import pickle
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from weakseg.datasets import read
from weakseg.datasets.truth import OPENERS, Truth, has_truth, open_truth, seal, trusted
from weakseg.errors import DatasetError, SealedTruthError, UnknownClassError
from weakseg.recipe import DataConfig


@pytest.fixture
def config(make_voc) -> DataConfig:
    config = make_voc()
    read(config, "train")
    return config


@pytest.fixture
def mask_path(config: DataConfig) -> Path:
    return Path(config.root) / "SegmentationClass" / "b.png"


def truth(config: DataConfig, split: str = "train", opener: str = "scorer") -> Truth:
    with trusted(opener, __name__):
        return open_truth(config, split, opener=opener)


def save(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


def test_a_named_opener_reads_masks(config: DataConfig) -> None:
    opened = truth(config)
    assert opened.ids == ("a", "b", "c") and opened.has("b") and not opened.has("d")
    labels = opened.mask("b", size=(4, 6))
    assert labels.dtype == np.uint8 and labels.flags.writeable
    np.testing.assert_array_equal(labels, [[1, 1, 0, 0, 0, 0]] * 2 + [[0] * 6] * 2)


@pytest.mark.parametrize("opener", OPENERS)
def test_another_module_cannot_use_the_name(config: DataConfig, opener: str) -> None:
    with pytest.raises(SealedTruthError, match=rf"to open true masks as '{opener}', got module \S*test_truth"):
        open_truth(config, "train", opener=opener)


def test_an_unknown_opener_is_refused(config: DataConfig) -> None:
    with pytest.raises(SealedTruthError, match="expected an opener of true masks"):
        open_truth(config, "train", opener="me")


def test_the_modules_of_the_table_exist_or_are_named_by_the_design() -> None:
    assert {name for modules in OPENERS.values() for name in modules} <= {
        "training.evaluate",
        "training.pseudo_label",
        "training.train_segmentation",
        "weakseg.report",
        "weakseg.datasets.check",
    }


def test_an_id_of_another_split_is_refused(config: DataConfig) -> None:
    with pytest.raises(SealedTruthError, match="expected an id of the opened split"):
        truth(config).mask("d")


def test_validation_split_sees_the_tune_list_only(config: DataConfig) -> None:
    opened = truth(config, "train", "validation_split")
    assert opened.ids == ("b",)
    opened.mask("b")
    with pytest.raises(SealedTruthError):
        opened.mask("a")
    with pytest.raises(SealedTruthError, match="data.tune only, got no such list"):
        truth(replace(config, tune=None), "train", "validation_split")


def test_a_set_without_masks(config: DataConfig, tmp_path: Path) -> None:
    without = replace(config, masks=str(tmp_path / "none"))
    assert has_truth(config) and not has_truth(without)
    with pytest.raises(DatasetError, match="got no such folder: set data.masks"):
        truth(without)


def test_a_mask_of_another_size(config: DataConfig) -> None:
    with pytest.raises(DatasetError, match="b.png: expected the size of its image, 7x4, got 6x4"):
        truth(config).mask("b", size=(4, 7))


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (np.full((4, 6), 3, np.uint8), UnknownClassError, "b.png: expected values 0 to 2 or 255, got 3"),
        (np.zeros((4, 6, 3), np.uint8), DatasetError, "got RGB pixels"),
        (np.zeros((4, 6), np.uint16), DatasetError, "expected uint8 values for 2 classes, got uint16"),
    ],
)
def test_masks_that_are_no_label_maps(config, mask_path, pixels: np.ndarray, error, message: str) -> None:
    save(mask_path, pixels)
    with pytest.raises(error, match=message):
        truth(config).mask("b")


def test_damaged_and_missing_masks(config: DataConfig, mask_path: Path) -> None:
    mask_path.write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    with pytest.raises(DatasetError, match="cannot be decoded"):
        truth(config).mask("b")
    mask_path.unlink()
    with pytest.raises(DatasetError, match="b.png: expected a mask, got: No such file"):
        truth(config).mask("b")


def test_palette_masks_keep_their_indices(config: DataConfig, mask_path: Path) -> None:
    labels = np.array([[0, 1, 2, 255]], dtype=np.uint8)
    image = Image.fromarray(labels).convert("P")
    image.putpalette(list(range(256)) * 3)
    image.save(mask_path)
    np.testing.assert_array_equal(truth(config).mask("b"), labels)


def test_many_classes_need_sixteen_bits(config: DataConfig, mask_path: Path) -> None:
    names = "\n".join(f"class {i}" for i in range(300)) + "\ncat\ndog"
    root = Path(config.root)
    (root / "labels.json").write_text('{"images": {"a": {"labels": []}, "b": {"labels": []}, "c": {"labels": []}}}')
    (root / "classes.txt").write_text(names)
    labels = np.array([[0, 302, 255, 65535]], dtype=np.uint16)
    save(mask_path, labels)
    opened = truth(config).mask("b")
    assert opened.dtype == np.uint16
    np.testing.assert_array_equal(opened, labels)


def readers(path: Path) -> dict[str, object]:
    """A method that would like to train on truth, in all the ways it might try."""
    other = os.path.relpath(path)
    return {
        "pillow": lambda: Image.open(path),
        "open": lambda: open(path, "rb"),
        "pathlib": path.read_bytes,
        "os.open": lambda: os.open(path, os.O_RDONLY),
        "numpy": lambda: np.load(path),
        "fromfile": lambda: np.fromfile(path, dtype=np.uint8),
        "relative": lambda: open(other, "rb"),
        "bytes": lambda: open(os.fsencode(path), "rb"),
        "dots": lambda: open(path.parent / ".." / "SegmentationClass" / path.name, "rb"),
        "update": lambda: open(path, "r+b"),
    }


@pytest.mark.parametrize("way", readers(Path("x")))
def test_a_method_that_opens_a_mask_is_stopped(mask_path: Path, way: str) -> None:
    with pytest.raises(SealedTruthError, match="b.png is a true mask"):
        readers(mask_path)[way]()  # type: ignore[operator]


def test_symbolic_links_lead_nowhere(mask_path: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").symlink_to(mask_path.parent)
    (tmp_path / "file.png").symlink_to(mask_path)
    for path in (tmp_path / "folder" / "b.png", tmp_path / "file.png"):
        with pytest.raises(SealedTruthError):
            Image.open(path)


def test_a_linked_masks_folder_is_sealed_where_it_really_is(make_voc, tmp_path: Path) -> None:
    config = make_voc()
    (tmp_path / "alias").symlink_to(Path(config.root) / "SegmentationClass")
    seal(replace(config, masks=str(tmp_path / "alias")))
    with pytest.raises(SealedTruthError):
        Image.open(Path(config.root) / "SegmentationClass" / "b.png")


def test_a_mask_that_is_a_link_itself_is_sealed_by_its_name(mask_path: Path, tmp_path: Path) -> None:
    """As in data sets that are kept in a store of their own."""
    mask_path.rename(tmp_path / "stored")
    mask_path.symlink_to(tmp_path / "stored")
    with pytest.raises(SealedTruthError):
        mask_path.read_bytes()


def test_reading_through_truth_opens_nothing_for_others(config: DataConfig, mask_path: Path) -> None:
    opened = truth(config)
    opened.mask("b")
    with pytest.raises(SealedTruthError):
        mask_path.read_bytes()
    outcome: list[BaseException] = []

    def other_thread() -> None:
        try:
            Image.open(mask_path)
        except SealedTruthError as error:
            outcome.append(error)

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert len(outcome) == 1


def test_images_and_new_files_are_not_sealed(config: DataConfig, mask_path: Path) -> None:
    assert read(config, "train").samples[0].image.read_bytes()
    mask_path.with_name("new.png").write_bytes(b"written, not read")


WORKER = """
import multiprocessing, sys
from PIL import Image
from weakseg.datasets import read
from weakseg.errors import SealedTruthError
from weakseg.recipe import DataConfig

def method(sample):  # what a training method's worker does: it gets a Sample and should only look at its image
    try:
        Image.open(sample.image.parent.parent / "SegmentationClass" / (sample.id + ".png"))
    except SealedTruthError:
        return "sealed"
    return "open"

if __name__ == "__main__":
    samples = read(DataConfig(root=sys.argv[1]), "train").samples
    for start in ("fork", "spawn"):
        with multiprocessing.get_context(start).Pool(1) as pool:
            print(start, *pool.map(method, samples))
"""


def test_worker_processes_are_sealed_too(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(WORKER)
    environment = {key: value for key, value in os.environ.items() if key != "WEAKSEG_SEALED"}
    environment["PYTHONPATH"] = os.getcwd()
    command = [sys.executable, tmp_path / "job.py", config.root]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split("\n") == ["fork sealed sealed sealed", "spawn sealed sealed sealed", ""]


def test_a_loader_worker_reports_the_seal(config: DataConfig) -> None:
    torch_data = pytest.importorskip("torch.utils.data")
    masks = [sample.image.parent.parent / "SegmentationClass" / f"{sample.id}.png" for sample in read(config, "train")]

    class Cheat(torch_data.Dataset):  # type: ignore[misc, name-defined]
        def __len__(self) -> int:
            return len(masks)

        def __getitem__(self, index: int) -> np.ndarray:
            return np.asarray(Image.open(masks[index]))

    with pytest.raises(SealedTruthError, match="is a true mask"):
        list(torch_data.DataLoader(Cheat(), num_workers=1, batch_size=None))


def test_truth_pickles_for_workers_of_full_supervision(config: DataConfig) -> None:
    opened = pickle.loads(pickle.dumps(truth(config, opener="full_supervision")))
    np.testing.assert_array_equal(opened.mask("a"), truth(config).mask("a"))


def test_native_readers_raise_no_audit_event_and_stay_out_of_the_packages(mask_path: Path) -> None:
    assert cv2.imread(str(mask_path)) is not None  # the known hole; if this fails, the grep below can go
    native = re.compile(r"cv2\.(imread|imreadmulti|VideoCapture)\b|torchvision\.io|\bread_file\(|decode_image\(")
    for package in ("weakseg", "training", "export", "serve"):
        for path in Path(package).rglob("*.py"):
            if path != Path("weakseg/datasets/truth.py"):  # its docstring names them
                assert not native.search(path.read_text()), f"{path} reads files past the seal: use weakseg.image"
