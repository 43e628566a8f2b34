"""Single units: which of the teacher's are left, when the others went, and how much importance went with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from homodistil.pruning.record import GroupRecord
from homodistil.report.figures import GREY, WIDTH_INCHES, Picture, stacked
from homodistil.report.history import History

# L layers, U units of a group in the teacher

KINDS = {
    "hidden": "residual dimensions",
    "ffn": "feed-forward neurons, by layer",
    "heads": "attention heads, by layer",
    "qk": "query and key dimensions of all heads, by layer",
    "vo": "value dimensions of all heads, by layer",
}
KEPT = "#1f4e79"
UNIT_HEADER = ("run", "group", "unit", "update", "importance", "kept")


def of_units(runs: Sequence[History]) -> Iterator[Picture]:
    """Of every run whose prunes are recorded; numbered in their files, if there are several."""
    for number, run in enumerate(runs, start=1):
        suffix = f"_{number}" if len(runs) > 1 else ""
        if run.prunes:
            yield fates(run, suffix)
            yield importance(run, suffix)


def fates(run: History, suffix: str) -> Picture:
    """A map a kind: a column a unit, a row a layer; colored by the update after which it went, or as kept."""
    updates = sorted(run.prunes)
    maps = {kind: _fates(run, kind) for kind in KINDS}
    shown = {kind: fate for kind, fate in maps.items() if fate.size and (fate < np.inf).any()}
    figure = Figure(figsize=(WIDTH_INCHES, 0.6 + 1.5 * max(len(shown), 1)), layout="constrained")
    panels = figure.subplots(max(len(shown), 1), 1, squeeze=False)[:, 0]
    shades = colormaps["YlOrBr_r"](np.linspace(0, 0.75, len(updates)))
    colors = ListedColormap(shades).with_extremes(over=KEPT)
    for axes, (kind, fate) in zip(panels, shown.items(), strict=False):
        prune = np.searchsorted(updates, fate)  # of those that stayed, beyond the last
        image = axes.imshow(
            prune, aspect="auto", cmap=colors, vmin=-0.5, vmax=len(updates) - 0.5, interpolation="nearest"
        )
        axes.tick_params(labelsize="small")
        axes.set_title(KINDS[kind], fontsize="small", loc="left")
        axes.set_yticks(range(len(fate)) if 1 < len(fate) <= 12 else [])
        for border in range(1, _heads(run) if kind in {"qk", "vo"} else 1):
            axes.axvline(border * fate.shape[1] / _heads(run) - 0.5, color="white", linewidth=1.5)
    if shown:
        bar = figure.colorbar(image, ax=list(panels), label="went after update", shrink=0.6)
        bar.set_ticks(range(len(updates)), labels=[str(update) for update in updates])
        figure.legend(handles=[Patch(color=KEPT, label="kept to the end")], loc="outside upper right", frameon=False)
    caption = (
        "Every unit of the teacher: a column each, a row for each layer (residual dimensions run through all layers), "
        "in the teacher's own numbering, which means nothing but that a head's dimensions lie together, between white "
        "lines. What went first mattered least to the loss. Every row, and every head, keeps equally many."
    )
    return Picture(f"units{suffix}", f"{run.name}: which units stayed", caption, figure, UNIT_HEADER, _rows(run))


def importance(run: History, suffix: str) -> Picture:
    """How much of a kind's importance each prune took, over the share of its units."""
    figure, (axes,) = stacked(1, [1])
    header, rows = ("run", "update", "kind", "units_removed", "importance_removed"), []
    for kind in KINDS:
        points = [(update, *_taken(groups, kind)) for update, groups in sorted(run.prunes.items())]
        points = [point for point in points if point[1] > 0]
        rows += [(run.name, update, kind, units, lost) for update, units, lost in points]
        if points:
            axes.plot(
                [update for update, *_ in points],
                [lost / units for _, units, lost in points],
                "o-",
                markersize=3,
                label=kind,
            )
    axes.axhline(1, color=GREY, linestyle=":", label="drawn at random")
    axes.set(ylabel="importance taken / units taken", xlabel="update", xlim=(0, run.last_update))
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    caption = (
        "Importance: what the training loss would change by without a unit, estimated from its weights and gradients. "
        "Of all importance that a kind's units had at a prune, the share that the prune took, over the share of the "
        "units: at 1 the units might have been drawn, near 0 they did nothing."
    )
    return Picture(
        f"importance{suffix}", f"{run.name}: what the prunes took", caption, figure, header, [*map(tuple, rows)]
    )


def _kind(group: str) -> str:
    return group.rsplit(".", 1)[-1]


def _layer(group: str) -> int:
    found = re.match(r"layers\.(\d+)\.", group)
    return int(found[1]) if found else 0


def _head(group: str) -> int:
    found = re.search(r"\.heads\.(\d+)\.", group)
    return int(found[1]) if found else 0


def _heads(run: History) -> int:
    """Of the teacher, in a layer."""
    return 1 + max((_head(name) for groups in run.prunes.values() for name in groups), default=0)


def _fates(run: History, kind: str) -> NDArray[np.float64]:
    """(L, U): the update after which a unit went, infinite where it is left."""
    first = next(iter(sorted(run.prunes.items())))[1]
    groups = [name for name in first if _kind(name) == kind]
    if not groups:
        return np.empty((0, 0))
    size = 1 + max(int(first[name].units.max()) for name in groups)
    columns = size * (1 + max(map(_head, groups)))
    fate = np.full((1 + max(map(_layer, groups)), columns), np.nan)
    for name in groups:
        fate[_layer(name), _head(name) * size + first[name].units] = np.inf
    gone_with_its_head = _heads_gone(run)
    for update, records in sorted(run.prunes.items()):
        for name, record in records.items():
            if _kind(name) == kind:
                fate[_layer(name), _head(name) * size + record.units[~record.kept]] = update
    for layer, head, update in gone_with_its_head if kind in {"qk", "vo"} else ():
        columns_of_head = fate[layer, head * size : (head + 1) * size]
        columns_of_head[np.isinf(columns_of_head)] = update
    return fate


def _heads_gone(run: History) -> list[tuple[int, int, int]]:
    """(layer, head, update) of every head that went whole."""
    return [
        (_layer(name), int(head), update)
        for update, records in sorted(run.prunes.items())
        for name, record in records.items()
        if _kind(name) == "heads"
        for head in record.units[~record.kept]
    ]


def _taken(groups: dict[str, GroupRecord], kind: str) -> tuple[float, float]:
    """Shares of the units and of the importance of a kind that one prune took."""
    records = [record for name, record in groups.items() if _kind(name) == kind]
    units = sum(len(record.units) for record in records)
    total = sum(float(record.scores.sum()) for record in records)
    gone = sum(int((~record.kept).sum()) for record in records)
    lost = sum(float(record.scores[~record.kept].sum()) for record in records)
    return (gone / units if units else 0.0), (lost / total if total else 0.0)


def _rows(run: History) -> list[tuple[object, ...]]:
    return [
        (run.name, name, int(unit), update, float(score), int(kept))
        for update, records in sorted(run.prunes.items())
        for name, record in records.items()
        for unit, score, kept in zip(record.units, record.scores, record.kept, strict=True)
    ]
