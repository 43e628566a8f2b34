"""Closing a run: the student as a Hugging Face directory, its summary and report, and where to look."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import torch

from homodistil.batch import Batch
from homodistil.errors import Stopped
from homodistil.evaluation.language_modeling import load_stock, score, unigram
from homodistil.export import export_student
from homodistil.metrics import peak_memory_bytes
from homodistil.models.loading import model_directory
from homodistil.objective.measures import Measures
from homodistil.opening import Plan, Training
from homodistil.report import write_report
from homodistil.summary import RunSummary, Score, StudentFigures, TeacherFigures, Validation, print_table


def finish(training: Training) -> RunSummary:
    """Gather the student on rank 0, close both engines, and leave the run's files behind. Collective."""
    plan, measures = training.plan, training.validation
    assert measures is not None, "a run is validated after its last update"
    summary = _summary(training)
    weights, shape = dict(training.student.weights()), training.student.shape
    close(training)

    def leave_behind() -> RunSummary:
        directory = plan.run.run.path
        tokenizer = plan.run.data.shards / plan.index.tokenizer_name
        export_student(weights, plan.blueprint, shape, directory / "student", tokenizer)
        validation = _validation(plan, measures, training.held_out, training.ranks.device)
        scored = summary.model_copy(update={"validation": validation})
        scored.write(directory)
        write_report(directory)
        print_table(scored, directory)
        return scored

    return training.ranks.once(leave_behind)


def leave(training: Training, reason: Stopped) -> NoReturn:
    """End a run before its time, its checkpoint written: raises `reason`. Collective."""
    stopped = _summary(training).model_copy(update={"exit_status": reason.exit_code})
    training.ranks.once(lambda: stopped.write(training.plan.run.run.path))
    close(training)
    raise reason


def close(training: Training) -> None:
    """Free both engines. Collective."""
    training.student.close()
    if training.teacher:
        training.teacher.close()


def _summary(training: Training) -> RunSummary:
    """What a run came to so far, but for its held-out figures. Collective."""
    plan, student, metrics, ranks = training.plan, training.student, training.metrics, training.ranks
    return RunSummary(
        recipe=plan.run.recipe,
        steps=training.update,
        world_size=ranks.world_size,
        zero_stage=student.zero_stage,
        seed=plan.run.run.seed,
        teacher=TeacherFigures(parameters=training.teacher.parameters) if training.teacher else None,
        student=StudentFigures(
            parameters=student.parameters,
            shape={"layers": student.shape.layers, **vars(student.shape.widths)},
        ),
        validation=None,
        prunes=metrics.prunes,
        seconds=metrics.seconds,
        tokens_per_second=metrics.tokens_per_second,
        peak_memory_bytes=max(ranks.gather(peak_memory_bytes())),
        resumed_from=training.start or None,
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
