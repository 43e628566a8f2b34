"""Rows of benchmarks: those that lie there are shown and not run again, which is said; another file starts afresh."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import arms
from benchmarks.steps import kept_rows


class Started(Exception):
    """A run was."""


@pytest.fixture(autouse=True)
def no_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*command: object, **how: object) -> None:
        raise Started

    monkeypatch.setattr(subprocess, "run", start)


def test_rows_that_lie_there_are_named_with_their_commits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kept_rows(tmp_path / "none.json") == {} and not capsys.readouterr().out
    rows = {"a": {"commit": "5d70f29"}, "b": {"commit": None}, "c": {"commit": "5d70f29"}}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert kept_rows(tmp_path / "rows.json") == rows
    assert "rows.json has 3 rows, of commit 5d70f29, None: " in capsys.readouterr().out


def test_finished_arms_are_shown_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = shutil.copy(Path(__file__).parents[2] / arms.ROWS, tmp_path)
    monkeypatch.setattr(sys, "argv", ["arms", "--rows", str(rows)])
    arms.main()
    assert "10 rows, of commit 5fa0d7e" in capsys.readouterr().out
    assert (tmp_path / arms.CURVES.name).is_file()


def test_another_file_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["arms", "--rows", str(tmp_path / "new/rows.json")])
    with pytest.raises(Started):
        arms.main()
