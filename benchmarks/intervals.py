"""Figures of several seeds: means, deviations, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev

from scipy.stats import t as student_t


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t."""
    count = len(differences)
    return mean(differences), float(student_t.ppf(0.975, count - 1)) * stdev(differences) / sqrt(count)


def difference(differences: Sequence[float]) -> str:
    """Of runs of the same seed: the mean with its interval, and how many there are; of one, no interval."""
    if len(differences) < 2:
        return f"{differences[0]:+.4f} (1)" if differences else ""
    center, half = interval(differences)
    return f"{center:+.4f} ± {half:.4f} ({len(differences)})"


def spread(values: Sequence[float]) -> str:
    """Mean and, of several, deviation."""
    if not values:
        return ""
    return f"{mean(values):.4f}" + (f" ({stdev(values):.4f})" if len(values) > 1 else "")
