"""What the three papers claim, asked of runs that anyone can make: python -m benchmarks.studies core

    core        HomoDistil against pruning once and against random weights, at equal updates and at equal FLOPs;
                schedules; metrics; aligners. Three seeds.
    ablations   how many prunes, until when, which terms, smoothing. One seed.
    combined    HomoDistil with TED's filters, from a cache of a small share of the knowledge, with both. Three seeds.
    finetuned   core's students on SST-2, MRPC, CoLA, RTE and a part of SQuAD.

Teacher ../shared/teacher/minilm-l6-mlm, 384 hidden; students a quarter as wide: 96 hidden (12 heads of 8), FFN 384.
Every arm of core is run with the first seed at rates of one grid, by factors of two, until its best has been tried on
both sides, and with the other seeds at this one; arms of the other studies are run at HomoDistil's. A finished run is a
row of docs/experiments/studies_SIZE.json and is not run again, so a study may be interrupted at any moment.
One study at a time: they share these rows. Build the shards first; a full study takes those of minilm_real:

    python data_prep/build_shards.py --source ../shared/data/text/wikipedia --max_tokens 2000000 \\
      --tokenizer ../shared/teacher/minilm-l6-mlm --output data/studies
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.intervals import difference, spread
from benchmarks.steps import Step, carry_out, circumstances, is_done, kept_rows
from benchmarks.study_runs import MEASURES, MORE_SEEDS, RATES, SEEDS, SIZES, STUDIES, WIDTHS, Bench, Run
from homodistil.data.shards import ShardIndex
from homodistil.tasks import TASKS

TASK_STARTS = ("homodistil", "one_shot", "random_start")
TASK_FOLDERS = {"sst2": "glue/SST-2", "mrpc": "glue/MRPC", "cola": "glue/CoLA", "rte": "glue/RTE", "squad": "squad"}
TASK_EPOCHS = {"sst2": 2, "mrpc": 3, "cola": 3, "rte": 3, "squad": 1}
TASK_FLAGS = {
    "sst2": ["--task.train_examples", "10000"],
    "squad": ["--task.train_examples", "4000", "--task.max_length", "256", "--validation.sequences", "1000"],
}
TASK_RATES = ("1e-4", "3e-4")
CONSOLE = Console(width=200)
"""Tables are Markdown, to be taken into docs/experiments.md as they are."""


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "finetuned"])
    parser.add_argument("--size", choices=list(SIZES), default="small", help="small: two hours of two cores; full: GPU")
    parser.add_argument("--extended", action="store_true", help="students of other widths and two more seeds")
    parser.add_argument("--arms", nargs="+", help="of the study, only these: with little time, HomoDistil and another")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="where teacher/ and data/ are")
    parser.add_argument("--shards", type=Path, help="by default data/studies, of a full study data/wiki_books")
    parser.add_argument("--results", type=Path, default=Path("docs/experiments"), help="where rows and figures are")
    parser.add_argument("--parallel", type=int, default=2, help="processes at a time")
    options = parser.parse_args()
    shards, held_out = options.shards or SIZES[options.size].shards, SIZES[options.size].held_out
    if options.arms and options.study == "finetuned":
        parser.error("--arms: finetuned has those of core, all of them.")
    if not (shards / "index.json").is_file():
        parser.error(f"--shards {shards}: there are none. --help says how to build them.")
    if (there := sum(shard.sequences for shard in ShardIndex.load(shards).splits["validation"])) < held_out:
        parser.error(f"--shards {shards}: {there} sequences are held out, a {options.size} study looks at {held_out}.")
    for width in WIDTHS if options.extended else WIDTHS[:1]:
        bench = Bench(options.size, width, options.shared, shards, options.results, options.parallel)
        seeds = SEEDS + MORE_SEEDS if options.extended else SEEDS
        if options.study == "finetuned":
            finetune(bench, options.study, seeds)
        else:
            pretrain(bench, options.study, seeds, options.arms)


def pretrain(bench: Bench, name: str, seeds: Sequence[int], arms: Sequence[str] | None = None) -> None:
    """A study's runs, its tables and its figure; of all its arms if `arms` is None."""
    study = STUDIES[name].only(arms)
    seeds = seeds if study.seed is None else (study.seed,)
    graded = study.arms if study.own_rates else ["homodistil"]
    for title, equal_flops in (("rates", False), ("rates, equal FLOPs", True)):
        chosen = [arm for arm in graded if arm.endswith("+") == equal_flops]
        while untried := [Run(arm, rate, SEEDS[0]) for rate in RATES for arm in chosen if rate in bench.untried(arm)]:
            bench.finish(untried, title)
    bench.finish([bench.best(arm, seed) for arm in study.arms for seed in seeds], "every seed")
    if study.own_rates:
        show_rates(bench, study.arms)
    groups = {title: {arm: bench.found(arm, seeds) for arm in group} for title, group in study.groups.items()}
    for title, arms_of_group in groups.items():
        show(f"{name}, {title}: {bench.width} hidden", arms_of_group)
    draw(groups).savefig(bench.results / f"studies_{bench.name}_{name}.png", dpi=150)


Seeds = dict[int, dict[str, Any]]
"""Rows of an arm's seeds."""


def show(title: str, arms: dict[str, Seeds]) -> None:
    """Means and deviations, and what an arm has more than the first, seed by seed."""
    first, *_ = arms
    table = Table("arm", "rate", "seeds", "updates", "TFLOP", *MEASURES.values(), "largest jump", "KL - first's",
                  "MLM loss - first's", title=title, box=box.MARKDOWN)  # fmt: skip
    for arm, seeds in arms.items():
        if not (rows := list(seeds.values())):
            continue
        jumps = [row["largest_jump"] for row in rows if row["largest_jump"] is not None]
        cells = [rows[0]["rate"], str(len(rows)), f"{rows[0]['updates']:,}", f"{rows[0]['flops'] / 1e12:,.1f}"]
        cells += [spread([row[key] for row in rows]) for key in MEASURES] + [spread(jumps)]
        both = seeds.keys() & arms[first].keys() if arm != first else []
        cells += [difference([seeds[n][key] - arms[first][n][key] for n in both]) for key in list(MEASURES)[:2]]
        table.add_row(f"`{arm}`", *cells)
    CONSOLE.print(table)


def show_rates(bench: Bench, arms: Sequence[str]) -> None:
    """KL of every arm's first seed at each rate that was tried."""
    tried = {arm: bench.tried(arm) for arm in arms}
    rates = [rate for rate in RATES if any(rate in kl for kl in tried.values())]
    table = Table("KL at rate", *rates, title=f"rates, seed {SEEDS[0]}", box=box.MARKDOWN)
    for arm, kl in tried.items():
        table.add_row(f"`{arm}`", *(f"{kl[rate]:.3f}" if rate in kl else "" for rate in rates))
    CONSOLE.print(table)


def draw(groups: dict[str, dict[str, Seeds]]) -> Figure:
    """KL to the teacher at every look, means of the seeds; a dot for where each seed ended."""
    columns = min(2, len(groups))
    rows_of_panels = -(-len(groups) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.5 * rows_of_panels), layout="constrained")
    panels = figure.subplots(rows_of_panels, columns, squeeze=False, sharey=True)
    for panel, (title, arms) in zip(panels.flat, groups.items(), strict=False):
        for arm, seeds in arms.items():
            if rows := list(seeds.values()):
                curves = [{int(update): kl for update, kl in row["curve"].items()} for row in rows]
                # A run that was resumed was looked at then, too.
                of_all = [update for update in curves[0] if all(update in curve for curve in curves)]
                heights = [mean(curve[update] for curve in curves) for update in of_all]
                style = {"marker": "|", "linestyle": "--" if arm.endswith("+") else "-"}
                (line,) = panel.plot(of_all, heights, label=f"{arm}, {rows[0]['rate']}", **style)
                panel.plot([rows[0]["updates"]] * len(rows), [row["kl"] for row in rows], ".", color=line.get_color())
        panel.set(title=title, xlabel="updates")
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=8)
    figure.supylabel("KL to the teacher, nats a masked position", fontsize=10)
    return figure


def finetune(bench: Bench, study: str, seeds: Sequence[int]) -> None:
    """The students of core on tasks, every student at every rate; an arm is judged at the rate best for its mean."""
    file = bench.results / f"studies_{bench.name}_{study}.json"
    rows = kept_rows(file)
    trained, results = [], {}
    for task, arm, seed, rate in product(TASK_EPOCHS, TASK_STARTS, seeds, TASK_RATES):
        name = "-".join((task, arm, rate, str(seed)))
        if name not in rows:
            student = bench.best(arm, seed)
            step = task_step(bench, task, name, student, rate)
            trained += [*bench.steps(student), step]
            results[name] = {"task": task, "arm": arm, "rate": rate, "seed": seed, "student": student.name}, step.result
    try:
        carry_out(list({step.name: step for step in trained}.values()), bench.folder / "logs", bench.parallel, study)
    finally:
        for name, (row, result) in results.items():
            if is_done(result):
                student_figures = json.loads(result.read_text(encoding="utf-8"))["validation"]["student"]
                rows[name] = row | student_figures | circumstances()
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show_tasks(list(rows.values()), seeds)


def task_step(bench: Bench, task: str, name: str, student: Run, rate: str) -> Step:
    flags = ["--recipe", "finetune", "--student.path", str(bench.folder / student.name / "student")]
    flags += ["--task.name", task, "--task.path", str(bench.shared / "data" / TASK_FOLDERS[task])]
    flags += ["--task.epochs", str(TASK_EPOCHS[task]), "--optimizer.learning_rate", rate, "--seeds", str(student.seed)]
    flags += ["--run.directory", str(bench.folder / "tasks"), "--run.name", name, "--checkpoint.every", "100000"]
    flags += ["--task.group_by_length", "true", "--validation.every", "100000"]
    flags += TASK_FLAGS.get(task, [])
    result = bench.folder / "tasks" / name / f"seed_{student.seed}/summary.json"
    return Step(name, "finetune", flags, result, (student.name,))


def show_tasks(rows: list[dict[str, Any]], seeds: Sequence[int]) -> None:
    """Each arm at its best rate, and what it has more than HomoDistil, seed by seed."""
    table = Table("task", "metric", "arm", "rate", "seeds", "metric, mean", "- homodistil's",
                  box=box.MARKDOWN)  # fmt: skip
    for task in TASK_EPOCHS:
        metric = TASKS[task].metrics[0]
        chosen: dict[str, dict[int, float]] = {}
        for arm in TASK_STARTS:
            by_rate: dict[str, dict[int, float]] = {}
            for row in rows:
                if (row["task"], row["arm"]) == (task, arm) and row["seed"] in seeds:
                    by_rate.setdefault(row["rate"], {})[row["seed"]] = row[metric]
            if not by_rate:
                continue
            rate = max(by_rate, key=lambda rate: mean(by_rate[rate].values()))
            chosen[arm] = by_rate[rate]
            both = sorted(chosen[arm].keys() & chosen.get(TASK_STARTS[0], {}).keys())
            paired = [chosen[arm][seed] - chosen[TASK_STARTS[0]][seed] for seed in both]
            compared = difference(paired) if arm != TASK_STARTS[0] else ""
            scores = list(chosen[arm].values())
            table.add_row(task, metric, f"`{arm}`", rate, str(len(scores)), spread(scores), compared)
    CONSOLE.print(table)


if __name__ == "__main__":
    main()
