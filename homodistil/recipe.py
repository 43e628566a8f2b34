"""Recipes as files: where they are, what they say, and how a wrong value is put into words.

The typed sections that a recipe fills are config/'s; the command line that overrides it is cli.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from homodistil.errors import ConfigError, nearest

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str) -> Path:
    """A recipe's file, from a name or a path. Raises `ConfigError`."""
    shipped, path = RECIPES / f"{recipe}.yaml", Path(recipe)
    if shipped.is_file():
        return shipped
    if path.suffix in {".yaml", ".yml"} and path.is_file():
        return path
    raise ConfigError(
        f"--recipe {recipe}: neither a file nor a recipe of this package.{nearest(recipe, recipe_names())} "
        f"Give the path of a .yaml file, or one of: {', '.join(recipe_names())}."
    )


def read_recipe(path: Path, before: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The nested values of a YAML file, over those of the recipe that it `extends`, if it names one. Raises
    `ConfigError`."""
    values = _read_yaml(path)
    base = values.pop("extends", None)
    if base is None:
        return values
    chain = (*before, path)
    found = recipe_path(str(base))
    if found in chain:
        raise ConfigError(f"recipe {path}: extends {base}, which comes back to it. Leave one `extends` out.")
    return merge(read_recipe(found, chain), values)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {path}: expected sections of keys, found {type(values).__name__}.")
    return values


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `top` put over it, key by key at every depth."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


@dataclass(frozen=True)
class Origin:
    """Where a run's values come from: a recipe, and the command line's values over it."""

    path: Path
    overrides: dict[str, Any]

    def __call__(self, key: str) -> str:
        """Where the dotted `key` was set, in words."""
        return f"--{key} on the command line" if self._overridden(key) else f"{key} in recipe {self.path}"

    def _overridden(self, key: str) -> bool:
        values: Any = self.overrides
        for part in key.split("."):
            if not isinstance(values, dict) or part not in values:
                return False
            values = values[part]
        return True


def explain(error: ValidationError, model: type[BaseModel], origin: Callable[[str], str]) -> str:
    """One line per fault: where its key was set (`origin`), the value found, what was expected, the nearest key."""
    return "\n".join(_explain_one(fault, model, origin) for fault in error.errors())


def _explain_one(fault: Any, model: type[BaseModel], origin: Callable[[str], str]) -> str:
    keys = [str(part) for part in fault["loc"]]
    place = origin(".".join(keys)) if keys else origin("values").removeprefix("values in ")
    if fault["type"] == "extra_forbidden":
        known = _fields_at(model, keys[:-1])
        return f"{place}: no such key.{nearest(keys[-1], known)} Known here: {', '.join(known)}."
    message = fault["msg"].removeprefix("Value error, ")
    found = "" if isinstance(fault["input"], dict | BaseModel) else f", found {fault['input']!r}"
    return f"{place}: {message}{found}."


def _fields_at(model: type[BaseModel], keys: list[str]) -> list[str]:
    """Names of the fields of the section that `keys` lead to."""
    for key in keys:
        annotation = model.model_fields[key].annotation if key in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
