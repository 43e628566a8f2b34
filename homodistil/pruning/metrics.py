"""What makes a weight important: four metrics behind one small class. Sums over units are made of them elsewhere.

A metric keeps additive (N,) vectors over axis positions (sums.AxisSums), each rank's share of a global total, or
per-weight buffers that live with the rank's fragments, or neither.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from homodistil.config import PruningConfig
from homodistil.models.groups import Positions
from homodistil.pruning.sums import AxisSums
from homodistil.state import Fragment

MEAN, UNCERTAINTY = "importance_mean", "importance_uncertainty"


class Metric(ABC):
    """`vectors`: additive (N,) float64 totals, this rank's share. `observed`: updates scored so far."""

    def __init__(self) -> None:
        self.vectors: dict[str, Tensor] = {}
        self.observed = 0

    def attach(self, fragments: Sequence[Fragment], axes: AxisSums) -> None:
        """The fragments that this rank owns now; called at every update, whether or not it is scored."""
        return

    def observe(self, fragments: Sequence[Fragment], axes: AxisSums) -> None:
        """Take in one update: this rank's weights and gradients before the step."""
        self.observed += 1

    @abstractmethod
    def totals(self, axes: AxisSums) -> Tensor:
        """(N,) float64: this rank's share of the importance at each axis position, for a plan made now."""

    def narrow(self, axes: AxisSums, positions: Positions) -> None:
        """Go on with a narrowed student; `axes` is the layout before."""
        self.vectors = {name: axes.narrow(vector, positions) for name, vector in self.vectors.items()}


class WindowedSums(Metric):
    """Per-weight values, summed at once; mean over a window of updates, then a moving average over windows.

    Sums commute with both, so nothing is kept per weight. Source: HomoDistil's importance, PLATON's smoothing.
    """

    def __init__(self, value: Callable[[Fragment], Tensor], window: int, beta: float, axes: AxisSums) -> None:
        super().__init__()
        self._value, self._window, self._beta = value, window, beta
        self.vectors = {"window": axes.zeros(), "average": axes.zeros()}

    def observe(self, fragments: Sequence[Fragment], axes: AxisSums) -> None:
        super().observe(fragments, axes)
        for fragment in fragments:
            if axes.covers(fragment.name):
                axes.add(self.vectors["window"], fragment.name, fragment.shape, fragment.start, self._value(fragment))
        if self.observed % self._window == 0:
            self.vectors["average"] = self._with_window(self._window)
            self.vectors["window"].zero_()

    def totals(self, axes: AxisSums) -> Tensor:
        """The moving average; a window that is not full counts as one more, without being closed."""
        updates = self.observed % self._window
        return self._with_window(updates) if updates else self.vectors["average"].clone()

    def _with_window(self, updates: int) -> Tensor:
        return torch.lerp(self.vectors["window"] / updates, self.vectors["average"], self._beta)


class Platon(Metric):
    """Smoothed sensitivity times its smoothed uncertainty, weight by weight.

    I = |w g|; mean <- b mean + (1 - b) I; uncertainty <- b uncertainty + (1 - b) |I - mean|, at every update with
    b = beta^(1 / window): the windows' time constant without a third buffer. Two fp32 buffers per owned weight,
    because the product does not commute with summing over a unit; the product is formed only for a plan.
    Source: PLATON (Zhang et al. 2022), eq. 4-7.
    """

    def __init__(self, window: int, beta: float) -> None:
        super().__init__()
        self._beta = beta ** (1 / window)
        self._latest: list[tuple[str, torch.Size, int, dict[str, Tensor]]] = []

    def attach(self, fragments: Sequence[Fragment], axes: AxisSums) -> None:
        self._latest = [(f.name, f.shape, f.start, f.buffers) for f in fragments if axes.covers(f.name)]

    def observe(self, fragments: Sequence[Fragment], axes: AxisSums) -> None:
        super().observe(fragments, axes)
        for fragment in (fragment for fragment in fragments if axes.covers(fragment.name)):
            sensitivity = _sensitivity(fragment)
            mean = fragment.buffers.setdefault(MEAN, torch.zeros_like(sensitivity))
            uncertainty = fragment.buffers.setdefault(UNCERTAINTY, torch.zeros_like(sensitivity))
            mean.lerp_(sensitivity, 1 - self._beta)
            uncertainty.lerp_((sensitivity - mean).abs(), 1 - self._beta)

    def totals(self, axes: AxisSums) -> Tensor:
        totals = axes.zeros()
        for name, shape, start, buffers in self._latest:
            axes.add(totals, name, shape, start, buffers[MEAN].double() * buffers[UNCERTAINTY].double())
        return totals

    def narrow(self, axes: AxisSums, positions: Positions) -> None:
        super().narrow(axes, positions)
        self._latest = []  # the old student's; the buffers themselves moved on with the weights


class Random(Metric):
    """A control: a draw per axis position that depends on the seed and the layout's size alone.

    Every rank adds the same draws, so the sum over ranks keeps their order.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed

    def totals(self, axes: AxisSums) -> Tensor:
        digest = hashlib.sha256(f"{self._seed}/{axes.size}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        totals = axes.zeros()
        return totals.copy_(torch.rand(axes.size, dtype=torch.float64, generator=generator))


def build_metric(config: PruningConfig, axes: AxisSums, seed: int) -> Metric:
    """The metric that a recipe names."""
    window, beta = config.smoothing_window, config.smoothing_beta
    builders: dict[str, Callable[[], Metric]] = {
        "sensitivity": lambda: WindowedSums(_sensitivity, window, beta, axes),
        "magnitude": lambda: WindowedSums(_magnitude, window, beta, axes),
        "platon": lambda: Platon(window, beta),
        "random": lambda: Random(seed),
    }
    return builders[config.metric]()


def _sensitivity(fragment: Fragment) -> Tensor:
    assert fragment.gradient is not None, f"{fragment.name}: scored outside the accumulation boundary"
    return (fragment.weight * fragment.gradient).abs_()


def _magnitude(fragment: Fragment) -> Tensor:
    return fragment.weight.abs()
