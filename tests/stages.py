"""ZeRO stages and the rest of a test matrix: what `make test` runs of it, and what is left to `make test-all`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case for `make test-all` alone."""
    return pytest.param(*values, marks=pytest.mark.slow)


def matrix(rows: Iterable[Any], columns: Iterable[Any], quick: Callable[[Any, Any], bool]) -> list[Any]:
    """Every row with every column; those that aren't `quick` are slow."""
    pairs = [(row, column) for row in rows for column in columns]
    return [pytest.param(*pair) if quick(*pair) else slow(*pair) for pair in pairs]


NAMES = ["zero1", "zero2", "zero3"]
STAGES = pytest.mark.parametrize("stage", [1, 2, 3], ids=NAMES)
"""All of them, always."""
STAGE_2_AND_3 = pytest.mark.parametrize("stage", [slow(1), 2, 3], ids=NAMES)
STAGE_2 = pytest.mark.parametrize("stage", [slow(1), 2, slow(3)], ids=NAMES)
