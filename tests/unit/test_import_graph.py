"""Imports point one way: docs/architecture.md's picture, enforced."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "homodistil"

LAYERS = (
    {"errors", "files", "hardware", "quiet"},
    {
        "recipe",
        "config",
        "ds_schema",
        "ds_config",
        "arguments",
        "schedule",
        "batch",
        "signals",
        "sparse_targets",
        "summary",
        "tasks",
    },
    {"ranks", "state", "fragments", "zero", "progress", "metrics", "watchdog", "preemption", "claim"},
    {"models", "kernels"},
    {"knowledge", "objective", "pruning", "data"},
    {"student", "learner", "costs", "machines", "planning", "engine", "manifest", "resume", "checkpoint", "health"},
    {
        "checks",
        "run_plan",
        "cache_plan",
        "opening",
        "cache_folder",
        "caching",
        "closing",
        "forecast",
        "weights",
        "evaluation",
        "export",
        "convert",
        "report",
        "train",
    }
    | {"stage_one", "finetune"},
    {"cli"},
)
"""Lowest first: a module imports from its own layer and those before it."""

STRANGERS = ({"pruning", "knowledge"}, {"pruning", "objective"})
"""Only the layers above know both of a pair."""

ONLY_IMPORTERS = {"deepspeed": {"engine", "zero"}, "webdataset": {"data"}, "mpi4py": {"data"}}
"""Third-party package -> the parts of homodistil that may import it."""


@cache
def modules() -> dict[str, Path]:
    """Dotted name below `homodistil` -> file."""
    names = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(part for part in parts if part != "__init__"): path for path, parts in names.items()}


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, also inside functions; `from package import module` gives both."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports, by their name below it."""
    below = {name.removeprefix("homodistil.") for name in imported(path) if name.startswith("homodistil.")}
    return below & modules().keys()


def part(module: str) -> str:
    return module.split(".")[0]


def layer(module: str) -> int:
    return next(height for height, parts in enumerate(LAYERS) if part(module) in parts)


MODULES = sorted(modules().keys() - {""})


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_place_in_the_layers(module: str) -> None:
    assert any(part(module) in parts for parts in LAYERS), f"add {part(module)} to LAYERS, as low as it can stand"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_nothing_from_above_it(module: str) -> None:
    above = {name for name in imported_modules(modules()[module]) if layer(name) > layer(module)}
    assert not above


@pytest.mark.parametrize("module", MODULES)
def test_pruning_knows_neither_knowledge_nor_objective_nor_they_it(module: str) -> None:
    for pair in STRANGERS:
        if part(module) in pair:
            other = pair - {part(module)}
            assert not {name for name in imported_modules(modules()[module]) if part(name) in other}


@pytest.mark.parametrize("module", MODULES)
def test_a_third_party_package_has_one_door(module: str) -> None:
    for package, doors in ONLY_IMPORTERS.items():
        if part(module) not in doors:
            assert package not in {part(name) for name in imported(modules()[module])}


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: imported_modules(path) - {name} for name, path in modules().items()}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("launcher", sorted(path.name for path in (ROOT / "launchers").glob("*.py")))
def test_a_launcher_only_parses_and_calls(launcher: str) -> None:
    path = ROOT / "launchers" / launcher
    assert imported_modules(path) == {"cli"}
    assert len(path.read_text(encoding="utf-8").splitlines()) < 15
