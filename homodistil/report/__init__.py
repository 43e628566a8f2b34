"""Reports: what one run did, or several side by side, for people who would rather look than read.

A run writes its own when it ends; `homodistil report` makes one of any runs, finished or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from homodistil.report.board import show_on_board
from homodistil.report.figures import Picture, of_log
from homodistil.report.history import History
from homodistil.report.page import in_markdown, write_page
from homodistil.report.units import of_units


def write_report(run_directory: Path) -> Path:
    """Write `report/` below a run's directory, and show the same on its TensorBoard; returns the page's path. Raises
    `DataError`."""
    run = History.read(run_directory)
    pictures = pictures_of([run])
    show_on_board(run_directory, run, pictures, in_markdown(run))
    return write_page(run_directory / "report", run.name, [run], pictures)


def compare(run_directories: Sequence[Path], folder: Path) -> Path:
    """Write a report of one run or of several to `folder`; returns the page's path. Raises `DataError`."""
    paths = list(dict.fromkeys(run_directories))
    runs = [History.read(directory) for directory in paths]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(directory)) for run, directory in zip(runs, paths, strict=True)]
    return write_page(folder, ", ".join(run.name for run in runs), runs, pictures_of(runs))


def pictures_of(runs: Sequence[History]) -> list[Picture]:
    """All there is to be seen."""
    return [*of_log(runs), *of_units(runs)]
