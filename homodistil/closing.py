"""Closing a run: the student as a Hugging Face directory, its summary and report, and where to look."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import torch

from homodistil.batch import Batch
from homodistil.config import RunConfig
from homodistil.engine import StudentEngine, TeacherEngine
from homodistil.errors import Stopped
from homodistil.evaluation.language_modeling import load_stock, score, unigram
from homodistil.export import export_student
from homodistil.metrics import Metrics, peak_memory_bytes
from homodistil.models.loading import model_directory
from homodistil.objective.measures import Measures
from homodistil.opening import Plan
from homodistil.ranks import Ranks
from homodistil.report import write_report
from homodistil.summary import FILE as SUMMARY
from homodistil.summary import RunSummary, Score, StudentFigures, TeacherFigures, Validation, print_table


def begin(run: RunConfig) -> None:
    """The run's folder says what runs there, and no longer how an earlier process ended. On rank 0."""
    run.save(run.run.path / "run.yaml")
    (run.run.path / SUMMARY).unlink(missing_ok=True)


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
    summary = _summary(plan.run.run.updates, plan, student, teacher, metrics, ranks)
    weights, shape = dict(student.weights()), student.shape
    close(student, teacher)

    def leave_behind() -> RunSummary:
        directory = plan.run.run.path
        tokenizer = plan.run.data.shards / plan.index.tokenizer_name
        export_student(weights, plan.blueprint, shape, directory / "student", tokenizer)
        scored = summary.model_copy(update={"validation": _validation(plan, validation, held_out, ranks.device)})
        scored.write(directory)
        write_report(directory)
        print_table(scored, directory)
        return scored

    return ranks.once(leave_behind)


def leave(
    reason: Stopped,
    update: int,
    plan: Plan,
    student: StudentEngine,
    teacher: TeacherEngine | None,
    metrics: Metrics,
    ranks: Ranks,
) -> NoReturn:
    """End a run before its time, after `update`, whose checkpoint is written: raises `reason`. Collective."""
    summary = _summary(update, plan, student, teacher, metrics, ranks)
    stopped = summary.model_copy(update={"exit_status": reason.exit_code})
    ranks.once(lambda: stopped.write(plan.run.run.path))
    close(student, teacher)
    raise reason


def close(student: StudentEngine, teacher: TeacherEngine | None) -> None:
    """Free both engines. Collective."""
    student.close()
    if teacher:
        teacher.close()


def _summary(
    update: int, plan: Plan, student: StudentEngine, teacher: TeacherEngine | None, metrics: Metrics, ranks: Ranks
) -> RunSummary:
    """What a run came to so far, but for its held-out figures. Collective."""
    return RunSummary(
        recipe=plan.run.recipe,
        steps=update,
        world_size=ranks.world_size,
        zero_stage=student.zero_stage,
        seed=plan.run.run.seed,
        teacher=TeacherFigures(parameters=teacher.parameters) if teacher else None,
        student=StudentFigures(
            parameters=student.parameters,
            shape={"layers": student.shape.layers, **vars(student.shape.widths)},
        ),
        validation=None,
        prunes=metrics.prunes,
        seconds=metrics.seconds,
        tokens_per_second=metrics.tokens_per_second,
        peak_memory_bytes=max(ranks.gather(peak_memory_bytes())),
        resumed_from=metrics.start or None,
    )


def _validation(plan: Plan, measures: Measures, held_out: list[Batch], device: torch.device) -> Validation:
    """Losses as measured by the engines over all ranks; speed of the stock models, on this rank's batches."""
    run = plan.run
    dtype = str(plan.dtype).removeprefix("torch.")

    def speed(model: Path) -> float:
        stock = load_stock(model, dtype).to(device)  # type: ignore[arg-type]  # a decorator hides its signature
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
