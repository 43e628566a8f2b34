"""A run's figures: one PNG, and one HTML page that needs nothing else, readable on a phone.

Reads metrics.jsonl and summary.json; draws nothing that is not in them.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from homodistil.summary import RunSummary

KL, JUMP = "validation/kl", "pruning/prune_jump"
DISCREPANCY, PRUNE, HIDDEN, FFN = "#b5446e", "#999999", "#2d6a8e", "#f2b134"

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
  .wide {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }}
  th, td {{ padding: .4rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }}
  th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
  img {{ width: 100%; height: auto; }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<div class="wide"><table><tr>{headings}</tr>{rows}</table></div>
<p>Loss and KL(teacher || student) in nats per scored slot of held-out examples; tokens/s of forward passes.</p>
<img alt="Discrepancy, widths and losses over the updates" src="data:image/png;base64,{image}">
"""


@dataclass(frozen=True)
class Curve:
    """One tag's points, in order."""

    updates: list[int]
    values: list[float]


def write_report(run_directory: Path) -> Path:
    """Write `report/` below a finished run's directory; returns report.html's path."""
    summary = RunSummary.read(run_directory)
    curves = read_curves(run_directory / "metrics.jsonl")
    directory = run_directory / "report"
    directory.mkdir(exist_ok=True)
    image = directory / "run.png"
    draw(curves).savefig(image, dpi=160)
    page = directory / "report.html"
    page.write_text(_page(run_directory.name, summary, image.read_bytes()), encoding="utf-8")
    return page


def read_curves(path: Path) -> dict[str, Curve]:
    """tag -> its points in metrics.jsonl; what was not finite is left out."""
    curves: dict[str, Curve] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        point = json.loads(line)
        update = point.pop("update")
        for tag, value in point.items():
            if value is not None:
                curve = curves.setdefault(tag, Curve([], []))
                curve.updates.append(update)
                curve.values.append(value)
    return curves


def draw(curves: dict[str, Curve]) -> Figure:
    """Discrepancy on top, the ladder beneath, the losses at the bottom; one axis of updates."""
    figure = Figure(figsize=(7, 8), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 3])
    _draw_discrepancy(top, curves)
    _draw_ladder(middle, curves)
    _draw_losses(bottom, curves)
    for axes in (top, middle, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="small")
    bottom.set_xlabel("update")
    return figure


def _draw_discrepancy(axes: Axes, curves: dict[str, Curve]) -> None:
    axes.set_ylabel("discrepancy (nats)")
    if KL in curves:
        axes.plot(
            curves[KL].updates, curves[KL].values, "o-", color=DISCREPANCY, label="KL(teacher || student), held out"
        )
    if JUMP in curves:
        axes.vlines(curves[JUMP].updates, 0, curves[JUMP].values, color=PRUNE, label="jump at a prune, training batch")


def _draw_ladder(axes: Axes, curves: dict[str, Curve]) -> None:
    axes.set_ylabel("width / first")
    last = max((curve.updates[-1] for curve in curves.values()), default=0)
    for name, color, style in (("hidden", HIDDEN, "-"), ("ffn", FFN, ":")):  # both show where both fall alike
        if curve := curves.get(f"shape/{name}"):
            first, final = curve.values[0], curve.values[-1]
            relative = [value / first for value in [*curve.values, final]]
            label = f"{name} {first:.0f} to {final:.0f}"
            updates = [*curve.updates, last]
            axes.step(updates, relative, style, where="post", color=color, linewidth=2, label=label)
    axes.set_ylim(bottom=0)


def _draw_losses(axes: Axes, curves: dict[str, Curve]) -> None:
    axes.set_ylabel("loss terms, unweighted")
    for tag, curve in curves.items():
        if tag.startswith("loss/") and tag != "loss/total" and max(curve.values) > 0:
            axes.plot(curve.updates, curve.values, label=tag.removeprefix("loss/"))
            axes.set_yscale("log")


def _page(name: str, summary: RunSummary, image: bytes) -> str:
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in summary.rows())
    widths = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in summary.student.shape.items())
    return PAGE.format(
        title=escape(name),
        summary=escape(
            f"Recipe {summary.recipe}: {summary.steps:,} updates and {summary.prunes} prunes in "
            f"{summary.seconds:,.0f} s on {summary.world_size} rank(s), ZeRO-{summary.zero_stage}, "
            f"seed {summary.seed}. Student: {widths}."
        ),
        headings="".join(f"<th>{heading}</th>" for heading in summary.headings),
        rows="".join(f"<tr>{row}</tr>" for row in rows),
        image=base64.b64encode(image).decode(),
    )
