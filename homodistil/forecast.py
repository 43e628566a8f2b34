"""Forecasts: --dry_run for this machine, `homodistil plan` for others; and what arithmetic an update is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, PretrainedConfig

from homodistil.checks import check_length
from homodistil.config import RunConfig
from homodistil.data.shards import ShardIndex
from homodistil.ds_config import DeepSpeedConfig, micro_batch_size
from homodistil.errors import ConfigError
from homodistil.machines import GIB, Machine
from homodistil.models.attention import attention_implementation
from homodistil.models.shape import Widths
from homodistil.planning import Outlook, Planner, Update, bound_by_communication
from homodistil.progress import progress_bar
from homodistil.ranks import Ranks
from homodistil.run_plan import Plan, draw_blueprint, original_config, plan_shapes
from homodistil.student import Blueprint, Student
from homodistil.tasks import Kind

WELL_KNOWN = {"google-bert/bert-base-uncased": BertConfig}
"""Teachers whose widths are known, so that no network is asked for them."""
MOST_GPUS = 1024
PARTS = tuple(part.name for part in fields(Update))


def show_forecast(plan: Plan, ranks: Ranks) -> None:
    """Print on rank 0 what the run would be on these ranks, whose speed is measured. Collective."""
    machine = Machine.here(ranks.device, plan.dtype)
    if ranks.is_first:
        console = Console()
        planner = Planner(
            plan.blueprint,
            plan.ladder,
            plan.start.widths,
            plan.source.sequence_length,
            machine,
            plan.ds_config,
            plan.dtype,
        )
        _count(planner)
        console.print(_ladder_table(planner))
        _show_outlook(console, planner.outlook(ranks.world_size), machine)
        if (mean := plan.source.mean_length) < plan.source.sequence_length:
            console.print(
                f"(counted for examples of {plan.source.sequence_length} tokens, the longest there may be; they have "
                f"{mean:.0f} on average, and a batch is as wide as its longest)"
            )
        if ranks.world_size > 1:
            console.print("(links between ranks are not measured: communication counts as nothing)")
    ranks.barrier()


def show_plan(
    run: RunConfig,
    ds_config: DeepSpeedConfig,
    machine: Machine,
    gpus: int,
    length: int | None,
    curve: Path | None,
) -> None:
    """Print what the run would be on other machines than this one. Raises `ConfigError`, `ShapeError`,
    `ModelError`."""
    run = run.with_filter_folders()
    found = run.data.shards / "index.json"
    index = ShardIndex.load(run.data.shards, check_files=False) if found.is_file() else None
    config = _config(run, index.vocab_size if index else BertConfig().vocab_size)
    tokens = length or (index.sequence_length if index else 128)
    check_length(run, config, tokens)
    micro_batch_size(run.data.global_batch, run.data.micro_batch, gpus)  # refuses what they cannot share
    _check_curve(curve)
    if ds_config.dtype != torch.bfloat16:
        raise ConfigError(
            f"{ds_config.path}: bf16 is not enabled, and the speeds of GPUs here are bf16's. Plan with bf16, or use "
            "`pretrain --dry_run` on the machine itself."
        )
    blueprint = replace(draw_blueprint(run, config.vocab_size, config), attention=attention_implementation("sdpa"))
    start, ladder = plan_shapes(blueprint)
    planner = Planner(blueprint, ladder, start.widths, tokens, machine, ds_config, ds_config.dtype)
    _count(planner)
    console, outlook = Console(), planner.outlook(gpus)
    console.print(_ladder_table(planner))
    console.print(f"{gpus} x {machine.name}, sequences of {tokens} tokens, ZeRO stage {ds_config.zero_stage}:")
    _show_outlook(console, outlook, machine)
    outlooks = planner.doubling(MOST_GPUS)
    console.print(_scaling_table(outlooks))
    bound = bound_by_communication(planner.doubling(run.data.global_batch))
    console.print(
        f"A global batch of {run.data.global_batch:,} is communication-bound "
        + (f"from {bound:,} GPUs on." if bound else "on no number of GPUs that it can be shared by.")
        + f" {machine.name}'s speeds are a data sheet's, less what is usual: docs/scaling.md says how far off that is."
    )
    if run.data.lanes < outlooks[-1].ranks:
        console.print(f"More than {run.data.lanes} ranks need a larger data.lanes, and shards that it divides.")
    if curve:
        _draw(outlooks, f"{run.recipe} on {machine.name}", curve)
        console.print(f"drawn to {curve}")


def parameters_of(blueprint: Blueprint, widths: Widths) -> int:
    """Parameters of the student's model at these widths."""
    model = Student.unfilled(blueprint, blueprint.full_shape.first(widths)).model
    return sum(p.numel() for p in model.parameters())


def update_flops(plan: Plan, widths: Widths) -> float:
    """Arithmetic of one update over all ranks: forward and backward of the student, forward of the teacher, the
    vocabulary projection at scored positions only. Attention's maps are counted whole, of causal models too."""
    shares: dict[Kind, float] = {"masked": plan.run.data.mask_probability, "causal": 1.0}
    scored, vocabulary = shares.get(plan.task.kind, 0.0), plan.source.vocab_size

    def per_token(shape: Widths, layers: int) -> float:
        inner = shape.heads * shape.head_width
        layer = 4 * shape.hidden * inner + 2 * shape.hidden * shape.ffn + 2 * plan.source.mean_length * inner
        head = scored * (vocabulary + shape.hidden) * shape.hidden
        return 2 * (layers * layer + head)

    config = plan.blueprint.teacher_config
    teacher = per_token(plan.family.widths(config), plan.family.layers(config)) if plan.run.has_live_teacher else 0.0
    return plan.tokens_per_update * (3 * per_token(widths, plan.start.layers) + teacher)


def _config(run: RunConfig, vocab_size: int) -> PretrainedConfig:
    if run.student.path is None and run.teacher.path in WELL_KNOWN and not Path(run.teacher.path).exists():
        return WELL_KNOWN[run.teacher.path]()
    return original_config(run, vocab_size)


def _check_curve(curve: Path | None) -> None:
    if curve and curve.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--curve {curve}: found '{curve.suffix}', expected .png, .svg or .pdf.")
    if curve and not curve.absolute().parent.is_dir():
        raise ConfigError(f"--curve {curve}: there is no folder {curve.parent}. Make it, or give another.")


def _count(planner: Planner) -> None:
    with progress_bar("counting", len(planner.shapes()), "shape") as bar:
        for widths in planner.shapes():
            planner.update(widths)
            bar.update()


def _ladder_table(planner: Planner) -> Table:
    run = planner.blueprint.run
    table = Table("after update", "student", "parameters", title=f"{run.recipe}: {run.run.updates} updates")
    for update, widths in zip((0, *(r.update for r in planner.ladder.rungs)), planner.shapes(), strict=True):
        table.add_row(str(update), str(widths), f"{parameters_of(planner.blueprint, widths):,}")
    return table


def _show_outlook(console: Console, outlook: Outlook, machine: Machine) -> None:
    held = sum(outlook.memory.values())
    listed = ", ".join(f"{part} {size / GIB:.2f}" for part, size in outlook.memory.items())
    warning = ": MORE THAN THERE IS" if held > machine.memory else ""
    console.print(f"memory per rank before the first prune, GiB: {held / GIB:.2f} ({listed}){warning}")
    parts = ", ".join(f"{part} {value:.3g}" for part, value in vars(outlook.update).items())
    console.print(
        f"an update: {outlook.accumulation} micro-batch(es) of {outlook.micro_batch} on each rank, "
        f"{outlook.update.seconds:.3g} s ({parts})"
    )
    console.print(
        f"the run: {outlook.flops:.3g} FLOP in {outlook.hours:.3g} hours on {outlook.ranks} rank(s), "
        f"{outlook.hours * outlook.ranks:.3g} in all; validation, prunes and checkpoints not counted"
    )


def _scaling_table(outlooks: Sequence[Outlook]) -> Table:
    table = Table("GPUs", "batches", "update, s", "hours", "GPU h", "GiB", "mostly", "comm")
    for outlook in outlooks:
        update = outlook.update
        table.add_row(
            str(outlook.ranks),
            f"{outlook.accumulation} x {outlook.micro_batch}",
            f"{update.seconds:.3f}",
            f"{outlook.hours:.2f}",
            f"{outlook.hours * outlook.ranks:.1f}",
            f"{sum(outlook.memory.values()) / GIB:.1f}",
            update.longest,
            f"{update.communication / update.seconds:.0%}",
        )
    return table


def _draw(outlooks: Sequence[Outlook], title: str, path: Path) -> None:
    """Hours over GPUs, and what an update is made of."""
    gpus = [outlook.ranks for outlook in outlooks]
    shares = [[getattr(o.update, part) / o.update.seconds for o in outlooks] for part in PARTS]
    with matplotlib.rc_context({"font.size": 9}):
        figure, (hours, parts) = plt.subplots(2, sharex=True, figsize=(7, 6), layout="constrained")
        hours.loglog(gpus, [outlook.hours for outlook in outlooks], marker="o", label="forecast")
        hours.loglog(gpus, [outlooks[0].hours / count for count in gpus], linestyle=":", label="if it scaled perfectly")
        hours.set(ylabel="hours", title=title)
        hours.legend()
        parts.stackplot(gpus, shares, labels=PARTS)
        parts.set(xscale="log", xlabel="GPUs", ylabel="share of an update", xlim=(gpus[0], gpus[-1]), ylim=(0, 1))
        parts.set_xticks(gpus, [str(count) for count in gpus])
        parts.minorticks_off()
        parts.legend(loc="lower left")
        figure.savefig(path, dpi=120)
        plt.close(figure)
