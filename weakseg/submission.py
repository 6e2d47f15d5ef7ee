"""`weakseg submission RUN --out results.tgz`: predictions as the archive that the PASCAL VOC evaluation server takes.

    results/VOC2012/Segmentation/comp<5 or 6>_<split>_cls/<id>.png

One 8-bit palette PNG in VOC's colours for every id of the split, as large as its image, of values 0 to 20: the server
knows no IGNORE. Class numbers are its own, so the run must be of VOC's classes in VOC's order. Where the run
folder holds the network, torch is needed, and what is not predicted yet is predicted. True masks are not looked at.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np

from weakseg.datasets import Dataset, Sample, read
from weakseg.errors import DataError, DatasetError, UsageError
from weakseg.files import write_bytes_atomic
from weakseg.image import probe
from weakseg.masks.png import labels_from_png, png_from_labels
from weakseg.progress import Progress
from weakseg.recipe import CrfConfig, Recipe
from weakseg.report import recipe_of
from weakseg.run_folder import prediction_path

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
SUFFIXES = (".tgz", ".tar.gz", ".zip")
WHAT = ("segmentation", "segmentation_crf")
N_NAMED = 5  # ids in a message


def main(argv: Sequence[str]) -> int:
    """Entry of `weakseg submission`."""
    args = _parser().parse_args(argv)
    if not args.out.name.endswith(SUFFIXES):
        raise UsageError(f"expected --out to end in {', '.join(SUFFIXES)}, got {args.out}: the ending is the format")
    recipe = recipe_of(args.run)
    if args.data_root is not None:
        recipe = replace(recipe, data=replace(recipe.data, root=args.data_root))
    progress = Progress("silent" if args.json else "auto")
    if recipe.train_seg is not None and (args.run / "train_seg" / "segmentation.pt").is_file():
        predict(args.run, recipe, args.split, args.what, progress)
    predictions = read_predictions(args.run, recipe, args.split, args.what, progress)
    inside = f"results/VOC2012/Segmentation/comp{args.comp}_{args.split}_cls"
    files = {f"{inside}/{sample_id}.png": png for sample_id, png in predictions.items()}
    write_bytes_atomic(args.out, zip_of(files) if args.out.suffix == ".zip" else tgz_of(files))
    if args.json:
        print(json.dumps({"archive": str(args.out), "folder": inside, "what": args.what, "n_images": len(files)}))
    else:
        print(f"{args.out}: {len(files)} predictions ({args.what}) in {inside}/")
    return 0


def predict(run: Path, recipe: Recipe, split: str, what: str, progress: Progress) -> None:
    """Have the run's network predict what is missing of the split, by the recipe's scales, flips and CRF."""
    if what == "segmentation_crf" and recipe.evaluate.seg_crf is None:
        recipe = replace(recipe, evaluate=replace(recipe.evaluate, seg_crf=CrfConfig()))
    if what == "segmentation":
        recipe = replace(recipe, evaluate=replace(recipe.evaluate, seg_crf=None))
    module = import_module("training.predict_segmentation")  # torch; named, as the stages are
    module.predict(recipe, run, "segmentation", read(recipe.data, split), progress)


def read_predictions(run: Path, recipe: Recipe, split: str, what: str, progress: Progress) -> dict[str, bytes]:
    """{id: PNG as the server wants it} of every image of a split, in the order of its list.

    Args:
        recipe: the run's, its data where they lie now; true masks are not looked at.
        what: the network of `prediction_path`.
    Raises:
        DatasetError: the data cannot be read, or has other classes than VOC.
        UsageError: the run has no predictions of that split.
        DataError: predictions are missing, or one is not as the server wants it.
    """
    root = Path(recipe.data.root)
    if not root.exists():
        raise DatasetError(f"expected the run's data in {root}, got nothing there: say where they are with --data-root")
    dataset = read(recipe.data, split)
    _check_classes(dataset)
    paths = {sample.id: prediction_path(run, what, split, sample.id) for sample in dataset}
    missing = [sample_id for sample_id, path in paths.items() if not path.is_file()]
    if len(missing) == len(paths):
        raise UsageError(
            f"{run} has no predictions ({what}) of the split {split!r} and no network train_seg/segmentation.pt to "
            "make them: run its recipe first, with a segmentation network (train_seg)"
        )
    if missing:
        more = ", …" if len(missing) > N_NAMED else ""
        raise DataError(
            f"expected {what} of all {len(paths)} images of {split}, {len(missing)} are missing in {run} "
            f"({', '.join(missing[:N_NAMED])}{more}) and there is no network train_seg/segmentation.pt to make them"
        )
    samples = progress.each(dataset, f"read {what}", total=len(dataset))
    return {sample.id: server_png(paths[sample.id], sample, len(dataset.classes)) for sample in samples}


def server_png(path: Path, sample: Sample, n_classes: int) -> bytes:
    """The prediction of one image, checked, written anew in VOC's colours and without text.

    Raises:
        DataError: not a palette PNG of the image's size with values 0 to n_classes. ImageError: the image is damaged.
    """
    data = path.read_bytes()
    size = probe(sample.image.read_bytes()).oriented_size
    try:
        labels = labels_from_png(data)
    except DataError as error:
        raise DataError(f"{path}: {error}; run the evaluate stage again") from error
    if data[25] != 3:  # colour type, PNG specification 11.2.1
        raise DataError(f"{path}: expected a palette PNG, got one of another colour type: run the evaluate stage again")
    if labels.shape != size:
        raise DataError(
            f"{path}: expected the size of its image {sample.image}, {size[1]}x{size[0]}, got "
            f"{labels.shape[1]}x{labels.shape[0]}: these images are not those that were predicted"
        )
    unknown = np.unique(labels[labels > n_classes])
    if unknown.size:
        raise DataError(
            f"{path}: expected values 0 to {n_classes}, got {', '.join(map(str, unknown[:N_NAMED]))}: "
            "the server takes predictions, in which nothing is ignored"
        )
    return png_from_labels(labels)


def tgz_of(files: Mapping[str, bytes]) -> bytes:
    """A .tar.gz of {name: content}; the same files give the same bytes wherever zlib is the same."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)  # 1970, mode 644, no owner
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), mtime=0)


def zip_of(files: Mapping[str, bytes]) -> bytes:
    """A .zip of {name: content}; the same files give the same bytes wherever zlib is the same."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)  # 1980
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # Unix, on every system
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _check_classes(dataset: Dataset) -> None:
    names = dataset.classes.names
    if names != VOC_CLASSES:
        at = next((i for i, pair in enumerate(zip(names, VOC_CLASSES, strict=False)) if pair[0] != pair[1]), None)
        got = (
            f"{len(names)} classes"
            if at is None
            else f"{names[at]!r} instead of {VOC_CLASSES[at]!r} as number {at + 1}"
        )
        raise DatasetError(
            f"{dataset.root}: expected the {len(VOC_CLASSES)} classes of PASCAL VOC in their order, got {got}: the "
            "server numbers classes so; train on VOC's classes, with a classes.txt in that order"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weakseg submission",
        description="A run's predictions as the archive that the PASCAL VOC evaluation server takes.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, as `weakseg run` makes it")
    parser.add_argument("--out", type=Path, required=True, help=f"the archive, {', '.join(SUFFIXES)}")
    parser.add_argument("--split", default="test", help="which split (default: test)")
    parser.add_argument(
        "--what", default="segmentation", choices=WHAT, help="whose predictions: with a dense CRF or without"
    )
    parser.add_argument(
        "--comp",
        type=int,
        default=6,
        choices=(6, 5),
        help="5 = trained on VOC alone; 6 = on other data too, as ImageNet's weights or SBD's train_aug (default: 6)",
    )
    parser.add_argument("--data-root", help="where the data lie now (default: where they lay in the run)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
    return parser
