"""A rank of one, without a process group, and weights cut into fragments in every awkward way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from homodistil.ranks import Ranks
from homodistil.state import Fragment

T = TypeVar("T")
Named = Mapping[str, Tensor]
Buffers = dict[tuple[str, int], dict[str, Tensor]]


class Alone(Ranks):
    """A world of one."""

    def sum(self, values: Tensor) -> Tensor:
        return values

    def broadcast(self, value: T) -> T:
        return value

    def gather(self, value: T) -> list[T]:
        return [value]


ALONE = Alone(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def whole(weights: Named, gradients: Named, buffers: Buffers | None = None) -> list[Fragment]:
    """One fragment per parameter."""
    return list(_fragments(weights, gradients, {name: [0, w.numel()] for name, w in weights.items()}, buffers))


def shattered(weights: Named, gradients: Named, seed: int, buffers: Buffers | None = None) -> list[Fragment]:
    """Up to five fragments per parameter, cut anywhere, in random order."""
    random = torch.Generator().manual_seed(seed)
    cuts = {
        name: sorted({0, w.numel(), *torch.randint(0, w.numel() + 1, (4,), generator=random).tolist()})
        for name, w in weights.items()
    }
    pieces = list(_fragments(weights, gradients, cuts, buffers))
    return [pieces[i] for i in torch.randperm(len(pieces), generator=random).tolist()]


def _fragments(
    weights: Named, gradients: Named, cuts: Mapping[str, list[int]], buffers: Buffers | None
) -> Iterator[Fragment]:
    kept = {} if buffers is None else buffers
    for name, bounds in cuts.items():
        weight, gradient = weights[name].detach().flatten(), gradients[name].flatten()
        for start, end in itertools.pairwise(bounds):
            own = kept.setdefault((name, start), {})
            yield Fragment(name, weights[name].shape, start, weight[start:end], gradient[start:end], own)
