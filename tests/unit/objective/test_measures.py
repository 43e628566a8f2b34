"""Validation's sums: right, and the same however the text is cut into batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from homodistil.batch import Batch
from homodistil.objective.measures import Measures, measure
from tests import fixtures
from tests.unit.objective.made_up import TEACHER, VOCABULARY, cropped, signals


def _batch() -> Batch:
    return fixtures.batch(5, 9, slots=3, vocabulary=VOCABULARY)


def test_means_are_per_slot_that_has_a_target() -> None:
    rows = _batch()
    student, teacher = signals(rows, TEACHER, 0), signals(rows, TEACHER, 1)
    slots = [(b, s) for b in range(5) for s in range(3) if rows.weights[b, s]]
    assert 0 < len(slots) < 15
    p_s, p_t = (
        [of.logits[b, s].detach().double().exp().div(of.logits[b, s].detach().exp().sum()).tolist() for b, s in slots]
        for of in (student, teacher)
    )
    labels = [int(rows.labels[b, s]) for b, s in slots]
    found = Measures.of(measure(student, teacher, rows))
    for p, loss, accuracy in (
        (p_s, found.student_loss, found.student_accuracy),
        (p_t, found.teacher_loss, found.teacher_accuracy),
    ):
        assert loss == pytest.approx(sum(-math.log(q[y]) for q, y in zip(p, labels, strict=True)) / len(slots))
        hits = sum(q.index(max(q)) == y for q, y in zip(p, labels, strict=True))
        assert accuracy == pytest.approx(hits / len(slots))
    kl = sum(t * math.log(t / s) for q, r in zip(p_t, p_s, strict=True) for t, s in zip(q, r, strict=True))
    assert found.kl == pytest.approx(kl / len(slots))
    assert found.slots == len(slots)


def test_a_regression_has_no_accuracy() -> None:
    rows = _batch()
    student, teacher = (signals(rows, TEACHER, seed) for seed in (0, 1))
    scores = [replace(one, logits=one.logits[..., :1]) for one in (student, teacher)]
    found = Measures.of(measure(*scores, replace(rows, labels=rows.labels.float()), "regression"))
    assert (found.student_accuracy, found.teacher_accuracy) == (None, None) and found.kl is not None


def test_a_model_that_is_right_everywhere_has_accuracy_one() -> None:
    rows = _batch()
    student = signals(rows, TEACHER, 0)
    with torch.no_grad():
        student.logits.scatter_(-1, rows.labels[..., None], 100.0)
    assert Measures.of(measure(student, None, rows)).student_accuracy == 1


def test_sums_of_single_sequences_add_up_to_those_of_the_batch() -> None:
    rows = _batch()
    student, teacher = signals(rows, TEACHER, 0), signals(rows, TEACHER, 1)
    added = torch.zeros(6, dtype=torch.float64)
    for row in range(len(rows)):
        one, one_student = cropped(rows, student, row)
        added += measure(one_student, cropped(rows, teacher, row)[1], one)
    whole = measure(student, teacher, rows)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(added, whole)


def test_without_a_teacher_its_measures_are_absent() -> None:
    rows = _batch()
    found = Measures.of(measure(signals(rows, TEACHER, 0), None, rows))
    assert (found.teacher_loss, found.teacher_accuracy, found.kl) == (None, None, None)
    assert found.student_loss > 0
