"""The learning rate as a pure function of the update: nothing to save, nothing to restore."""

from __future__ import annotations

from homodistil.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, update: int, updates: int) -> float:
    """Rate of update `update` (1-based) of `updates`: linear warm-up to the peak, then linear decay towards 0."""
    warmup = round(config.warmup * updates)  # rounded as pruning.start is, so that it ends before the first prune
    if update <= warmup:
        return config.learning_rate * update / warmup
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (updates - update + 1) / (updates - warmup + 1)
