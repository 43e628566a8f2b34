"""TED against continued training, KD and LWD, at equal updates of text: python -m benchmarks.ted_lm mlm gpt2

mlm: ../shared/teacher/minilm-l6-mlm teaches 3 of its own 6 layers. gpt2: a small GPT-2, trained here, does the same.
Every arm starts from the same student, which was cut from the teacher and trained on without it; `+` grants an arm the
updates that TED spent on filters. GPT-2s are measured on WikiText-2 (validation) and LAMBADA as well. A finished run
is not run again. The shards are those that the recipes ted_mlm and ted_tiny_gpt2 name, or --shards.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.steps import Step, carry_out, circumstances, is_done, kept_rows

RECIPES = {"mlm": "ted_mlm", "gpt2": "ted_tiny_gpt2"}
ARMS = ("continued", "kd", "lwd", "ted", "kd+", "lwd+")
UPDATES, FILTER_UPDATES = 600, 200
SEEDS = (1,)
LWD = ["--objective.hidden.aligner", "projection", "--objective.hidden.projection_init", "random"]
KNOWLEDGE = {
    "kd": ["--objective.hidden.weight", "0"],
    "lwd": [*LWD, "--knowledge.embeddings", "false"],
    "ted": [],
}
KEPT = {
    "perplexity": ("word_perplexity", "token_perplexity"),
    "lambada": ("lambada_accuracy", "last_word_log_probability"),
}
"""Task of evaluate.py -> the figures that are shown."""
RUNS, ROWS = Path("runs/ted_lm"), Path("docs/experiments/ted_lm.json")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", choices=list(RECIPES))
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="where data/lm and teacher/ are")
    parser.add_argument("--shards", help="instead of the recipe's; of one study")
    parser.add_argument("--parallel", type=int, default=1, help="processes at a time")
    parser.add_argument("--rows", type=Path, default=ROWS, help="where finished rows are kept, as JSON")
    options = parser.parse_args()
    rows = kept_rows(options.rows)
    missing = [study for study in options.studies if study not in rows]
    planned = {study: steps(study, options.shared, options.shards) for study in missing}
    try:
        carry_out([step for steps in planned.values() for step in steps], RUNS / "logs", options.parallel, "TED, text")
    finally:
        for study, of_study in planned.items():
            if all(is_done(step.result) for step in of_study):
                rows[study] = collected(study) | circumstances()
        options.rows.parent.mkdir(parents=True, exist_ok=True)
        options.rows.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(rows)


def steps(study: str, shared: Path, shards: str | None) -> list[Step]:
    """Teacher (of gpt2), student, filters of both, arms, and what GPT-2s score elsewhere."""
    folder, recipe = RUNS / study, ["--recipe", RECIPES[study], "--run.directory", str(RUNS / study)]
    common = [*recipe, "--checkpoint.every", "100000", *(["--data.shards", shards] if shards else [])]
    teacher = str(shared / "teacher/minilm-l6-mlm") if study == "mlm" else str(folder / "teacher/student")
    student, planned = str(folder / "start/student"), []

    def run(name: str, needs: list[str], *flags: str) -> None:
        named = [*common, "--run.name", name, *flags]
        result = folder / name / "summary.json"
        planned.append(Step(f"{study}/{name}", "pretrain", named, result, tuple(f"{study}/{n}" for n in needs)))

    made = []
    if study == "gpt2":
        flags = ["--recipe", "tiny_gpt2", *common[2:], "--run.name", "teacher"]
        planned.append(Step("gpt2/teacher", "pretrain", flags, folder / "teacher/summary.json"))
        made = ["teacher"]
    alone = ["--student.dropout", "0", "--teacher.path", "none", "--run.updates", str(UPDATES), "--student.path"]
    run("start", made, *alone, teacher, "--student.layers", "1,3,5")
    both = ["--teacher.path", teacher, "--student.path", student]
    both_models = ("teacher", "student")
    for of in both_models:
        flags = [*common, "--run.name", "ted", *both, "--of", of, "--filters.updates", str(FILTER_UPDATES)]
        result = folder / f"ted-{of}_filters/summary.json"
        planned.append(Step(f"{study}/filters of {of}", "learn_filters", flags, result, (f"{study}/start",)))
    for seed in SEEDS:
        for arm in ARMS:
            needs = ["start", *([f"filters of {of}" for of in both_models] if arm == "ted" else [])]
            updates = UPDATES + (2 * FILTER_UPDATES if arm.endswith("+") else 0)
            how = [*alone, student] if arm == "continued" else [*both, *KNOWLEDGE[arm.rstrip("+")]]
            for of in both_models if arm == "ted" else ():
                how += [f"--{of}.filters", str(folder / f"ted-{of}_filters/filters")]
            run(f"{arm}_{seed}", needs, *how, "--run.updates", str(updates), "--run.seed", str(seed))
    if study == "gpt2":
        planned += elsewhere(folder, shared)
    return planned


def elsewhere(folder: Path, shared: Path) -> list[Step]:
    """What GPT-2s score on other texts than they were trained on."""
    measured = []
    texts = {"perplexity": "data/lm/wikitext2_valid.txt", "lambada": "data/lm/lambada_test.jsonl"}
    for name in ("teacher", "start", *(f"{arm}_{seed}" for arm in ARMS for seed in SEEDS)):
        for task, text in texts.items():
            result = folder / name / f"{task}.json"
            flags = ["--task", task, "--model", str(folder / name / "student"), "--data.path", str(shared / text)]
            flags += ["--output", str(result)]
            measured.append(Step(f"{name}/{task}", "evaluate", flags, result, (f"gpt2/{name}",)))
    return measured


def collected(study: str) -> dict[str, Any]:
    """Figures of the teacher and the first student, and of every arm by seed."""
    first = _figures(study, "start")
    summary = json.loads((RUNS / study / f"kd_{SEEDS[0]}/summary.json").read_text(encoding="utf-8"))
    teacher = {k: v for k, v in summary["validation"]["teacher"].items() if k != "tokens_per_second"}
    teacher |= _elsewhere(RUNS / study / "teacher")
    arms = {arm: {str(seed): _figures(study, f"{arm}_{seed}") for seed in SEEDS} for arm in ARMS}
    return {"teacher": {"0": teacher}, "start": {"0": first}, **arms}


def _figures(study: str, name: str) -> dict[str, float]:
    validation = json.loads((RUNS / study / name / "summary.json").read_text(encoding="utf-8"))["validation"]
    own = {key: value for key, value in validation["student"].items() if key != "tokens_per_second"}
    distance = {} if validation["kl"] is None else {"kl": validation["kl"]}
    return own | distance | _elsewhere(RUNS / study / name)


def _elsewhere(folder: Path) -> dict[str, float]:
    """The numbers of the JSON files that evaluate.py left beside a model."""
    found: dict[str, float] = {}
    for task in ("perplexity", "lambada"):
        if (folder / f"{task}.json").exists():
            values = json.loads((folder / f"{task}.json").read_text(encoding="utf-8"))
            found |= {key: values[key] for key in KEPT[task]}
    return found


def show(rows: dict[str, Any]) -> None:
    """Means, and deviations over seeds."""
    console = Console(width=170)
    for study, row in rows.items():
        columns = list(row["kd"][str(SEEDS[0])])
        table = Table("arm", *columns, title=f"{study}: {row['device']}, commit {row['commit']}")
        for name in ("teacher", "start", *ARMS):
            cells = []
            for column in columns:
                values = [seed[column] for seed in row[name].values() if column in seed]
                spread = f" ({stdev(values):.4f})" if len(values) > 1 else ""
                cells.append(f"{mean(values):.4f}{spread}" if values else "")
            table.add_row(name, *cells)
        console.print(table)


if __name__ == "__main__":
    main()
