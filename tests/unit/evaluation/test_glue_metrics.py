"""GLUE's metrics against their formulas, and where those are undefined."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from homodistil.evaluation.glue import glue_metrics
from homodistil.tasks import TASKS

PREDICTIONS = np.array([1, 1, 0, 0, 1, 0, 1, 1])
LABELS = np.array([1, 0, 0, 1, 1, 0, 1, 0])
TP, FP, FN, TN = 3, 2, 1, 2


def test_accuracy_and_f1_of_class_one() -> None:
    scores = glue_metrics(TASKS["mrpc"], PREDICTIONS, LABELS)
    assert list(scores) == ["accuracy", "f1"]
    assert scores["accuracy"] == pytest.approx((TP + TN) / 8)
    assert scores["f1"] == pytest.approx(2 * TP / (2 * TP + FP + FN))


def test_matthews_correlation() -> None:
    scores = glue_metrics(TASKS["cola"], PREDICTIONS, LABELS)
    spread = math.sqrt((TP + FP) * (TP + FN) * (TN + FP) * (TN + FN))
    assert scores == {"matthews_correlation": pytest.approx((TP * TN - FP * FN) / spread)}


def test_correlations_of_scores_and_of_their_ranks() -> None:
    predictions, labels = np.array([0.1, 2.0, 2.0, 4.5, 3.0]), np.array([0.0, 1.0, 3.0, 5.0, 2.0])
    ranks = np.array([1, 2.5, 2.5, 5, 4]), np.array([1, 2, 4, 5, 3])

    def pearson(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - a.mean(), b - b.mean()
        return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))

    scores = glue_metrics(TASKS["stsb"], predictions, labels)
    assert list(scores) == ["spearman", "pearson"]
    assert scores["pearson"] == pytest.approx(pearson(predictions, labels))
    assert scores["spearman"] == pytest.approx(pearson(*ranks))


@pytest.mark.parametrize("name", ["cola", "stsb"])
@pytest.mark.parametrize("constant", ["predictions", "labels", "both"])
def test_correlations_with_a_constant_are_zero_without_a_warning(name: str, constant: str) -> None:
    one, other = np.ones(8), LABELS
    pair = {"predictions": (one, other), "labels": (other, one), "both": (one, one)}[constant]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(glue_metrics(TASKS[name], *pair).values()) == {0.0}


def test_f1_is_zero_without_a_warning_where_nothing_is_of_class_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert glue_metrics(TASKS["qqp"], np.zeros(4), np.zeros(4)) == {"accuracy": 1.0, "f1": 0.0}


def test_mnlis_second_accuracy_is_left_to_the_caller() -> None:
    assert list(glue_metrics(TASKS["mnli"], LABELS, LABELS)) == ["accuracy"]
