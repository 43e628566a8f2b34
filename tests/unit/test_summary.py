"""summary.json's keys are a promise to scripts; the table says the same to people."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from homodistil.summary import RunSummary, print_table

FIGURES: dict[str, Any] = {
    "recipe": "tried",
    "steps": 40,
    "world_size": 2,
    "zero_stage": 2,
    "seed": 0,
    "teacher": {"parameters": 2_000_000},
    "student": {"parameters": 500_000, "shape": {"layers": 3, "hidden": 48, "ffn": 96, "heads": 6, "head_width": 8}},
    "validation": {
        "teacher": {"mlm_loss": 3.0, "mlm_accuracy": 0.4},
        "student": {"mlm_loss": 3.5, "mlm_accuracy": 0.35, "tokens_per_second": 12_345.6},
        "unigram": {"mlm_loss": 7.1, "mlm_accuracy": 0.05},
        "kl": 0.625,
    },
    "prunes": 4,
    "seconds": 61.5,
    "tokens_per_second": 5_000.0,
    "device": "4 CPU cores",
    "flops": 1.5e12,
    "peak_memory_bytes": 1 << 30,
}

PROMISED = (
    "recipe steps world_size device zero_stage seed teacher.parameters student.parameters student.shape "
    "validation.teacher.mlm_loss validation.teacher.mlm_accuracy validation.student.mlm_loss "
    "validation.student.mlm_accuracy validation.kl prunes seconds tokens_per_second flops peak_memory_bytes "
    "resumed_from exit_status validation.unigram.mlm_loss validation.unigram.mlm_accuracy"
)


def test_every_promised_key_is_in_the_file(tmp_path: Path) -> None:
    path = RunSummary.model_validate(FIGURES).write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
    written = json.loads(path.read_text())
    for key in PROMISED.split():
        value = written
        for part in key.split("."):
            assert part in value, key
            value = value[part]
    assert (written["exit_status"], written["resumed_from"]) == (0, None)
    assert RunSummary.read(tmp_path) == RunSummary.model_validate(FIGURES)


def test_a_misspelt_figure_is_refused() -> None:
    with pytest.raises(ValidationError, match="step_count"):
        RunSummary.model_validate({**FIGURES, "step_count": 40})


def test_the_table_has_a_row_for_each_contender_and_only_places_that_exist(tmp_path: Path) -> None:
    summary = RunSummary.model_validate(FIGURES)
    summary.write(tmp_path)
    shown = StringIO()
    print_table(summary, tmp_path, Console(file=shown, width=100))
    table, places = shown.getvalue(), shown.getvalue().splitlines()[-1]
    for cells in (
        ["teacher", "2,000,000", "3.000", "40.0%"],
        ["student", "0.625", "12,346"],
        ["unigram guess", "7.100"],
    ):
        assert any(all(cell in line for cell in cells) for line in table.splitlines()), cells
    assert str(tmp_path / "summary.json") in places and "tensorboard" not in table


def test_without_a_teacher_there_is_no_row_for_it() -> None:
    alone = {**FIGURES, "teacher": None, "validation": {**FIGURES["validation"], "teacher": None, "kl": None}}
    assert [row[0] for row in RunSummary.model_validate(alone).rows()] == ["student", "unigram guess"]
