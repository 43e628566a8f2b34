"""The documents' commands: those of docs/running.md are executed as they stand, others say what they need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "docs/running.md"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = "# needs: "


def blocks(document: Path) -> list[tuple[str, str]]:
    """(language, text) of what can be executed, in order."""
    return re.findall(r"```(bash|python)\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_that_are_not_executed_say_what_they_need(document: Path) -> None:
    for language, block in blocks(document):
        assert language == "python" or document == TOUR or block.startswith(NEEDS), f"{document.name}: {block}"


@pytest.mark.slow
def test_the_tour_runs_as_it_stands(tmp_path: Path) -> None:
    for folder in ("launchers", "ds_configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    bin_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": bin_first, "PYTHONPATH": str(ROOT)}
    for language, block in blocks(TOUR):
        if not block.startswith(NEEDS):
            program = ["bash", "-e", "-c", block] if language == "bash" else [sys.executable, "-c", block]
            done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
            assert done.returncode == 0, f"{block}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    for name in ("quickstart", "wider", "one_shot", "wider_again", "cached", "ted"):
        assert (tmp_path / "runs" / name / "student/model.safetensors").is_file(), name
    assert (tmp_path / "runs/compared/report.html").is_file()
