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


class Score(Figures):
    """On the held-out text, at its masked positions."""

    mlm_loss: float
    """Nats a position."""
    mlm_accuracy: float
    """Share of positions whose first guess is right."""
    tokens_per_second: float | None = None
    """Forward passes alone, on one rank."""


class Validation(Figures):
    teacher: Score | None
    student: Score
    unigram: Score
    """Guessing each token by its frequency in the training text."""
    kl: float | None
    """KL(teacher || student) at temperature 1, nats a position."""


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

    def rows(self) -> list[list[str]]:
        """The table's cells: name, parameters, MLM loss, accuracy, KL, tokens/s; empty where there is no figure."""
        scores = self.validation
        assert scores is not None, "a table is made of a finished run"
        rows = [_row("student", self.student.parameters, scores.student, scores.kl)]
        if self.teacher is not None and scores.teacher is not None:
            rows.insert(0, _row("teacher", self.teacher.parameters, scores.teacher, 0.0))
        return [*rows, _row("unigram guess", None, scores.unigram, None)]


HEADINGS = ("", "parameters", "MLM loss", "accuracy", "KL", "tokens/s")


def print_table(summary: RunSummary, directory: Path, console: Console | None = None) -> None:
    """The figures, then where to look."""
    console = console or Console()
    table = Table(title=f"{summary.recipe}: {summary.steps:,} updates in {summary.seconds:,.0f} s")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left")
    for row in summary.rows():
        table.add_row(*row)
    console.print(table)
    for what, name in PLACES.items():
        if (directory / name).exists():
            console.print(f"{what:<12} {directory / name}", soft_wrap=True, highlight=False)


PLACES = {
    "student": "student",
    "report": "report/report.html",
    "figures": FILE,
    "curves": "tensorboard",
    "settings": "run.yaml",
}


def _row(name: str, parameters: int | None, score: Score, kl: float | None) -> list[str]:
    return [
        name,
        _cell(parameters, ","),
        _cell(score.mlm_loss, ".3f"),
        _cell(score.mlm_accuracy, ".1%"),
        _cell(kl, ".3f"),
        _cell(score.tokens_per_second, ",.0f"),
    ]


def _cell(value: Any, style: str) -> str:
    return "" if value is None else format(value, style)
