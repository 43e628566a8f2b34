"""The page: one HTML file that needs nothing else, readable on a phone; figures as PNG and numbers as CSV beside it."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment

from homodistil.report.figures import Picture
from homodistil.report.history import History
from homodistil.summary import RunSummary

PAGE = "report.html"
DPI = 160
LARGEST_CSV = 2_000_000
"""Bytes of numbers within the page; more lie beside it only."""
LOGGED = {
    "parameters": ("shape/parameters", ",.0f"),
    "held-out loss": ("validation/student_loss", ".3f"),
    "accuracy": ("validation/student_accuracy", ".1%"),
    "KL": ("validation/kl", ".3f"),
}
"""Column -> tag of the log, of a run that has not ended."""
WORDS = {
    "teacher, student": "The large model that is there, and the small one that is made to say what it says.",
    "update": "One step of the optimizer, on one batch of examples.",
    "prune": "A physical narrowing of the student: units leave every tensor that has them.",
    "MLM loss": "Masked language modelling: minus the log-probability of words that were hidden from the model.",
    "accuracy": "The share of slots whose most probable word, or label, is the true one.",
    "slot": "A place where something is predicted: a hidden word, a next word, or an example's label.",
    "KL, nats": "Kullback-Leibler divergence: how far the student's probabilities are from the teacher's; 0: they are "
    "equal. A nat is 1.44 bits.",
    "hidden": "Dimensions of the residual stream, which runs through all layers.",
    "ffn": "Neurons of the feed-forward layers.",
    "heads; qk, vo": "Attention heads; within them, the dimensions of queries and keys, and of values.",
    "head_width": "Dimensions of a head that are left, of qk and of vo alike.",
    "softened": "Logits divided by a temperature above 1 before the softmax, so that improbable words count.",
    "gradient clipping": "A gradient longer than a limit is shortened to it.",
    "rank": "One process of the training, usually with a GPU of its own.",
    "ZeRO-1, 2, 3": "How DeepSpeed shares out the model over ranks: optimizer states, gradients too, weights too.",
}
Row = dict[str, str]
"""Column -> cell."""


class Table(NamedTuple):
    headings: list[str]
    rows: list[list[str]]


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
        words=WORDS,
        pictures=[_embedded(folder, picture) for picture in pictures],
    )
    path = folder / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def in_markdown(run: History) -> str:
    """What a run did and came to, for TensorBoard."""
    lines = [f"{run.status}. {_sentence(run)}", *(f"**{fault}**" for fault in run.faults)]
    for table in _tables([run]):
        rows = [table.headings, ["---"] * len(table.headings), *table.rows]
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
    """What the run did and what came of it, for somebody who knows nothing of it."""
    if (summary := run.summary) is None:
        return ""
    widths = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in summary.student.shape.items())
    task = run.settings.get("task", {}).get("name", "mlm")
    data = run.settings.get("data", {}).get("shards") if task in ("mlm", "clm") else task
    device = f" ({summary.device})" if summary.device else ""
    return (
        f"Recipe {summary.recipe}{f' on {data}' if data else ''}: {_counted(summary.steps, 'update')}, "
        f"{_counted(summary.prunes, 'prune')}, in {summary.seconds:,.0f} s on {_counted(summary.world_size, 'rank')}"
        f"{device}, ZeRO-{summary.zero_stage}, seed {summary.seed}. The student has {summary.student.parameters:,} "
        f"parameters: {widths}. {_outcome(summary)}"
    )


def _outcome(summary: RunSummary) -> str:
    """How much of the teacher is left in the student."""
    scores = summary.validation
    if scores is None or scores.teacher is None or summary.teacher is None:
        return ""
    loss = next(key for key in scores.student if key.endswith("_loss"))
    student, teacher = scores.student[loss], scores.teacher[loss]
    words = f"It has {summary.student.parameters / summary.teacher.parameters:.0%} of the teacher's parameters"
    if scores.unigram and (known := scores.unigram[loss] - teacher) > 0:
        share = (scores.unigram[loss] - student) / known
        words += f" and keeps {share:.0%} of the teacher's lead over a unigram guess in held-out loss"
    else:
        words += f" and a held-out loss of {student:.3f}; the teacher's is {teacher:.3f}"
    speeds = [score.get("tokens_per_second", 0.0) for score in (scores.student, scores.teacher)]
    return f"{words}; its forward pass is {speeds[0] / speeds[1]:.1f} times as fast." if all(speeds) else f"{words}."


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _tables(runs: Sequence[History]) -> list[Table]:
    """Teacher, student and guess of one run; of several, a row a run, their teachers' and guesses', and beside that the
    settings that they do not share."""
    rows: dict[str, Row] = {}
    for run in runs:
        for name, row in _rows(run).items():
            if name != "student":
                own = row if len(runs) == 1 else {**row, "tokens/s": ""}  # every run measures its teacher anew
                rows.setdefault(name if own == rows.get(name, own) else f"{name} of {run.name}", own)
            elif len(runs) > 1:
                rows[run.name] = {"status": run.status, "updates": f"{run.last_update:,}"} | row
            elif run.summary is not None and run.summary.validation is not None:
                rows[name] = row
    headings = list(dict.fromkeys(heading for row in sorted(rows.values(), key=len, reverse=True) for heading in row))
    order = sorted(rows, key=lambda name: (name.startswith("unigram guess"), not name.startswith("teacher")))
    tables = [Table(["", *headings], [[name, *(rows[name].get(h, "") for h in headings)] for name in order])]
    if len(runs) > 1 and (differing := _differences(runs)):
        tables.append(Table(["what differs", *(run.name for run in runs)], differing))
    return tables if rows else tables[1:]


def _rows(run: History) -> dict[str, Row]:
    """Of a finished run, the table of its summary; else what its log knows of the student."""
    if run.summary is not None and run.summary.validation is not None:
        headings = run.summary.headings[1:]
        return {name: dict(zip(headings, cells, strict=True)) for name, *cells in run.summary.rows()}
    values = {heading: run.last(tag) for heading, (tag, _) in LOGGED.items()}
    return {"student": {h: format(value, LOGGED[h][1]) for h, value in values.items() if value is not None}}


def _differences(runs: Sequence[History]) -> list[list[str]]:
    """Settings that are not the same in all runs: key, then each one's."""
    flat = [run.flat_settings for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [[key, *(str(settings.get(key, "")) for settings in flat)] for key in keys if key != "run.name"]
    return [row for row in rows if len(set(row[1:])) > 1]
