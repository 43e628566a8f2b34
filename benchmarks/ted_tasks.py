"""TED against KD and LWD on tasks of GLUE, all from one student: python -m benchmarks.ted_tasks

Teacher: ../shared/teacher/minilm-l6-mlm, fine-tuned. Student: layers 2, 4 and 6 of the fine-tuned teacher, fine-tuned
without it. Every arm starts from that student, with the same updates and rate, and is judged by its last weights. The
weights a1 and a2 are those that TED's authors published for the task; `+` grants an arm the updates that TED spent on
filters. A finished task is not run again; of one that was interrupted, the seeds that there are are shown.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.intervals import difference, spread
from benchmarks.steps import Step, is_done, study_of_tasks
from homodistil.tasks import TASKS


class Setting(NamedTuple):
    """What differs from task to task."""

    folder: str
    seeds: int
    a1: float
    """Of KL in TED and LWD; KD has 20 everywhere."""
    lwd: float
    """a2, of LWD."""
    ted: float
    examples: int | None = None


SETTINGS = {  # the longest first, so that several at a time end together
    "sst2": Setting("SST-2", 3, 20, 20, 20, examples=10_000),
    "cola": Setting("CoLA", 5, 0, 5, 10),
    "mrpc": Setting("MRPC", 5, 20, 5, 100),
    "rte": Setting("RTE", 5, 20, 20, 50),
}
"""Published by TED's authors for DeBERTaV3-xsmall; a part of SST-2, fixed."""
EPOCHS, FILTER_EPOCHS, FILTER_RATE = 3, 1, 1e-3
RATE, BATCH = 5e-5, 32
LONGEST = 3000
"""Updates that one process does, at most, if that leaves it a seed."""
TRAINING = {"mrpc": 3668, "cola": 8551, "rte": 2490, "sst2": 10_000}
ARMS = ("kd", "lwd", "ted", "kd+", "lwd+")
PAIRS = (("ted", "kd"), ("ted", "lwd"), ("ted", "kd+"), ("ted", "lwd+"), ("lwd", "kd"))
RUNS, ROWS = Path("runs/ted_tasks"), Path("docs/experiments/ted_tasks.json")


def main() -> None:
    rows, _ = study_of_tasks(__doc__, SETTINGS, ROWS, RUNS / "logs", steps, collected)
    show({task: row for task, row in rows.items() if task in SETTINGS})


def updates(task: str, epochs: int) -> int:
    return -(-epochs * TRAINING[task] // BATCH)


def steps(task: str, shared: Path) -> list[Step]:
    """Teacher, student, filters of both, arms."""
    setting, folder = SETTINGS[task], RUNS / task
    common = ["--recipe", "finetune", "--task.name", task, "--task.path", str(shared / "data/glue" / setting.folder)]
    common += ["--run.directory", str(folder), "--optimizer.learning_rate", str(RATE), "--checkpoint.every", "100000"]
    common += ["--data.global_batch", str(BATCH), "--validation.every", "100000"]
    if setting.examples:
        common += ["--task.train_examples", str(setting.examples)]
    teacher, student = (str(folder / name / "seed_0" / "student") for name in ("teacher", "student"))
    original = str(shared / "teacher/minilm-l6-mlm")

    def run(name: str, needs: tuple[str, ...], seeds: list[int], epochs: int, *flags: str) -> Step:
        named = [
            *common,
            "--run.name",
            name,
            "--task.epochs",
            str(epochs),
            *flags,
            "--seeds",
            ",".join(map(str, seeds)),
        ]
        result = folder / name / f"seed_{seeds[-1]}/summary.json"
        return Step(f"{task}/{name}/{seeds[0]}", "finetune", named, result, needs)

    def filters(of: str) -> Step:
        both = ["--teacher.path", teacher, "--student.path", student, "--objective.hidden.aligner", "filter"]
        learned = ["--filters.learning_rate", str(FILTER_RATE), "--filters.updates", str(updates(task, FILTER_EPOCHS))]
        flags = [*common, "--run.name", "ted", *both, *learned, "--of", of]
        return Step(f"{task}/filters/{of}", "learn_filters", flags, folder / f"ted-{of}_filters/summary.json", ready)

    ready = (f"{task}/teacher/0", f"{task}/student/0")
    made = run("teacher", (), [0], EPOCHS, "--student.path", original)
    cut = run("student", ready[:1], [0], EPOCHS, "--student.path", teacher, "--student.layers", "1,3,5")
    prepared = [made, cut, filters("teacher"), filters("student")]
    for arm in sorted(ARMS, key=len, reverse=True):
        epochs = EPOCHS + (2 * FILTER_EPOCHS if arm.endswith("+") else 0)
        flags = ["--teacher.path", teacher, "--student.path", student, *knowledge(arm.rstrip("+"), setting)]
        needs = (*ready, f"{task}/filters/teacher", f"{task}/filters/student") if arm == "ted" else ready
        seeds, count = list(range(1, setting.seeds + 1)), max(1, LONGEST // updates(task, epochs))
        prepared += [run(arm, needs, seeds[i : i + count], epochs, *flags) for i in range(0, len(seeds), count)]
    return prepared


def knowledge(arm: str, setting: Setting) -> list[str]:
    """What an arm compares."""
    weights = {"kd": (20, 0), "lwd": (setting.a1, setting.lwd), "ted": (setting.a1, setting.ted)}
    kl, hidden = weights[arm]
    flags = ["--objective.kl.weight", str(kl), "--objective.hidden.weight", str(hidden)]
    aligner = {"kd": [], "lwd": ["projection", "--objective.hidden.projection_init", "random"], "ted": ["filter"]}[arm]
    return [*flags, *(["--objective.hidden.aligner", *aligner, "--knowledge.embeddings", "false"] if aligner else [])]


def collected(task: str) -> dict[str, Any]:
    """Every seed's figures of every arm, and what teacher and student had before, as soon as TED has one."""
    if not summaries(RUNS, task, "ted"):
        return {}
    return {name: summaries(RUNS, task, name) for name in ("teacher", "student", *ARMS)}


def summaries(runs: Path, task: str, name: str) -> dict[str, dict[str, float]]:
    """Seed -> figures of a run's finished seeds."""
    found = sorted(file for file in (runs / task / name).glob("seed_*/summary.json") if is_done(file))
    return {file.parent.name.removeprefix("seed_"): _figures(task, file) for file in found}


def _figures(task: str, summary: Path) -> dict[str, float]:
    validation = json.loads(summary.read_text(encoding="utf-8"))["validation"]
    distance = {} if validation["kl"] is None else {"kl": validation["kl"]}
    return {key: validation["student"][key] for key in (*TASKS[task].metrics, "task_loss")} | distance


def show(rows: dict[str, Any]) -> None:
    """Means and deviations, then paired differences, of the headline metric and of the development loss."""
    console = Console(width=150)
    for task, row in rows.items():
        metric = TASKS[task].metrics[0]
        table = Table("arm", "seeds", metric, "loss", "KL", title=f"{task}, {row['device']}, commit {row['commit']}")
        for name in ("teacher", "student", *ARMS):
            seeds = list(row[name].values())
            cells = [spread([seed[key] for seed in seeds if key in seed]) for key in (metric, "task_loss", "kl")]
            table.add_row(name, str(len(seeds)), *cells)
        console.print(table)
        table = Table("paired difference", metric, "loss", "KL")
        for better, other in PAIRS:
            cells = []
            for key in (metric, "task_loss", "kl"):
                both = sorted(row[better].keys() & row[other].keys())
                cells.append(difference([row[better][seed][key] - row[other][seed][key] for seed in both]))
            table.add_row(f"{better} - {other}", *cells)
        console.print(table)


if __name__ == "__main__":
    main()
