"""Closing a run: the student as a Hugging Face directory, its summary and report, and where to look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from homodistil.batch import Batch
from homodistil.engine import StudentEngine, TeacherEngine
from homodistil.evaluation.language_modeling import load_stock, score, unigram
from homodistil.export import export_student
from homodistil.metrics import Metrics, peak_memory_bytes
from homodistil.models.loading import model_directory
from homodistil.models.shape import StudentShape
from homodistil.objective.measures import Measures
from homodistil.opening import Plan
from homodistil.ranks import Ranks
from homodistil.report import write_report
from homodistil.summary import RunSummary, Score, StudentFigures, TeacherFigures, Validation, print_table


@dataclass(frozen=True)
class Outcome:
    """What is left of a run once its engines are gone."""

    plan: Plan
    zero_stage: int
    world_size: int
    weights: Mapping[str, Tensor]
    """Whole fp32 tensors on rank 0, nothing elsewhere."""
    shape: StudentShape
    teacher_parameters: int | None
    validation: Measures
    metrics: Metrics
    peak_memory_bytes: int
    device: torch.device


def finish(
    plan: Plan,
    student: StudentEngine,
    teacher: TeacherEngine | None,
    validation: Measures,
    held_out: list[Batch],
    metrics: Metrics,
    ranks: Ranks,
) -> RunSummary:
    """Gather the student on rank 0, close both engines, and leave the run's files behind. Collective."""
    outcome = Outcome(
        plan=plan,
        zero_stage=student.zero_stage,
        world_size=ranks.world_size,
        weights=dict(student.weights()),
        shape=student.shape,
        teacher_parameters=teacher.parameters if teacher else None,
        validation=validation,
        metrics=metrics,
        peak_memory_bytes=max(ranks.gather(peak_memory_bytes())),
        device=ranks.device,
    )
    student.close()
    if teacher:
        teacher.close()
    return ranks.once(lambda: leave_behind(outcome, held_out))


def leave_behind(outcome: Outcome, held_out: list[Batch]) -> RunSummary:
    """Export, summary.json, report and the table. On rank 0 alone."""
    plan, run = outcome.plan, outcome.plan.run
    directory = run.run.path
    tokenizer = run.data.shards / plan.index.tokenizer_name
    export_student(outcome.weights, plan.blueprint, outcome.shape, directory / "student", tokenizer)
    summary = RunSummary(
        recipe=run.recipe,
        steps=run.run.updates,
        world_size=outcome.world_size,
        zero_stage=outcome.zero_stage,
        seed=run.run.seed,
        teacher=_teacher_figures(outcome),
        student=StudentFigures(
            parameters=sum(tensor.numel() for tensor in outcome.weights.values()),
            shape={"layers": outcome.shape.layers, **vars(outcome.shape.widths)},
        ),
        validation=_validation(outcome, held_out),
        prunes=outcome.metrics.prunes,
        seconds=outcome.metrics.seconds,
        tokens_per_second=outcome.metrics.tokens_per_second,
        peak_memory_bytes=outcome.peak_memory_bytes,
    )
    summary.write(directory)
    write_report(directory)
    print_table(summary, directory)
    return summary


def _teacher_figures(outcome: Outcome) -> TeacherFigures | None:
    return TeacherFigures(parameters=outcome.teacher_parameters) if outcome.teacher_parameters else None


def _validation(outcome: Outcome, held_out: list[Batch]) -> Validation:
    """Losses as measured by the engines over all ranks; speed of the stock models, on this rank's batches."""
    measures, run = outcome.validation, outcome.plan.run
    dtype = str(outcome.plan.dtype).removeprefix("torch.")

    def speed(model: Path) -> float:
        stock = load_stock(model, dtype).to(outcome.device)  # type: ignore[arg-type]  # a decorator hides its signature
        return score(stock, held_out)["tokens_per_second"]

    teacher = None
    if measures.teacher_mlm_loss is not None and measures.teacher_mlm_accuracy is not None and run.teacher.path:
        teacher = Score(
            mlm_loss=measures.teacher_mlm_loss,
            mlm_accuracy=measures.teacher_mlm_accuracy,
            tokens_per_second=speed(model_directory(run.teacher.path)),
        )
    student = Score(
        mlm_loss=measures.student_mlm_loss,
        mlm_accuracy=measures.student_mlm_accuracy,
        tokens_per_second=speed(run.run.path / "student"),
    )
    return Validation(
        teacher=teacher, student=student, unigram=Score(**unigram(run.data.shards, held_out)), kl=measures.kl
    )
