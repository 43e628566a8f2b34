"""Fragments on disk: each rank's share of a student as one safetensors file, and the way back to any ranks.

Reading needs no communication: a rank takes just the bytes that it will own, from whichever files hold them, so the
number of ranks and the ZeRO stage may differ from those that wrote. Which files belong together is manifest.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from homodistil.errors import CheckpointError
from homodistil.state import Layout, Piece, Range, StudentState

SHARES = "shares"

Shares = dict[str, Tensor]
"""Additive vectors, this rank's share of each: a global total is the sum over ranks."""


def write_fragments(path: Path, state: StudentState, shares: Mapping[str, Tensor]) -> None:
    """One rank's pieces, flat, as `parameter/kind`, and its shares as `shares/name`."""
    tensors = {f"{name}/{kind}": part for name, piece in state.pieces.items() for kind, part in piece.values.items()}
    tensors |= {f"{SHARES}/{name}": share for name, share in shares.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@dataclass(frozen=True)
class SavedState:
    """A `StudentState` on disk, whole: what it offers to an engine is the same."""

    layouts: Mapping[Path, Layout]
    """Which range of which parameter each file holds, in the order of the ranks that wrote them."""
    shapes: Mapping[str, torch.Size]
    step: int

    def moved(self, layout: Layout, device: torch.device) -> Iterator[tuple[str, Piece]]:
        """This rank's pieces under `layout`, one parameter at a time. Raises `CheckpointError` for what is not held."""
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            for name, wanted in layout.items():
                blocks = []
                for path, held in self.layouts.items():
                    part = held.get(name, Range(0, 0)).overlap(wanted)
                    if part.numel:
                        if path not in files:
                            files[path] = stack.enter_context(safe_open(path, framework="pt"))
                        blocks.append((part.start, _block(files[path], name, held[name].start, part)))
                yield name, self._joined(name, wanted, sorted(blocks, key=lambda block: block[0]), device)

    def shares(self, rank: int, world_size: int) -> Shares:
        """The shares that rank `rank` of `world_size` goes on with: those of the writers rank, rank + world_size, ...

        With as many ranks as wrote, each gets back its own, bit for bit.
        """
        total: Shares = {}
        for path in list(self.layouts)[rank::world_size]:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # a safe_open is no mapping
                    owner, _, name = key.partition("/")
                    if owner == SHARES:
                        share = file.get_tensor(key)
                        total[name] = total[name] + share if name in total else share
        return total

    def _joined(
        self, name: str, wanted: Range, blocks: list[tuple[int, dict[str, Tensor]]], device: torch.device
    ) -> Piece:
        kinds = blocks[0][1] if blocks else {}
        values = {kind: torch.cat([block[kind] for _, block in blocks]).to(device) for kind in kinds}
        if not values or any(len(value) != wanted.numel for value in values.values()):
            raise CheckpointError(f"{name}: elements {wanted.start} to {wanted.end} are not all in the checkpoint.")
        return Piece(self.shapes[name], wanted.start, values)


def _block(file: Any, name: str, start: int, part: Range) -> dict[str, Tensor]:
    """Kind -> the elements `part` of a parameter whose range in this file begins at `start`."""
    kinds = [key.rpartition("/")[2] for key in file.keys() if key.rpartition("/")[0] == name]  # noqa: SIM118
    bounds = slice(part.start - start, part.end - start)
    return {kind: file.get_slice(f"{name}/{kind}")[bounds] for kind in kinds}
