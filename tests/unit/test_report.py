"""The report shows what the log and the summary hold, and needs nothing beside itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from homodistil.report import draw, read_curves, write_report
from homodistil.summary import RunSummary
from tests.unit.test_summary import FIGURES

POINTS = [
    {"update": 0, "shape/hidden": 72, "shape/ffn": 136},
    {"update": 10, "loss/total": 3.0, "loss/task": 3.0, "loss/kl": 0.0},
    {"update": 10, "pruning/prune_jump": 0.125},
    {"update": 10, "shape/hidden": 48, "shape/ffn": 96},
    {"update": 20, "loss/total": None, "loss/task": 2.5, "loss/kl": 0.2},
    {"update": 20, "validation/kl": 0.625},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run <1>"
    directory.mkdir()
    RunSummary.model_validate(FIGURES).write(directory)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in POINTS))
    return directory


def test_the_page_is_self_contained_and_holds_the_table(run: Path) -> None:
    page = write_report(run).read_text()
    assert (run / "report" / "run.png").read_bytes().startswith(b"\x89PNG")
    assert "<h1>run &lt;1&gt;</h1>" in page
    assert "<td>student</td><td>500,000</td><td>3.500</td><td>35.0%</td><td>0.625</td>" in page
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)', page))


def test_the_figure_draws_the_logged_points(run: Path) -> None:
    curves = read_curves(run / "metrics.jsonl")
    assert curves["loss/total"].updates == [10]  # the other was not finite
    top, middle, bottom = draw(curves).axes
    assert np.array_equal(top.lines[0].get_xydata(), [[20, 0.625]])
    assert np.array_equal(middle.lines[0].get_xydata(), np.array([[0, 1], [10, 48 / 72], [20, 48 / 72]]))
    assert [line.get_label() for line in bottom.lines] == ["task", "kl"]


def test_plain_training_has_a_report_too(run: Path) -> None:
    (run / "metrics.jsonl").write_text(json.dumps({"update": 10, "loss/total": 3.0, "loss/task": 3.0}) + "\n")
    assert write_report(run).is_file()
