"""Where a student is shrunk to, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from homodistil.config.section import Section


class TargetShape(Section):
    """Widths of the finished student; what is left out stays as the teacher's."""

    hidden: int | None = Field(default=None, ge=1)
    """Residual width; a stock model needs heads x head_width."""
    ffn: int | None = Field(default=None, ge=1)
    """Intermediate width of the feed-forward layers."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads per layer."""
    head_width: int | None = Field(default=None, ge=1)
    """Dimensions of a head; by default hidden / heads."""


class PruningConfig(Section):
    """The ladder from the teacher's shape to the target, and how neurons are scored."""

    target: TargetShape = TargetShape()
    events: int = Field(default=16, ge=1)
    """Rungs of the ladder: physical prunes, equally spaced in remaining fraction."""
    schedule: Literal["cubic", "linear", "one_shot"] = "cubic"
    """How the remaining fraction falls between start and end; `one_shot` prunes everything at start."""
    start: float = Field(default=0.02, ge=0, lt=1)
    """Share of the updates before the descent begins (t_i)."""
    end: float = Field(default=0.7, gt=0, le=1)
    """Share of the updates at which the target is reached (t_f)."""
    metric: Literal["sensitivity", "magnitude", "platon", "random"] = "sensitivity"
    """|w g|; |w|; PLATON's smoothed mean times uncertainty of |w g|; or a seeded draw, as a control."""
    smoothing_window: int = Field(default=10, ge=1)
    """Updates averaged into one window before the moving average."""
    smoothing_beta: float = Field(default=0.85, ge=0, lt=1)
    """Decay of the moving average over windows."""
    across: Literal["per_matrix", "none", "per_parameter"] = "per_matrix"
    """How the tensors of a group are weighed: each matrix's scores to sum 1, raw sums, or per parameter."""
    ffn_multiple: int = Field(default=8, ge=1)
    """Intermediate widths on the way are multiples of this; the target is always met exactly."""
    head_width_multiple: int = Field(default=1, ge=1)
    """Head widths on the way are multiples of this."""
    hidden_multiple: int = Field(default=8, ge=1)
    """Hidden widths on the way, where the head count changes too; otherwise hidden = heads x head width."""

    @model_validator(mode="after")
    def _ordered(self) -> PruningConfig:
        if self.end < self.start:
            raise ValueError(f"end ({self.end}) must not be before start ({self.start})")
        return self
