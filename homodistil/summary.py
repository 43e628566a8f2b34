"""RunSummary: the final figures of a run, for scripts as summary.json and for people as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from homodistil.files import write_text_durably

FILE = "summary.json"


class Figures(BaseModel):
    """Base of the summary's parts."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class TeacherFigures(Figures):
    parameters: int


class StudentFigures(Figures):
    parameters: int
    shape: dict[str, int]
    """layers, hidden, ffn, heads, head_width."""


Score = dict[str, float]
"""Figures on held-out examples: `mlm_loss`, nats a scored slot, and `mlm_accuracy`, the share of slots whose first
guess is right (clm_*, or task_* for a benchmark), `tokens_per_second` of forward passes alone, on one rank, and a
benchmark's own metrics."""


class Validation(Figures):
    teacher: Score | None
    student: Score
    unigram: Score | None
    """Guessing each token by its frequency in the training text; a benchmark has no such guess."""
    kl: float | None
    """KL(teacher || student) at temperature 1, nats a slot."""


class RunSummary(Figures):
    """What a run came to. Without a teacher, its figures are null."""

    recipe: str
    steps: int
    """Optimizer updates."""
    world_size: int
    zero_stage: int
    seed: int
    teacher: TeacherFigures | None
    student: StudentFigures
    validation: Validation | None
    """Null in a run that was stopped before its end."""
    prunes: int
    seconds: float
    """Of training, validation left out."""
    tokens_per_second: float
    """Of training, over all ranks."""
    device: str | None = None
    """Rank 0's: a GPU's name, or the number of CPU cores."""
    flops: float | None = None
    """Useful arithmetic of training: forward and backward of the student, forward of the teacher."""
    peak_memory_bytes: int
    """Of the rank that needed most."""
    resumed_from: int | None = None
    """Update of the checkpoint that the run went on from."""
    exit_status: int = 0
    """0 finished; 2 stopped by an error; 75 preempted: the same command goes on."""

    def write(self, directory: Path) -> Path:
        """Write `directory`/summary.json, whole or not at all."""
        path = directory / FILE
        write_text_durably(path, self.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def read(cls, directory: Path) -> RunSummary:
        return cls.model_validate_json((directory / FILE).read_bytes())

    @property
    def metrics(self) -> list[str]:
        """Names of a benchmark's own figures, besides accuracy, which every score has."""
        scores = self.validation.student if self.validation else {}
        return [
            name for name in scores if name != "accuracy" and not name.startswith(("mlm_", "clm_", "task_", "tokens_"))
        ]

    @property
    def headings(self) -> list[str]:
        """Of the table's columns."""
        assert self.validation is not None, "a table is made of a finished run"
        loss = next(name for name in self.validation.student if name.endswith("_loss"))
        return ["", "parameters", LOSSES[loss], "accuracy", "KL", *self.metrics, "tokens/s"]

    def rows(self) -> list[list[str]]:
        """The table's cells: name, parameters, loss, accuracy, KL, metrics, speed; empty where there is no figure."""
        scores = self.validation
        assert scores is not None, "a table is made of a finished run"
        rows = [self._row("student", self.student.parameters, scores.student, scores.kl)]
        if self.teacher is not None and scores.teacher is not None:
            rows.insert(0, self._row("teacher", self.teacher.parameters, scores.teacher, 0.0))
        if scores.unigram is not None:
            rows.append(self._row("unigram guess", None, scores.unigram, None))
        return rows

    def _row(self, name: str, parameters: int | None, score: Score, kl: float | None) -> list[str]:
        loss = next(value for key, value in score.items() if key in LOSSES)
        engines = next((value for key, value in score.items() if key.endswith("_accuracy")), None)
        accuracy = score.get("accuracy", engines)  # a benchmark's own is of the stock model and of all its examples
        return [
            name,
            _cell(parameters, ","),
            _cell(loss, ".3f"),
            _cell(accuracy, ".1%"),
            _cell(kl, ".3f"),
            *(_cell(score.get(metric), ".4f") for metric in self.metrics),
            _cell(score.get("tokens_per_second"), ",.0f"),
        ]


LOSSES = {"mlm_loss": "MLM loss", "clm_loss": "LM loss", "task_loss": "loss"}
"""Key of a score's loss -> its column."""


def print_table(summary: RunSummary, directory: Path, console: Console | None = None) -> None:
    """The figures, then where to look."""
    console = console or Console()
    table = Table(title=f"{summary.recipe}: {summary.steps:,} updates in {summary.seconds:,.0f} s")
    for heading in summary.headings:
        table.add_column(heading, justify="right" if heading else "left")
    for row in summary.rows():
        table.add_row(*row)
    console.print(table)
    for what, name in PLACES.items():
        if (directory / name).exists():
            console.print(f"{what:<12} {directory / name}", soft_wrap=True, highlight=False)


PLACES = {
    "student": "student",
    "filters": "filters",
    "predictions": "predictions.jsonl",
    "report": "report/report.html",
    "figures": FILE,
    "curves": "tensorboard",
    "settings": "run.yaml",
}


def _cell(value: Any, style: str) -> str:
    return "" if value is None else format(value, style)
