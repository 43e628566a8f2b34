"""docs/methods.md: its equations, written down once more in its own lines, are what the code computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
NAMED = re.findall(r"`(\w+(?:/\w+)*\.py)`\s+`(\w+)`(?:\s+and\s+`(\w+)`)?", TEXT)


def test_every_equation_is_what_the_code_computes() -> None:
    names: dict[str, Any] = {}
    for number, block in enumerate(BLOCKS, start=1):
        exec(compile(block, f"docs/methods.md, block {number}", "exec"), names)
    assert sum(block.count("assert ") for block in BLOCKS) > len(BLOCKS)


@pytest.mark.parametrize(("path", "names"), [(path, names) for path, *names in NAMED])
def test_every_function_named_is_there(path: str, names: list[str]) -> None:
    source = (ROOT / "homodistil" / path).read_text(encoding="utf-8")
    for name in filter(None, names):
        assert re.search(rf"^(def|class) {name}\b", source, flags=re.MULTILINE), f"{path} has no {name}"
