"""The page: one HTML file that needs nothing else, readable on a phone; figures as PNG and numbers as CSV beside it."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from homodistil.report.figures import Picture
from homodistil.report.history import History

PAGE = "report.html"
DPI = 160
LARGEST_CSV = 2_000_000
"""Bytes of numbers within the page; more lie beside it only."""


def write_page(folder: Path, title: str, runs: Sequence[History], pictures: Sequence[Picture]) -> Path:
    """report.html in `folder`, which is made; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    template = Environment(autoescape=True, trim_blocks=True).from_string(
        files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    )
    page = template.render(
        title=title,
        runs=[_described(run) for run in runs],
        tables=_tables(runs),
        pictures=[_embedded(folder, picture) for picture in pictures],
    )
    path = folder / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def in_markdown(run: History) -> str:
    """What a run did and came to, for TensorBoard."""
    lines = [f"{run.status}. {_sentence(run)}", *(f"**{fault}**" for fault in run.faults)]
    for table in _tables([run]):
        rows = [table["headings"], ["---"] * len(table["headings"]), *table["rows"]]
        lines.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join(lines)


def _embedded(folder: Path, picture: Picture) -> dict[str, str]:
    """A picture's files beside the page, and what of them stands in it."""
    image, numbers = folder / f"{picture.name}.png", folder / f"{picture.name}.csv"
    picture.figure.savefig(image, dpi=DPI)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([picture.header, *picture.rows])
    numbers.write_text(text.getvalue(), encoding="utf-8")
    data = numbers.read_bytes()
    return {
        "name": picture.name,
        "title": picture.title,
        "caption": picture.caption,
        "image": base64.b64encode(image.read_bytes()).decode(),
        "csv": base64.b64encode(data).decode() if len(data) <= LARGEST_CSV else "",
    }


def _described(run: History) -> dict[str, Any]:
    settings = yaml.safe_dump(run.settings, sort_keys=False) if run.settings else ""
    return {
        "name": run.name,
        "status": run.status,
        "sentence": _sentence(run),
        "faults": run.faults,
        "settings": settings,
    }


def _sentence(run: History) -> str:
    """What the run did, for somebody who knows nothing of it."""
    if (summary := run.summary) is None:
        return ""
    widths = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in summary.student.shape.items())
    pruned = f" and {summary.prunes} prunes" if summary.prunes else ""
    return (
        f"Recipe {summary.recipe}: {summary.steps:,} updates{pruned} in {summary.seconds:,.0f} s on "
        f"{summary.world_size} rank{'s' if summary.world_size > 1 else ''}, ZeRO-{summary.zero_stage}, "
        f"seed {summary.seed}. The student has {summary.student.parameters:,} parameters: {widths}."
    )


def _tables(runs: Sequence[History]) -> list[dict[str, Any]]:
    """Of one run: teacher, student and guess. Of several: a row each, and each one's own."""
    finished = [run for run in runs if run.summary is not None and run.summary.validation is not None]
    tables = [
        {"headings": [run.name if len(runs) > 1 else "", *run.summary.headings[1:]], "rows": run.summary.rows()}
        for run in finished
        if run.summary is not None
    ]
    if len(runs) > 1:
        headings = ["run", "status", "updates", "parameters", "held-out loss", "KL"]
        tables.insert(0, {"headings": headings, "rows": [_row(run) for run in runs]})
    return tables


def _row(run: History) -> list[str]:
    cells = [("shape/parameters", ",.0f"), ("validation/student_loss", ".3f"), ("validation/kl", ".3f")]
    values = [(run.last(tag), style) for tag, style in cells]
    shown = ["" if value is None else format(value, style) for value, style in values]
    return [run.name, run.status, f"{run.last_update:,}", *shown]
