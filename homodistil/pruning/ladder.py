"""Ladder: after which update the student goes to which widths. Which units go is the coordinator's business.

K rungs, equally spaced in remaining fraction, all groups together (docs/methods.md, "When"). In integers throughout, so
that no rounding decides when a rung fires or how wide it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from homodistil.config import PruningConfig, TargetShape
from homodistil.errors import ShapeError
from homodistil.models.shape import Widths, nearest_stock

# K rungs; k = 1..K; t update, t_i start, t_f end of the descent


POWERS = {"cubic": 3, "linear": 1, "one_shot": 1}
"""n of r(t) = r_f + (1 - r_f) (1 - s)^n, s the share of the descent that is over."""


@dataclass(frozen=True)
class Rung:
    """The widths a student has from after `update` on."""

    update: int
    widths: Widths


@dataclass(frozen=True)
class Ladder:
    """Rungs in the order they fire, each narrower than the one before. Empty: the shape is fixed."""

    rungs: tuple[Rung, ...]

    @classmethod
    def plan(cls, config: PruningConfig, updates: int, start: Widths) -> Ladder:
        """The descent from `start` to the target over a run. Raises `ShapeError`."""
        target = target_widths(config.target, start)
        if target == start:
            return cls(())
        first = max(1, round(config.start * updates))
        last = first if config.schedule == "one_shot" else max(first, round(config.end * updates))
        widths: dict[int, Widths] = {}
        for rung in range(1, config.events + 1):  # of several that fire after one update, the last counts
            update = _fires_after(POWERS[config.schedule], rung, config.events, first, last)
            widths[update] = _rung_widths(config, start, target, rung)
        return cls(_merged(widths, start))

    def widths_after(self, update: int) -> Widths | None:
        """Widths to prune to after this update, or None if no rung fires."""
        return next((rung.widths for rung in self.rungs if rung.update == update), None)


def target_widths(target: TargetShape, start: Widths) -> Widths:
    """The finished student's widths; what the target leaves out stays as `start`'s.

    Raises `ShapeError` for widths above `start`'s, and for those that no stock config expresses.
    """
    for field in ("hidden", "ffn", "heads", "head_width"):
        found, limit = getattr(target, field), getattr(start, field)
        if found is not None and found > limit:
            raise ShapeError(
                f"pruning.target.{field}: {found} is wider than the teacher's {limit}, and a student is pruned out "
                f"of its teacher. Give {limit} or less."
            )
    hidden, heads = target.hidden or start.hidden, target.heads or start.heads
    head_width = target.head_width or hidden // heads
    widths = Widths(hidden=hidden, ffn=target.ffn or start.ffn, heads=heads, head_width=head_width)
    if not widths.is_stock or head_width > start.head_width:
        raise ShapeError(_not_stock(target, widths, start))
    return widths


def _not_stock(target: TargetShape, widths: Widths, start: Widths) -> str:
    hidden = widths.heads * target.head_width if target.head_width else widths.hidden
    return (
        f"pruning.target: hidden {widths.hidden} with {widths.heads} heads of {target.head_width or 'equal'} width "
        "cannot be expressed by a stock model: hidden must be heads x head width, and a head at most the teacher's "
        f"{start.head_width} wide. Nearest that works with {widths.heads} heads: hidden "
        f"{nearest_stock(hidden, widths.heads, start.head_width)}."
    )


def _fires_after(power: int, rung: int, events: int, first: int, last: int) -> int:
    """The first update t in [t_i, t_f] with r(t) <= r_k, that is with (1 - s)^n <= 1 - k/K:
    K (t_f - t)^n <= (K - k) (t_f - t_i)^n."""
    bound = (events - rung) * (last - first) ** power
    return next(t for t in range(first, last + 1) if events * (last - t) ** power <= bound)


def _rung_widths(config: PruningConfig, start: Widths, target: Widths, rung: int) -> Widths:
    """n = max(target, q ceil(n0 rho / q)), rho = 1 - (1 - target / n0) k / K; with a constant number of heads
    hidden = heads x head width, so that the rung is a stock model. The last rung is the target, aligned or not."""
    events = config.events
    if rung == events:
        return target

    def width(n0: int, goal: int, multiple: int) -> int:
        scaled = n0 * events - (n0 - goal) * rung  # n0 rho K
        return max(goal, min(n0, -(-scaled // (multiple * events)) * multiple))

    heads = width(start.heads, target.heads, 1)
    head_width = width(start.head_width, target.head_width, config.head_width_multiple)
    hidden = width(start.hidden, target.hidden, config.hidden_multiple)
    return Widths(
        hidden=heads * head_width if target.heads == start.heads else hidden,
        ffn=width(start.ffn, target.ffn, config.ffn_multiple),
        heads=heads,
        head_width=head_width,
    )


def _merged(widths: dict[int, Widths], start: Widths) -> tuple[Rung, ...]:
    """In order, without the rungs that alignment made equal to the one before."""
    before = [start, *(widths[update] for update in sorted(widths))]
    return tuple(
        Rung(update, widths[update])
        for update, last in zip(sorted(widths), before, strict=False)
        if widths[update] != last
    )
