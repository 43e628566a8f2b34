"""StudentShape: which of the teacher's units a student still has. Its widths follow from that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from homodistil.errors import ShapeError

HIDDEN = "hidden"


def ffn(layer: int) -> str:
    """Group of a layer's intermediate neurons."""
    return f"layers.{layer}.ffn"


def heads(layer: int) -> str:
    """Group of a layer's attention heads."""
    return f"layers.{layer}.heads"


def qk(layer: int, teacher_head: int) -> str:
    """Group of one kept head's query/key dimensions; heads are named by their number in the teacher."""
    return f"layers.{layer}.heads.{teacher_head}.qk"


def vo(layer: int, teacher_head: int) -> str:
    """Group of one kept head's value dimensions."""
    return f"layers.{layer}.heads.{teacher_head}.vo"


@dataclass(frozen=True)
class Widths:
    """The four numbers that a shape amounts to, equal in every layer."""

    hidden: int
    ffn: int
    heads: int
    head_width: int

    @property
    def is_stock(self) -> bool:
        """Whether a stock config expresses it: hidden = heads x head width."""
        return self.hidden == self.heads * self.head_width

    def __str__(self) -> str:
        return f"{self.hidden} hidden, {self.heads} x {self.head_width} heads, {self.ffn} FFN"


def nearest_stock(hidden: int, heads: int, widest_head: int) -> str:
    """The widths next to `hidden` that so many heads, no wider than `widest_head`, can make: for error messages."""
    around = {min(widest_head, max(1, width)) for width in (hidden // heads, -(-hidden // heads))}
    return " or ".join(f"{heads * width} ({heads} x {width})" for width in sorted(around, reverse=True))


def stock_config_at(
    config: PretrainedConfig, widths: Widths, write_widths: Callable[[PretrainedConfig, Widths], None]
) -> PretrainedConfig:
    """The same config at other widths. Raises `ShapeError` unless hidden = heads x head width."""
    if not widths.is_stock:
        near = nearest_stock(widths.hidden, widths.heads, widths.hidden)
        raise ShapeError(
            f"A {type(config).__name__} cannot express {widths}: hidden must be heads x head width. "
            f"Nearest that it can, with {widths.heads} heads: hidden {near}."
        )
    stock = copy.deepcopy(config)
    write_widths(stock, widths)
    return stock


@dataclass(frozen=True)
class StudentShape:
    """Per group, the teacher's unit behind each of the student's, in order. Serialisable; immutable."""

    layers: int
    teacher: Widths
    kept: Mapping[str, tuple[int, ...]] = field(hash=False)

    @classmethod
    def full(cls, layers: int, teacher: Widths) -> StudentShape:
        """The teacher's own shape: every unit kept."""
        kept = {HIDDEN: tuple(range(teacher.hidden))}
        for layer in range(layers):
            kept[ffn(layer)] = tuple(range(teacher.ffn))
            kept[heads(layer)] = tuple(range(teacher.heads))
            for head in range(teacher.heads):
                kept[qk(layer, head)] = kept[vo(layer, head)] = tuple(range(teacher.head_width))
        return cls(layers, teacher, kept)

    def first(self, widths: Widths) -> StudentShape:
        """The first units of each group: the bookkeeping of a student that does not come from its teacher."""
        counts = {"hidden": widths.hidden, "ffn": widths.ffn, "heads": widths.heads}
        kept = {}
        for name, units in self.kept.items():
            kept[name] = units[: counts.get(name.rsplit(".", 1)[-1], widths.head_width)]
        return self._with(kept)

    def narrowed(self, kept: Mapping[str, tuple[int, ...]]) -> StudentShape:
        """This shape less what a plan leaves out; `kept` indexes this shape's units, group by group."""
        chosen = {name: tuple(units[i] for i in kept[name]) for name, units in self.kept.items() if name in kept}
        return self._with(chosen)

    def _with(self, kept: Mapping[str, tuple[int, ...]]) -> StudentShape:
        alive = {name(layer, h) for layer in range(self.layers) for h in kept[heads(layer)] for name in (qk, vo)}
        return StudentShape(
            self.layers, self.teacher, {n: u for n, u in kept.items() if not n.endswith(("qk", "vo")) or n in alive}
        )

    @property
    def widths(self) -> Widths:
        first_head = self.kept[heads(0)][0]
        return Widths(
            hidden=len(self.kept[HIDDEN]),
            ffn=len(self.kept[ffn(0)]),
            heads=len(self.kept[heads(0)]),
            head_width=len(self.kept[qk(0, first_head)]),
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back."""
        return {
            "layers": self.layers,
            "teacher": vars(self.teacher),
            "kept": {name: list(units) for name, units in self.kept.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StudentShape:
        kept = {name: tuple(units) for name, units in values["kept"].items()}
        return cls(values["layers"], Widths(**values["teacher"]), kept)
