"""Closing a run: what it made, as a Hugging Face directory or a folder of filters, its summary and report."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import torch

from homodistil.batch import Batch
from homodistil.errors import Stopped
from homodistil.evaluation.language_modeling import score, unigram
from homodistil.evaluation.stock import load_stock
from homodistil.evaluation.tasks import evaluate_task, save_predictions
from homodistil.export import export_student
from homodistil.hardware import device_name
from homodistil.knowledge.filters import save_filters
from homodistil.learner import describe
from homodistil.metrics import peak_memory_bytes
from homodistil.models.loading import model_directory
from homodistil.objective.measures import Measures
from homodistil.opening import Training
from homodistil.report import write_report
from homodistil.run_plan import Plan
from homodistil.summary import RunSummary, Score, StudentFigures, TeacherFigures, Validation, print_table
from homodistil.tasks import Task


def finish(training: Training) -> RunSummary:
    """Gather the student on rank 0, close both engines, and leave the run's files behind. Collective."""
    plan, measures = training.plan, training.validation
    assert measures is not None, "a run is validated after its last update"
    summary = _summary(training)
    weights, shape = dict(training.student.weights()), training.student.shape
    guess = None
    if plan.task.is_language_modeling:
        guess = unigram(plan.run.data.shards, training.held_out, training.ranks, plan.task.prefix)
    close(training)

    def leave_behind() -> RunSummary:
        directory = plan.run.run.path
        if plan.run.filters.of is None:
            export_student(weights, plan.blueprint, shape, directory / "student", plan.tokenizer)
        else:
            save_filters(directory / "filters", weights, describe(plan.blueprint))
        validation = _validation(plan, measures, guess, training.held_out, training.ranks.device)
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
        device=device_name(ranks.device),
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
        flops=metrics.work.flops,
        peak_memory_bytes=max(ranks.gather(peak_memory_bytes())),
        resumed_from=training.start or None,
    )


def _validation(
    plan: Plan, measures: Measures, guess: Score | None, held_out: list[Batch], device: torch.device
) -> Validation:
    """Losses as measured by the engines, and the guess's, over all ranks; speed of the stock models, on this rank's
    batches; a benchmark's own metrics, of the stock model."""
    run, student = plan.run, plan.run.run.path / "student"
    teacher = None
    if measures.teacher_loss is not None:
        teacher = _score(plan.task, measures.teacher_loss, measures.teacher_accuracy)
    scores = Validation(
        teacher=teacher,
        student=_score(plan.task, measures.student_loss, measures.student_accuracy),
        unigram=guess,
        kl=measures.kl,
    )
    if run.filters.of is not None:
        return scores
    if not plan.task.is_language_modeling:
        result = evaluate_task(student, run.task, run.data.micro_batch, "float32")
        save_predictions(result, run.run.path / "predictions.jsonl")
        scores.student.update(result.metrics)
        return scores
    scores.student["tokens_per_second"] = _speed(student, plan, held_out, device)
    if scores.teacher is not None and run.teacher.path and run.has_live_teacher:
        scores.teacher["tokens_per_second"] = _speed(model_directory(run.teacher.path), plan, held_out, device)
    return scores


def _score(task: Task, loss: float, accuracy: float | None) -> Score:
    own = {f"{task.prefix}_loss": loss}
    return own if accuracy is None else {**own, f"{task.prefix}_accuracy": accuracy}


def _speed(model: Path, plan: Plan, held_out: list[Batch], device: torch.device) -> float:
    """Tokens a second of forward passes."""
    stock = load_stock(model, str(plan.dtype).removeprefix("torch."), plan.task.kind).to(device)  # type: ignore[arg-type]
    return score(stock, held_out)["tokens_per_second"]
