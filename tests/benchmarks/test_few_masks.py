from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.few_masks import NOTE, drawn, main, write_masks
from tests.training.conftest import write_squares
from weakseg.classes import ClassTable
from weakseg.datasets import Dataset, Sample
from weakseg.datasets.truth import open_truth
from weakseg.errors import SealedTruthError, UsageError
from weakseg.files import write_json_atomic
from weakseg.masks.png import labels_from_png
from weakseg.progress import Progress
from weakseg.recipe import (
    BackboneConfig,
    CamConfig,
    DataConfig,
    EvaluateConfig,
    OptimConfig,
    PseudoLabelConfig,
    Recipe,
    SegConfig,
    TrainConfig,
)
from weakseg.run import run


def dataset_of(tags: list[tuple[int, ...]], n_classes: int = 3) -> Dataset:
    names = tuple("abcdefgh"[:n_classes])
    samples = [Sample(str(i), Path(f"{i}.jpg"), present) for i, present in enumerate(tags)]
    return Dataset(ClassTable(names), samples, "train", Path())


tags_of_images = st.lists(st.sets(st.integers(0, 2)).map(lambda tags: tuple(sorted(tags))), max_size=12)


@given(tags=tags_of_images, k=st.integers(0, 5), seed=st.integers(0, 99), hidden=st.sets(st.integers(0, 11)))
def test_k_images_of_every_class_or_all_that_it_has(
    tags: list[tuple[int, ...]], k: int, seed: int, hidden: set[int]
) -> None:
    def has_mask(sample_id: str) -> bool:
        return int(sample_id) not in hidden

    dataset = dataset_of(tags)
    fewer, more = (drawn(dataset, has_mask, n, seed) for n in (k, k + 1))
    assert fewer == drawn(dataset, has_mask, k, seed)
    assert set(fewer) <= set(more)
    assert all(sample.tags and has_mask(sample.id) for sample in more)
    assert len(fewer) <= 3 * k and [*map(int, (s.id for s in more))] == sorted(int(s.id) for s in more)
    for c in range(3):
        there = sum(c in sample.tags and has_mask(sample.id) for sample in dataset)
        assert sum(c in sample.tags for sample in fewer) >= min(k, there)


def test_another_seed_draws_others() -> None:
    dataset = dataset_of([(0,)] * 50)
    draws = {tuple(sample.id for sample in drawn(dataset, lambda _: True, 3, seed)) for seed in range(5)}
    assert len(draws) > 1 and all(len(draw) == 3 for draw in draws)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    root = tmp_path_factory.mktemp("squares")
    write_squares(root)
    optim = OptimConfig(epochs=1, batch_size=4, crop_px=32, long_side_px=(32, 48), workers=0)
    return Recipe(
        name="squares",
        data=DataConfig(root=str(root), tags="imagesets"),
        backbone=BackboneConfig(name="small_resnet", freeze_stages=0),
        train=TrainConfig(optim=optim),
        cam=CamConfig(scales=(1.0,)),
        pseudo_label=PseudoLabelConfig(crf=None),
        train_seg=SegConfig(width=16, optim=optim),
        evaluate=EvaluateConfig(splits=("val",), seg_scales=(1.0,), seg_flip=False),
        upper_bound=True,
    )


def test_masks_are_the_true_ones_of_those_images_and_truth_is_sealed_again(recipe: Recipe, tmp_path: Path) -> None:
    folder = write_masks(recipe, tmp_path / "masks", 1, 0)
    masks = {path.stem: labels_from_png(path.read_bytes()) for path in folder.iterdir()}
    assert len(masks) == 3
    for sample_id, mask in masks.items():
        assert mask.shape == (48, 64)
        assert np.unique(mask).tolist() == [0, int(sample_id) % 3 + 1]  # image i shows class i % 3
    with pytest.raises(SealedTruthError):
        open_truth(recipe.data, "train", opener="full_supervision")


def test_runs_of_several_k_share_what_is_done(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished, root = tmp_path / "finished", tmp_path / "few"
    run(recipe, finished, last="pseudo_label", progress=Progress("silent"))
    main([str(finished), "--k", "0", "2", "--seeds", "0", "1", "--folder", str(root)])
    assert sorted(path.name for path in root.iterdir()) == ["0-0", "2-0", "2-1", "masks"]
    for name in ("0-0", "2-0", "2-1"):
        assert (root / name / "train/classifier.pt").samefile(finished / "train/classifier.pt")
        assert not (root / name / "train_seg_full").exists()
    weights = {(root / name / "train_seg/segmentation.pt").read_bytes() for name in ("0-0", "2-0")}
    assert len(weights) == 2
    head, *rows = capsys.readouterr().out.split(NOTE)[-1].strip().splitlines()
    assert head.split("  ")[0] == "k" and "images with masks" in head and head.endswith("mIoU on val")
    assert [row.split()[:3] for row in rows] == [["0", "1", "0"], ["2", "2", "6"]]


@pytest.mark.parametrize(
    ("train_seg", "message"),
    [
        (SegConfig(), "finished up to its pseudo-masks, got .*run without train for its config.json"),
        (SegConfig(supervision="full"), "learns from pseudo-masks, got .*run with train_seg of full supervision"),
        (None, "got .*run with train_seg none"),
    ],
)
def test_a_run_that_has_no_pseudo_masks_or_does_not_learn_from_them_is_refused(
    recipe: Recipe, tmp_path: Path, train_seg: SegConfig | None, message: str
) -> None:
    write_json_atomic(tmp_path / "run/config.json", asdict(replace(recipe, train_seg=train_seg, upper_bound=False)))
    with pytest.raises(UsageError, match=message):
        main([str(tmp_path / "run"), "--k", "1", "--folder", str(tmp_path / "few")])


def test_fewer_than_no_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--k", "-1"])
    assert "--k counts images: expected 0 or more, got -1" in capsys.readouterr().err
