"""Figures of one run or of several side by side, each with the words that it needs and the numbers that it shows.

Draws nothing that is not in a run's log. Leaves single units to units.py, the page to page.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from homodistil.report.history import JUMP, Curve, History

KL = "validation/kl"
GREY, WIDTH_INCHES = "#999999", 7.0
COLORS = colormaps["tab10"].colors  # type: ignore[attr-defined]
SHAPE = {"hidden": "-", "ffn": ":", "heads": "--", "head_width": "-."}
WORKINGS = {
    "speed/tokens_per_second": "training tokens a second, all ranks",
    "memory/peak_bytes": "peak memory of rank 0, GiB",
    "optimizer/gradient_norm": "gradient norm before clipping",
    "optimizer/learning_rate": "learning rate",
}


@dataclass(frozen=True)
class Picture:
    """A figure, what one sees in it, and its numbers."""

    name: str
    """Of its files."""
    title: str
    caption: str
    figure: Figure
    header: tuple[str, ...]
    rows: list[tuple[object, ...]]
    """Under `header`."""


def of_log(runs: Sequence[History]) -> Iterator[Picture]:
    """All that the logs have points for."""
    for draw in (discrepancy, held_out, losses, widths, workings):
        if picture := draw(runs):
            yield picture


def discrepancy(runs: Sequence[History]) -> Picture | None:
    """The papers' figure 2: KL above, the ladder beneath."""
    tags = [KL, JUMP, "shape/hidden", "shape/ffn"]
    if not any(KL in run.curves for run in runs):
        return None
    figure, (top, bottom) = stacked(2, [3, 2])
    for run, color in zip(runs, _colors(), strict=False):
        curve, jumps = run.curves.get(KL, Curve()), run.curves.get(JUMP, Curve())
        top.plot(curve.updates, curve.values, "o-", color=color, markersize=3, label=run.name)
        top.vlines(jumps.updates, 0, jumps.values, color=color if len(runs) > 1 else GREY, alpha=0.6)
        for tag, style in (("shape/hidden", "-"), ("shape/ffn", ":")):
            _stairs(bottom, run, tag, color, style, tag.removeprefix("shape/") if run is runs[0] else None)
    top.set_ylabel("KL(teacher || student), nats")
    bottom.set(ylabel="width / first", xlabel="update")
    bottom.set_ylim(bottom=0)
    caption = (
        "How far the student's predictions are from the teacher's on text held out from training: 0 is the teacher "
        "itself. Vertical bars: the jump that a prune alone caused, on one held-out batch. Beneath: what is left of "
        "the widths. A good run climbs little at each step and comes down again before the next."
    )
    return _picture("discrepancy", "Distance from the teacher", caption, figure, runs, tags)


def held_out(runs: Sequence[History]) -> Picture | None:
    """Student and teacher on held-out examples."""
    if not any("validation/student_loss" in run.curves for run in runs):
        return None
    figure, (top, bottom) = stacked(2, [1, 1])
    for run, color in zip(runs, _colors(), strict=False):
        for axes, what in ((top, "loss"), (bottom, "accuracy")):
            student, teacher = (run.curves.get(f"validation/{who}_{what}", Curve()) for who in ("student", "teacher"))
            axes.plot(student.updates, student.values, "o-", color=color, markersize=3, label=run.name)
            axes.plot(teacher.updates, teacher.values, "--", color=color, alpha=0.6)
    top.set_ylabel("loss, nats a slot")
    bottom.set(ylabel="accuracy", xlabel="update")
    caption = "Loss and accuracy on held-out examples; dashed: the teacher's on the same ones."
    tags = [f"validation/{who}_{what}" for who in ("student", "teacher") for what in ("loss", "accuracy")]
    return _picture("held_out", "Held-out loss and accuracy", caption, figure, runs, tags)


def losses(runs: Sequence[History]) -> Picture | None:
    """Every term of the training loss, a panel a run."""
    shown = [run for run in runs if _terms(run)]
    if not shown:
        return None
    figure, panels = stacked(len(shown), [1] * len(shown))
    for axes, run in zip(panels, shown, strict=True):
        for tag in _terms(run):
            axes.plot(run.curves[tag].updates, run.curves[tag].values, label=tag.removeprefix("loss/"))
        axes.set(yscale="log", ylabel=f"{run.name}\nunweighted" if len(shown) > 1 else "unweighted")
    panels[-1].set_xlabel("update")
    caption = "The terms of the training loss, before their weights, averaged over the updates between two points."
    tags = list(dict.fromkeys(tag for run in shown for tag in _terms(run)))
    return _picture("losses", "Training loss, term by term", caption, figure, runs, tags)


def widths(runs: Sequence[History]) -> Picture | None:
    """What is left of every group of units, and of the parameters."""
    tags = [f"shape/{name}" for name in (*SHAPE, "parameters")]
    if not any(len(run.curves.get("shape/hidden", Curve()).values) > 1 for run in runs):
        return None
    figure, (top, bottom) = stacked(2, [1, 1])
    for run, color in zip(runs, _colors(), strict=False):
        for name, style in SHAPE.items():
            label = f"{name} {_ends(run, f'shape/{name}')}" if len(runs) == 1 else None
            _stairs(top, run, f"shape/{name}", color, style, label or (name if run is runs[0] else None))
        _stairs(bottom, run, "shape/parameters", color, "-", f"{run.name}: {_ends(run, 'shape/parameters')}")
    top.set_ylabel("units / first")
    bottom.set(ylabel="parameters / first", xlabel="update")
    for axes in (top, bottom):
        axes.set_ylim(bottom=0)
    caption = (
        "What is left of each kind of unit: dimensions of the residual stream (hidden), neurons of the feed-forward "
        "layers (ffn), attention heads, and dimensions of a head; and of all parameters."
    )
    return _picture("widths", "Widths", caption, figure, runs, tags)


def workings(runs: Sequence[History]) -> Picture | None:
    """Speed, memory, gradients, rate."""
    tags = [tag for tag in WORKINGS if any(tag in run.curves for run in runs)]
    if not tags:
        return None
    figure, panels = stacked(len(tags), [1] * len(tags), inches=1.6)
    for axes, tag in zip(panels, tags, strict=True):
        scale = 2**30 if tag == "memory/peak_bytes" else 1
        for run, color in zip(runs, _colors(), strict=False):
            curve = run.curves.get(tag, Curve())
            axes.plot(curve.updates, [value / scale for value in curve.values], color=color, label=run.name)
        axes.set_title(WORKINGS[tag], fontsize="small", loc="left")
        axes.set_ylim(bottom=0)
    panels[-1].set_xlabel("update")
    caption = "Speed without validation and checkpoints; it grows as the student shrinks."
    return _picture("workings", "Speed, memory, gradients", caption, figure, runs, tags)


def stacked(count: int, ratios: list[int], inches: float = 2.4) -> tuple[Figure, list[Axes]]:
    """Panels one below the other, over one axis of updates."""
    figure = Figure(figsize=(WIDTH_INCHES, 0.6 + inches * count), layout="constrained")
    panels = figure.subplots(count, 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    return figure, list(panels)


def _picture(
    name: str, title: str, caption: str, figure: Figure, runs: Sequence[History], tags: Sequence[str]
) -> Picture:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="small")
    rows: list[tuple[object, ...]] = [
        (run.name, tag, update, value)
        for run in runs
        for tag in tags
        for update, value in zip(*vars(run.curves.get(tag, Curve())).values(), strict=True)
    ]
    return Picture(name, title, caption, figure, ("run", "tag", "update", "value"), rows)


def _colors() -> Sequence[tuple[float, ...]]:
    return [*COLORS] * 10


def _terms(run: History) -> list[str]:
    return [
        tag
        for tag, curve in run.curves.items()
        if tag.startswith("loss/") and tag != "loss/total" and max(curve.values) > 0
    ]


def _stairs(axes: Axes, run: History, tag: str, color: object, style: str, label: str | None) -> None:
    """A width over updates, relative to the first, up to the run's last update."""
    if curve := run.curves.get(tag):
        relative = [value / curve.values[0] for value in [*curve.values, curve.values[-1]]]
        updates = [*curve.updates, run.last_update]
        axes.step(updates, relative, style, where="post", color=color, label=label)


def _ends(run: History, tag: str) -> str:
    curve = run.curves.get(tag, Curve([0], [0.0]))
    return f"{curve.values[0]:,.0f} to {curve.values[-1]:,.0f}"
