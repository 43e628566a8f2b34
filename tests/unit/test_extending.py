"""docs/extending.md: every diff applies to this version, and the claim under it holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
CHANGES = re.findall(r"## ([^\n]+)\n(?:(?!\n## ).)*?```diff\n(.*?)```\n\n```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_every_diff_has_a_claim() -> None:
    assert len(CHANGES) == TEXT.count("```diff") == 3


@pytest.mark.parametrize(("name", "diff", "claim"), CHANGES, ids=[name for name, *_ in CHANGES])
def test_a_change_applies_and_works(tmp_path: Path, name: str, diff: str, claim: str) -> None:
    shutil.copytree(ROOT / "homodistil", tmp_path / "homodistil", ignore=shutil.ignore_patterns("__pycache__"))

    def run(*command: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
        return subprocess.run(command, cwd=tmp_path, env=environment, input=given, capture_output=True, text=True)

    before = run(sys.executable, "-c", claim)
    assert before.returncode != 0, "the claim holds without the change"
    applied = run("git", "apply", "-", given=diff)
    assert applied.returncode == 0, applied.stderr
    after = run(sys.executable, "-c", claim)
    assert after.returncode == 0, after.stderr
