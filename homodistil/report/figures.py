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
PRUNE_KL = ("pruning/kl_before", "pruning/kl_after")
TERMS = {
    "task": "cross-entropy with the true words or labels, nats",
    "kl": "distance from the teacher's predictions, softened, nats",
    "hidden": "squared distance from the teacher's hidden states",
    "attention": "squared distance from the teacher's attention scores",
}
WORKINGS = {
    "speed/tokens_per_second": "training tokens a second, all ranks",
    "memory/peak_bytes": "most memory of rank 0 so far, GiB",
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
    tags = [KL, *PRUNE_KL, JUMP, "shape/hidden", "shape/ffn"]
    if not any(KL in run.curves for run in runs):
        return None
    figure, (top, bottom) = stacked(2, [3, 2])
    ceiling = _ceiling(runs)
    for run, color in zip(runs, _colors(), strict=False):
        curve = run.curves.get(KL, Curve())
        top.plot(curve.updates, curve.values, "o:", color=color, markersize=4, linewidth=1, label=run.name)
        _prunes(top, run, color, ceiling)
        _stairs(bottom, run, ("shape/hidden", "shape/ffn"), color, len(runs) > 1)
    top.set_ylabel("KL(teacher || student), nats")
    top.set_ylim(0, ceiling or None)
    bottom.set(ylabel="width / first", xlabel="update")
    bottom.set_ylim(bottom=0)
    caption = (
        "How far the student's predictions are from the teacher's on text held out from training: 0 is the teacher "
        "itself. Dots: all of that text, at every look. Lines, upright: one batch of it before and after each prune, "
        "what the prune alone did; slanted between two prunes: what training then won back. A line that leaves the "
        "picture has its upper end written on it. Beneath: what is left of the widths."
    )
    return _picture("discrepancy", "Distance from the teacher", caption, figure, runs, tags)


def held_out(runs: Sequence[History]) -> Picture | None:
    """Student, teacher and a guess on held-out examples."""
    if not any("validation/student_loss" in run.curves for run in runs):
        return None
    figure, (top, bottom) = stacked(2, [1, 1])
    for run, color in zip(runs, _colors(), strict=False):
        for axes, what, scale in ((top, "loss", 1), (bottom, "accuracy", 100)):
            for who, style, shade in (("student", "o-", color), ("teacher", "--", GREY)):
                curve = run.curves.get(f"validation/{who}_{what}", Curve())
                label = {"student": run.name, "teacher": "teacher" if run is runs[0] else None}[who]
                values = [scale * value for value in curve.values]
                axes.plot(curve.updates, values, style, color=shade, markersize=3, label=label if values else None)
            if (guess := _guess(run, what)) is not None and run is runs[0]:
                axes.axhline(scale * guess, color=GREY, linestyle=":", label="unigram guess")
    top.set_ylabel("loss, nats a slot")
    bottom.set(ylabel="accuracy, %", xlabel="update")
    caption = (
        "On held-out examples, the same at every look. A unigram guess knows how frequent words are and nothing else: "
        "a student's way is from there to its teacher. An axis may begin above 0."
    )
    tags = [f"validation/{who}_{what}" for who in ("student", "teacher") for what in ("loss", "accuracy")]
    return _picture("held_out", "Held-out loss and accuracy", caption, figure, runs, tags)


def losses(runs: Sequence[History]) -> Picture | None:
    """The training loss, a panel a term."""
    tags = list(dict.fromkeys(tag for run in runs for tag in _terms(run)))
    if not tags:
        return None
    figure, panels = stacked(len(tags), [1] * len(tags), inches=1.4)
    for axes, tag in zip(panels, tags, strict=True):
        for run, color in zip(runs, _colors(), strict=False):
            curve = run.curves.get(tag, Curve())
            axes.plot(curve.updates, curve.values, color=color, label=run.name if axes is panels[0] else None)
            for update in run.curves.get(JUMP, Curve()).updates:
                axes.axvline(update, color=color, linewidth=0.8, alpha=0.3)
        name = tag.removeprefix("loss/")
        axes.set_title(f"{name}: {TERMS[name]}" if name in TERMS else name, fontsize="small", loc="left")
    panels[-1].set_xlabel("update")
    caption = (
        "The terms of the training loss, before their weights, averaged over the updates between two points. Upright "
        "lines: prunes. An axis may begin above 0."
    )
    return _picture("losses", "Training loss, term by term", caption, figure, runs, tags)


def widths(runs: Sequence[History]) -> Picture | None:
    """What is left of every group of units, and of the parameters."""
    tags = [f"shape/{name}" for name in (*SHAPE, "parameters")]
    if not any(len(run.curves.get("shape/hidden", Curve()).values) > 1 for run in runs):
        return None
    figure, (top, bottom) = stacked(2, [1, 1])
    for run, color in zip(runs, _colors(), strict=False):
        _stairs(top, run, [f"shape/{name}" for name in SHAPE], color, len(runs) > 1)
        _stairs(bottom, run, ["shape/parameters"], color, len(runs) > 1)
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
            label = run.name if axes is panels[0] else None
            axes.plot(curve.updates, [value / scale for value in curve.values], color=color, label=label)
        axes.set_title(WORKINGS[tag], fontsize="small", loc="left")
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    panels[-1].set_xlabel("update")
    caption = (
        "Speed without validation and checkpoints: training steps of the student with its teacher's forward passes; "
        "prunes, and other work on the machine, show as dips. Memory: the GPU's, or, without one, the process's."
    )
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


def _ceiling(runs: Sequence[History]) -> float:
    """Above every point but those of jumps that would press all others flat."""
    most, jumped = (
        max((value for run in runs for tag in tags for value in run.curves.get(tag, Curve()).values), default=0.0)
        for tags in ((KL,), (KL, *PRUNE_KL))
    )
    return 1.05 * min(jumped, 2.5 * most)


def _prunes(axes: Axes, run: History, color: object, ceiling: float) -> None:
    """KL on one batch before and after every prune, joined."""
    before, after = (run.curves.get(tag, Curve()) for tag in PRUNE_KL)
    afterwards = dict(zip(after.updates, after.values, strict=True))  # one that was not finite is not there
    pairs = zip(before.updates, before.values, strict=True)
    points = [(u, value) for u, kl in pairs if u in afterwards for value in (kl, afterwards[u])]
    if points:
        axes.plot(*zip(*points, strict=True), color=color, linewidth=0.8, alpha=0.7)
    for update, value in points[1::2]:
        if value > ceiling:
            axes.annotate(f"{value:.2f}", (update, ceiling), (3, -3), textcoords="offset points", va="top", color=color)


def _stairs(axes: Axes, run: History, tags: Sequence[str], color: object, several: bool) -> None:
    """Widths over updates, relative to the first, up to the run's last update. Those that fall together are one line;
    its style is its first one's. several: runs."""
    lines: dict[tuple[tuple[float, ...], tuple[int, ...]], list[str]] = {}
    for tag in tags:
        if curve := run.curves.get(tag):
            relative = tuple(value / curve.values[0] for value in [*curve.values, curve.values[-1]])
            lines.setdefault((relative, (*curve.updates, run.last_update)), []).append(tag)
    for (relative, updates), together in lines.items():
        names = [tag.removeprefix("shape/") for tag in together]
        label = "; ".join(f"{name} {_ends(run, tag)}" for name, tag in zip(names, together, strict=True))
        style, width = SHAPE.get(names[0], "-"), max(1.0, 2.5 - 0.5 * len(axes.lines))  # one on another, both are seen
        label = f"{run.name}: {label}" if several else label
        axes.step(updates, relative, style, where="post", color=color, linewidth=width, label=label)


def _guess(run: History, what: str) -> float | None:
    scores = run.summary and run.summary.validation and run.summary.validation.unigram
    return next((value for key, value in scores.items() if key.endswith(f"_{what}")), None) if scores else None


def _ends(run: History, tag: str) -> str:
    curve = run.curves.get(tag, Curve([0], [0.0]))
    return f"{curve.values[0]:,.0f} to {curve.values[-1]:,.0f}"
