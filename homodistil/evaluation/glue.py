"""GLUE's metrics (Wang et al. 2019, table 1), by scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from homodistil.tasks import Task

# N examples

Values = NDArray[Any]


def glue_metrics(task: Task, predictions: Values, labels: Values) -> dict[str, float]:
    """The task's metrics, its headline first: shares and correlations, not percentages.

    Args: (N,) class numbers each, or scores of a regression. MNLI's `accuracy_mismatched` is its accuracy on another
    set, and left to the caller.
    """
    return {name: METRICS[name](predictions, labels) for name in task.metrics if name in METRICS}


def _matthews(predictions: Values, labels: Values) -> float:
    """Matthews correlation; 0 where it is undefined, since all predictions or all labels are equal."""
    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def _correlation(correlate: Callable[..., Any]) -> Callable[[Values, Values], float]:
    def measure(predictions: Values, labels: Values) -> float:
        """0 where it is undefined, since all predictions or all labels are equal."""
        if _constant(predictions) or _constant(labels):
            return 0.0
        return float(correlate(predictions, labels).statistic)

    return measure


def _constant(values: Values) -> bool:
    return bool(np.all(values == values[0]))


METRICS: dict[str, Callable[[Values, Values], float]] = {
    "accuracy": lambda predictions, labels: float(accuracy_score(labels, predictions)),
    "f1": lambda predictions, labels: float(f1_score(labels, predictions, zero_division=0)),
    "matthews_correlation": _matthews,
    "spearman": _correlation(stats.spearmanr),
    "pearson": _correlation(stats.pearsonr),
}
"""f1: of class 1."""
