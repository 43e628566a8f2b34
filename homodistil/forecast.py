"""--dry_run: the ladder, shapes, parameters, memory per rank and the least time a run can take, before it runs."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from homodistil.hardware import matrix_product_flops
from homodistil.models.shape import Widths
from homodistil.opening import Plan, is_sharded
from homodistil.ranks import Ranks
from homodistil.student import Student

GIB = 1024**3


def show_forecast(plan: Plan, ranks: Ranks) -> None:
    """Print the forecast on rank 0. Collective."""
    speed = matrix_product_flops(plan.dtype, ranks.device)
    if ranks.is_first:
        console = Console()
        console.print(_ladder_table(plan))
        console.print(_memory_line(plan, ranks))
        console.print(_time_line(plan, speed, ranks))
    ranks.barrier()


def parameters_of(plan: Plan, widths: Widths) -> int:
    """Parameters of the student's model at these widths."""
    return _count(Student.unfilled(plan.blueprint, plan.blueprint.full_shape.first(widths)).model)


def update_flops(plan: Plan, widths: Widths) -> float:
    """Arithmetic of one update over all ranks: forward and backward of the student, forward of the teacher, the
    vocabulary projection at scored positions only. Attention maps, 2-3 % at 128 tokens, are left out."""
    length, data = plan.index.sequence_length, plan.run.data
    tokens, vocabulary = data.global_batch * length, plan.index.vocab_size

    def per_token(shape: Widths) -> float:
        layer = 4 * shape.hidden * shape.heads * shape.head_width + 2 * shape.hidden * shape.ffn
        head = data.mask_probability * (vocabulary + shape.hidden) * shape.hidden
        return 2 * (plan.start.layers * layer + head)

    teacher = per_token(plan.blueprint.full_shape.widths) if plan.run.teacher.path else 0.0
    return tokens * (3 * per_token(widths) + teacher)


def run_flops(plan: Plan) -> float:
    """Arithmetic of the whole run, rung by rung."""
    total, widths, since = 0.0, plan.start.widths, 0
    for rung in plan.ladder.rungs:
        total += (rung.update - since) * update_flops(plan, widths)
        widths, since = rung.widths, rung.update
    return total + (plan.run.run.updates - since) * update_flops(plan, widths)


def _ladder_table(plan: Plan) -> Table:
    table = Table("after update", "student", "parameters", title=f"{plan.run.recipe}: {plan.run.run.updates} updates")
    table.add_row("0", str(plan.start.widths), f"{parameters_of(plan, plan.start.widths):,}")
    for rung in plan.ladder.rungs:
        table.add_row(str(rung.update), str(rung.widths), f"{parameters_of(plan, rung.widths):,}")
    return table


def _memory_line(plan: Plan, ranks: Ranks) -> str:
    stage, world, width = plan.ds_config.zero_stage, ranks.world_size, plan.dtype.itemsize
    student = parameters_of(plan, plan.start.widths)
    weights = student * width / (world if stage == 3 else 1)
    gradients = student * 4 / (world if stage >= 2 else 1)
    optimizer = student * 12 / world
    full = parameters_of(plan, plan.blueprint.full_shape.widths)
    teacher = full * width / (world if is_sharded(plan.run, world) else 1) if plan.run.teacher.path else 0.0
    parts = {"student weights": weights, "gradients": gradients, "masters and moments": optimizer, "teacher": teacher}
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return f"memory per rank before the first prune, GiB: {sum(parts.values()) / GIB:.2f} ({listed}) and activations"


def _time_line(plan: Plan, speed: float, ranks: Ranks) -> str:
    hours = run_flops(plan) / (speed * ranks.world_size) / 3600
    return (
        f"arithmetic {run_flops(plan):.3g} FLOP: {hours:.2f} hours on {ranks.world_size} rank(s) if all of it ran at "
        f"this machine's matrix-product speed ({speed / 1e12:.2f} TFLOP/s a rank); expect two to three times that"
    )


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
