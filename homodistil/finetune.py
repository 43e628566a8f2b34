"""Fine-tuning: one run after another of the same task, a seed each, and what they came to together.

The training is train.py's; a run's own metrics are made when it closes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

from homodistil.config import RunConfig
from homodistil.ds_config import DeepSpeedConfig
from homodistil.engine import started_ranks
from homodistil.errors import ConfigError
from homodistil.files import write_text_durably
from homodistil.forecast import show_forecast
from homodistil.opening import forget_ending, provide_data
from homodistil.preemption import Preemption
from homodistil.run_plan import plan_run
from homodistil.summary import RunSummary
from homodistil.train import train

FILE = "scores.json"


def finetune(
    run: RunConfig,
    seeds: Sequence[int],
    ds_config: DeepSpeedConfig,
    teacher_ds_config: DeepSpeedConfig,
    dry_run: bool = False,
) -> None:
    """What `launchers/finetune.py` does: a run for each seed in `runs/NAME/seed_N`, beside them `scores.json` with the
    task's metrics, their mean and deviation. Raises `ConfigError` for a task that is not a benchmark's. Collective."""
    if run.task.task.is_language_modeling:
        raise ConfigError(
            f"task.name is {run.task.name}: launchers/finetune.py is for GLUE and SQuAD, such as --task.name mrpc. For "
            "language modelling use launchers/pretrain.py."
        )
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ConfigError(f"--seeds: found {list(seeds)}, expected one or more, each once.")
    run = run.with_filter_folders()
    with started_ranks() as ranks:
        source = provide_data(run, ranks)
        plans = ranks.together(
            lambda: [plan_run(seeded(run, seed), source, ds_config, ranks.world_size) for seed in seeds]
        )
        if dry_run:
            return show_forecast(plans[0], ranks)
        summaries = {}
        with Preemption() as preemption:
            for seed, plan in zip(seeds, plans, strict=True):
                ranks.once(lambda plan=plan: forget_ending(plan.run))  # type: ignore[misc]
                summaries[seed] = train(plan, teacher_ds_config, ranks, preemption)
        ranks.once(lambda: conclude(run.run.path, run.task.task.metrics, summaries))


def seeded(run: RunConfig, seed: int) -> RunConfig:
    """One of the runs."""
    one = run.model_copy(deep=True)
    one.run.seed, one.run.name = seed, f"{run.run.name}/seed_{seed}"
    return one


def conclude(directory: Path, metrics: Sequence[str], summaries: dict[int, RunSummary]) -> None:
    """Write and show what all seeds came to."""
    scores = {seed: _scores(summary, metrics) for seed, summary in summaries.items()}
    columns = {name: [score[name] for score in scores.values()] for name in next(iter(scores.values()))}
    spread = {name: stdev(values) if len(values) > 1 else None for name, values in columns.items()}
    figures = {
        "seeds": {str(seed): score for seed, score in scores.items()},
        "mean": {name: mean(values) for name, values in columns.items()},
        "standard_deviation": spread,
    }
    write_text_durably(directory / FILE, json.dumps(figures, indent=1) + "\n")
    table = Table("seed", *columns, title=f"{directory.name}: {len(scores)} seed(s)")
    for seed, score in scores.items():
        table.add_row(str(seed), *(f"{value:.4f}" for value in score.values()))
    table.add_section()
    table.add_row("mean", *(f"{mean(values):.4f}" for values in columns.values()), style="bold")
    if len(scores) > 1:
        table.add_row("deviation", *(f"{value:.4f}" for value in spread.values() if value is not None))
    console = Console()
    console.print(table)
    console.print(f"{'scores':<12} {directory / FILE}", soft_wrap=True, highlight=False)


def _scores(summary: RunSummary, metrics: Sequence[str]) -> dict[str, float]:
    assert summary.validation is not None, "of a finished run"
    score = summary.validation.student
    distance = {} if summary.validation.kl is None else {"kl": summary.validation.kl}
    return {name: score[name] for name in (*metrics, "task_loss")} | distance
