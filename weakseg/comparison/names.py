"""What can be compared. A name is that of a training method, with additions, and of a CAM method: `seam`,
`seam+hide_and_seek`, `cam/layer_cam`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from weakseg.errors import ConfigError
from weakseg.recipe import HF_PREFIX, Recipe
from weakseg.recipe_loading import constant_of, modules_of

ALL = "all"
PLAIN = "cam"  # every comparison has it: costs are multiples of its own
METHODS, CAMS = "training.methods", "training.cams"


def chosen(names: Sequence[str], recipe: Recipe) -> tuple[list[str], list[str]]:
    """(what is compared, the plain classifier first, what `all` leaves out and why).

    Raises:
        ConfigError: an unknown name, or one named that cannot run on the recipe's backbone.
    """
    wanted, left_out = [PLAIN], []
    for name in names:
        if name != ALL:
            check(name)
            why = obstacle(name, recipe)
            if why is not None:
                raise ConfigError(f"{name} {why}: leave it out, or choose another --backbone.name")
            wanted.append(name)
            continue
        for one in [*(f"{PLAIN}/{maps}" for maps in other_maps()), *modules_of(METHODS)]:
            why = obstacle(one, recipe)
            wanted += [one] if why is None else []
            left_out += [] if why is None else [f"{one} is left out: it {why}"]
    return list(dict.fromkeys(wanted)), left_out


def other_maps() -> list[str]:
    """CAM methods for any classifier, beside the plain one's own."""
    return [maps for maps in modules_of(CAMS) if maps != PLAIN and constant_of(CAMS, maps, "CLASSIFIER") is None]


def check(name: str) -> None:
    """Raises ConfigError when a part of the name is no file of training/methods or training/cams."""
    training, slash, maps = name.partition("/")
    parts = [(part, METHODS, "training method") for part in training.split("+")]
    for part, package, kind in [*parts, *([(maps, CAMS, "CAM method")] if slash else [])]:
        known = modules_of(package)
        if part not in known:
            near = difflib.get_close_matches(part, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {ALL}, or of {', '.join(known)}"
            raise ConfigError(f"unknown {kind} {part!r} in --methods {name}: {hint}")


def obstacle(name: str, recipe: Recipe) -> str | None:
    """Why the method cannot run on the recipe's backbone, after its name; None = it can, as far as can be told."""
    for part in name.partition("/")[0].split("+"):
        if constant_of(METHODS, part, "TRANSFORMERS_ONLY") and not recipe.backbone.name.startswith(HF_PREFIX):
            return f"needs a ViT or DeiT ({HF_PREFIX}<id or folder>), and the backbone is {recipe.backbone.name}"
    return None
