"""HomoDistil against its alternatives on real text, at equal updates: python -m benchmarks.arms

Teacher ../shared/teacher/minilm-l6-mlm, text ../shared/data/text, two ranks, ZeRO-2, teacher sharded; the student goes
from 384 hidden, 1536 FFN to 192 (12 heads of 16), 768. Every arm runs at every learning rate of the grid and is judged
at its best one. A finished run is a row of docs/experiments/arms.json and is not run again, unless --rows names another
file; the table, and the curves beside the rows, are made anew each time. Build the shards first, as the recipe
minilm_real says.
"""

from __future__ import annotations

import json
import subprocess
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.steps import circumstances, kept_rows
from homodistil.ranks import free_port

ARMS = {
    "homodistil": [],
    "one_shot": ["--pruning.schedule", "one_shot"],
    "random_units": ["--pruning.schedule", "one_shot", "--pruning.metric", "random"],
    "random_weights": ["--student.init", "random"],
    "unpruned": ["--pruning.target.hidden", "384", "--pruning.target.head_width", "32", "--pruning.target.ffn", "1536"],
}
"""Arm -> what it changes in the recipe. One-shot prunes where the descent would begin, on the scores made by then."""
LEARNING_RATES = ("1e-3", "3e-4")
RUNS, ROWS = Path("runs/arms"), Path("docs/experiments/arms.json")
CURVES = Path("docs/experiments/arms.png")
COMMAND = f"launchers/pretrain.py --ds_config ds_configs/zero2.json --recipe minilm_real --run.directory {RUNS}".split()


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS, help="where finished rows are kept, as JSON")
    options = parser.parse_args()
    rows = kept_rows(options.rows)
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    for rate in LEARNING_RATES:
        for arm, flags in ARMS.items():
            name = f"{arm}-{rate}"
            if name not in rows:
                launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), *COMMAND]
                subprocess.run([*launcher, "--run.name", name, "--optimizer.learning_rate", rate, *flags], check=True)
                rows[name] = {"arm": arm, "learning_rate": float(rate), **measured(RUNS / name), **circumstances()}
                options.rows.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(list(rows.values()))
    draw(list(rows.values())).savefig(options.rows.with_name(CURVES.name), dpi=150)


def measured(directory: Path) -> dict[str, Any]:
    """A finished run's figures and its held-out curve."""
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [point for point in map(json.loads, lines) if "validation/kl" in point]
    return {
        "steps": summary["steps"],
        "seconds": round(summary["seconds"]),
        "parameters": summary["student"]["parameters"],
        "kl": summary["validation"]["kl"],
        "mlm_loss": summary["validation"]["student"]["mlm_loss"],
        "mlm_accuracy": summary["validation"]["student"]["mlm_accuracy"],
        "curve": {point["update"]: point["validation/kl"] for point in points},
    }


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each arm at the learning rate where its held-out KL is lowest."""
    arms = {row["arm"]: row for row in sorted(rows, key=lambda row: -row["kl"])}
    return [arms[arm] for arm in ARMS if arm in arms]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("arm", "learning rate", "parameters", "held-out KL", "MLM loss", "accuracy", "seconds")
    chosen = best(rows)
    for row in rows:
        numbers = (f"{row['kl']:.3f}", f"{row['mlm_loss']:.3f}", f"{row['mlm_accuracy']:.1%}", str(row["seconds"]))
        style = "bold" if row in chosen else None
        table.add_row(row["arm"], f"{row['learning_rate']:g}", f"{row['parameters']:,}", *numbers, style=style)
    Console().print(table)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Held-out KL over updates, each arm at its best learning rate."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for row in best(rows):
        curve = {
            int(update): kl for update, kl in row["curve"].items() if kl > 0
        }  # at update 0 a student is its teacher
        axes.plot(list(curve), list(curve.values()), marker=".", label=f"{row['arm']} ({row['learning_rate']:g})")
    axes.set(xlabel="updates", ylabel="KL(teacher || student), nats a masked position", yscale="log")
    figure.legend(loc="outside right center")
    return figure


if __name__ == "__main__":
    main()
