"""Recipes by name or file, and their overrides from the command line."""

from __future__ import annotations

import ast
import contextlib
import difflib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import tyro

from weakseg.errors import ConfigError
from weakseg.presets import AFFINITY, with_method
from weakseg.recipe import CrfConfig, Recipe, SegConfig

PACKAGE = "training.recipes"
METHOD = re.compile(r":[a-z0-9_+]+$")  # behind a recipe's name; a path of Windows has its colon elsewhere
# Sections that can be absent, outer ones first, and what each can be set to by name. A key of one that is absent
# starts from the first.
CRF: Mapping[str, CrfConfig | None] = {"default": CrfConfig(), "none": None}
SECTIONS: Mapping[str, Mapping[str, Any]] = {
    "pseudo_label.crf": CRF,
    "affinity": {**AFFINITY, "none": None},
    "affinity.walk.crf": CRF,
    "train_seg": {"default": SegConfig(), "none": None},
    "evaluate.seg_crf": CRF,
}


def recipe_names() -> list[str]:
    """Recipes that come with the training stage; empty when it is not installed."""
    return modules_of(PACKAGE)


def modules_of(package: str) -> list[str]:
    """Modules of a package that is not imported itself; empty when it is not installed."""
    return sorted(module.name for module in iter_modules(_folders_of(package)))


def constant_of(package: str, module: str, name: str) -> Any:
    """What a module sets a name to at its top, a literal, read from its file; None where it does not."""
    for path in [Path(folder) / f"{module}.py" for folder in _folders_of(package)]:
        for statement in ast.parse(path.read_bytes()).body if path.is_file() else []:
            if isinstance(statement, ast.Assign) and name in map(ast.unparse, statement.targets):
                return ast.literal_eval(statement.value)
    return None


def _folders_of(package: str) -> list[str]:
    spec = find_spec(package)
    return list(spec.submodule_search_locations or []) if spec is not None else []


def load_recipe(name: str) -> Recipe:
    """The recipe of a name (`wsss_mini`, `wsss-mini`) or of a Python file that defines RECIPE.

    `wsss_mini:acol` is that recipe with the training method acol (weakseg.presets.with_method).

    Raises:
        ConfigError: no such recipe, or the file defines none.
    """
    name, colon, method = name.rpartition(":") if METHOD.search(name) else (name, "", "")
    if name.endswith(".py"):
        recipe = _from_file(Path(name))
    else:
        module = name.replace("-", "_")
        if module not in recipe_names():
            near = difflib.get_close_matches(module, recipe_names(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(recipe_names())} or a .py file"
            raise ConfigError(f"unknown recipe {name!r}: {hint}")
        recipe = getattr(import_module(f"{PACKAGE}.{module}"), "RECIPE", None)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{name}: expected it to define RECIPE = Recipe(...), got {type(recipe).__name__}")
    return with_method(recipe, method) if colon else recipe


def override(recipe: Recipe, arguments: Sequence[str], *, prog: str = "weakseg run RECIPE") -> Recipe:
    """The recipe with `--section.key value` applied; `--pseudo_label.crf none` leaves a section of SECTIONS out.

    Raises:
        ConfigError: an unknown key, with the nearest ones, or a value of another type.
        SystemExit: after `--help` has printed every key with its meaning and value.
    """
    recipe, arguments = _switch_sections(recipe, arguments)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            changed, unknown = tyro.cli(
                Recipe,
                default=recipe,
                args=arguments,
                prog=prog,
                use_underscores=True,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(_one_line(said.getvalue())) from None
    if unknown:
        raise _unknown_key(unknown[0], recipe)
    return changed


def _from_file(path: Path) -> object:
    if not path.is_file():
        raise ConfigError(f"expected a recipe in {path}, got no such file")
    spec = spec_from_file_location("weakseg_recipe", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # someone else's code: whatever it raises is a fault of the recipe
        raise ConfigError(f"{path}: the recipe does not run: {type(error).__name__}: {error}") from error
    return getattr(module, "RECIPE", None)


def _switch_sections(recipe: Recipe, arguments: Sequence[str]) -> tuple[Recipe, list[str]]:
    """tyro has no flag for a section that may be absent, so these are switched off or on before."""
    rest = [part for argument in arguments for part in _split(argument)]
    for path, choices in SECTIONS.items():
        keys = [argument.replace("-", "_") for argument in rest]
        if f"__{path}" in keys:
            at = keys.index(f"__{path}")
            value = "".join(keys[at + 1 : at + 2]).lower()
            if value not in choices:
                raise ConfigError(
                    f"--{path} is a section: expected {' or '.join(choices)}, or one of its keys as in --{path}.KEY"
                )
            recipe = _with_section(recipe, path.split("."), choices[value])
            del rest[at : at + 2]
        elif any(_starts(path, key, value) for key, value in zip(keys, [*keys[1:], ""], strict=False)) and (
            _section(recipe, path) is None
        ):
            recipe = _with_section(recipe, path.split("."), next(iter(choices.values())))
    return recipe, rest


def _split(argument: str) -> list[str]:
    """--section=value as --section value, where the section is one of SECTIONS."""
    key, equals, value = argument.partition("=")
    return [key, value] if equals and key.replace("-", "_").removeprefix("__") in SECTIONS else [argument]


def _starts(path: str, key: str, value: str) -> bool:
    """Whether a key speaks of something in the section; that a section within it be left out does not."""
    return key.startswith(f"__{path}.") and not (key.removeprefix("__") in SECTIONS and value.lower() == "none")


def _section(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def _with_section(config: Any, names: Sequence[str], value: Any) -> Any:
    head, *rest = names
    if not rest:
        return replace(config, **{head: value})
    if getattr(config, head) is None:
        raise ConfigError(f"{head} is left out of this recipe, so it has no {'.'.join(rest)}: set --{head} first")
    return replace(config, **{head: _with_section(getattr(config, head), rest, value)})


def _unknown_key(key: str, recipe: Recipe) -> ConfigError:
    known = list(_keys(asdict(recipe)))
    near = difflib.get_close_matches(key.lstrip("-").partition("=")[0].replace("-", "_"), known, n=1)
    hint = f"did you mean --{near[0]}?" if near else "`weakseg run RECIPE --help` lists all"
    return ConfigError(f"unknown key {key}: {hint}")


def _keys(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        yield from _keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


def _one_line(boxed: str) -> str:
    """tyro's message about a value, without frame, title and advice."""
    lines = [re.sub(r"[╭╮╰╯│─]+|[-+|]{3,}|^\||\|$", " ", line).strip() for line in boxed.splitlines()]
    text = " ".join(line for line in lines[1:] if line)
    return text.partition(" For full helptext")[0].partition(" Argument helptext")[0].strip()
