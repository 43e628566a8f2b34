"""StudentState: one rank's share of everything that training changes, on its way somewhere else.

A prune slices it and moves it to the owners of the narrower engine; a resume moves it to the owners of another
world size or ZeRO stage; an export moves it to rank 0. A move goes parameter by parameter, and carries to each rank
only the bytes that it will own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

MASTER, EXP_AVG, EXP_AVG_SQ = "master", "exp_avg", "exp_avg_sq"


@dataclass
class Fragment:
    """The contiguous flat range [start, start + n) of one parameter that this rank owns.

    weight: (n,) fp32, a view of the optimizer's master. gradient: (n,) fp32, the global mean before clipping,
    None outside the accumulation boundary. buffers: (n,) fp32 each, whatever else is kept per weight; what a
    reader puts there stays with the weight through prunes and checkpoints.
    """

    name: str
    shape: torch.Size
    start: int
    weight: Tensor
    gradient: Tensor | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Range:
    """Flat elements [start, start + numel) of a parameter."""

    start: int
    numel: int

    @property
    def end(self) -> int:
        return self.start + self.numel

    def overlap(self, other: Range) -> Range:
        start = max(self.start, other.start)
        return Range(start, max(0, min(self.end, other.end) - start))


Layout = Mapping[str, Range]
"""Parameter name -> the range that one rank owns; a parameter it owns nothing of is absent."""


@dataclass(frozen=True)
class Piece:
    """One parameter's owned range with all that is kept of it. `values`: name -> (n,) fp32, equal lengths."""

    shape: torch.Size
    start: int
    values: dict[str, Tensor]

    @property
    def range(self) -> Range:
        return Range(self.start, next(iter(self.values.values())).numel())


class Movable(Protocol):
    """What an engine can be built over: a state held by the ranks, or one on disk."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Parameter name -> whole shape."""
        ...

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        ...

    def moved(self, layout: Layout, device: torch.device) -> Iterator[tuple[str, Piece]]:
        """This rank's pieces under `layout`, one parameter at a time. Collective; to be exhausted."""
        ...


@dataclass(frozen=True)
class StudentState:
    """This rank's pieces, by parameter name, and the number of optimizer steps taken."""

    pieces: dict[str, Piece]
    shapes: dict[str, torch.Size]
    step: int

    @property
    def layout(self) -> Layout:
        return {name: piece.range for name, piece in self.pieces.items()}

    def moved(self, layout: Layout, device: torch.device) -> Iterator[tuple[str, Piece]]:
        """Hand every parameter to its new owners: yields this rank's pieces under `layout`, one parameter at a
        time. Collective: every rank must call this and exhaust it."""
        kept = {name: tuple(piece.values) for name, piece in self.pieces.items()}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (self.layout, dict(layout), kept))
        for name, shape in self.shapes.items():
            old = [before.get(name, Range(0, 0)) for before, _, _ in ranks]
            new = [after.get(name, Range(0, 0)) for _, after, _ in ranks]
            kinds = next(kinds[name] for _, _, kinds in ranks if name in kinds)
            values = _exchange(self.pieces.get(name), old, new, kinds, device)
            if name in layout:
                yield name, Piece(shape, layout[name].start, values)


def _exchange(
    piece: Piece | None, old: list[Range], new: list[Range], kinds: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """One parameter's elements from their old owners to their new ones, only the bytes that each needs."""
    rank, width = dist.get_rank(), len(kinds)
    outgoing = [old[rank].overlap(target) for target in new]
    incoming = [source.overlap(new[rank]) for source in old]
    parts = [_block(piece, part, kinds) for part in outgoing if part.numel]
    sent = torch.cat(parts).to(device) if parts else torch.empty(0, device=device)
    received = torch.empty(sum(part.numel for part in incoming) * width, device=device)
    dist.all_to_all_single(
        received, sent, [part.numel * width for part in incoming], [part.numel * width for part in outgoing]
    )
    blocks = received.split([part.numel * width for part in incoming])
    rows = torch.cat([block.view(width, -1) for block in blocks], dim=1)  # sources ascend, so do their ranges
    return {kind: rows[i] for i, kind in enumerate(kinds)}


def _block(piece: Piece | None, part: Range, kinds: Sequence[str]) -> Tensor:
    assert piece is not None, "a rank sends only what it owns"
    start = part.start - piece.start
    return torch.cat([piece.values[kind][start : start + part.numel] for kind in kinds])
