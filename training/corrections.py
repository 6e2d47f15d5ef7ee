"""Masks that people have corrected in place of pseudo-masks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training import distributed
from training.pseudo_masks import PseudoMasks
from weakseg.classes import voc_palette
from weakseg.datasets import Dataset, Sample
from weakseg.files import write_bytes_atomic
from weakseg.masks.corrections import corrections_of, fingerprint
from weakseg.masks.png import labels_from_png, png_from_labels, provenance_text
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.run_folder import mask_path

FOLDER = "corrections"  # in that of the stage


@dataclass(frozen=True)
class Corrected:
    """`masks`, but of the images `ids` what `keep` wrote into `folder`; where labels are soft, as certain ones."""

    masks: PseudoMasks
    folder: Path
    ids: frozenset[str]

    def __call__(self, sample: Sample) -> NDArray[np.integer]:
        if sample.id not in self.ids:
            return self.masks(sample)
        labels = labels_from_png(mask_path(self.folder, self.masks.split, sample.id, FOLDER).read_bytes())
        return certain(labels) if self.masks.soft else labels


def certain(labels: NDArray[np.integer]) -> NDArray[np.integer]:
    """(H, W) hard labels as soft ones, (H, W, 3) of `weakseg.pseudo_mask.soft_labels`: the first class has it all."""
    return np.stack([labels, labels, np.full_like(labels, 255)], axis=-1)


def keep(
    recipe: Recipe, folder: Path, dataset: Dataset, progress: Progress
) -> tuple[frozenset[str], dict[str, Any] | None]:
    """Writes <folder>/corrections/<split>/<id>.png of `train_seg.corrections`; of several processes the first does.

    Returns: the ids of corrected images, and what is to be known of them: {"n_images", "n_beyond_tags", "n_empty",
        "sha256"}; None where the recipe has no corrections.
    Raises: what `weakseg.masks.corrections.corrections_of` raises.
    """
    if recipe.train_seg is None or recipe.train_seg.corrections is None:
        return frozenset(), None
    path = Path(recipe.train_seg.corrections)
    sha256 = fingerprint(path)
    text = provenance_text({"mask": "correction", "recipe": recipe.name, "seed": recipe.seed, "sha256": sha256})
    ids, beyond, n_beyond_tags, n_empty = set(), Counter[str](), 0, 0
    for correction in corrections_of(path, dataset):
        ids.add(correction.sample.id)
        beyond.update(dataset.classes.names[c] for c in correction.beyond_tags)
        n_beyond_tags += bool(correction.beyond_tags)
        n_empty += bool(correction.sample.tags) and not correction.labels.any()
        if distributed.rank() == 0:
            png = png_from_labels(correction.labels, voc_palette(), text)
            write_bytes_atomic(mask_path(folder, dataset.split, correction.sample.id, FOLDER), png)
    distributed.wait()
    progress.say(f"corrections: {len(ids)} of {len(dataset)} images of {dataset.split} have corrected masks")
    if beyond:
        shown = ", ".join(f"{name} in {n}" for name, n in beyond.most_common())
        progress.say(
            f"warning: corrected masks of {n_beyond_tags} images have classes that their tags lack ({shown}): this "
            "network learns them, the classifier did not; correct the tags as well"
        )
    if n_empty:
        progress.say(
            f"warning: corrected masks of {n_empty} images are background alone, and their tags name classes: take out "
            "of the file what nobody has looked at"
        )
    counts = {"n_images": len(ids), "n_beyond_tags": n_beyond_tags, "n_empty": n_empty}
    return frozenset(ids), counts | {"sha256": sha256}
