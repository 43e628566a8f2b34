"""Selection: which tokens and units of a teacher's hidden states are worth matching (Liu et al., ACL 2021).

Depth is chosen before, by `Compared`; then length, then width. Chosen where the teacher is, so that a cache holds no
more than is kept. What is done with the parts is aligners.py's and the objective's.
"""

# B sequences, T tokens, E teacher's width, A heads, d head width, n kept tokens, u kept units

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from homodistil.batch import Batch
from homodistil.config import KnowledgeConfig
from homodistil.data.hashing import Purpose, permutation, tensor_hash
from homodistil.models.outputs import at_tokens
from homodistil.signals import Kept, Signals


@dataclass(frozen=True)
class Selection:
    """n tokens of each sequence and state, and u units of each token, by the strategies of a `KnowledgeConfig`.

    Padding is never kept; of fewer than n tokens all are; of equals the lower index comes first.
    """

    config: KnowledgeConfig
    width: int
    """Units of a state, or of what a filter makes of it."""
    seed: int
    sep: int | None = None
    """Id of the token that `attention_no_sep` leaves out, where there is one."""
    causal: bool = False
    """The last token's query looks at all others, not the first's."""

    @property
    def tokens(self) -> int | None:
        """n; None for all."""
        return self.config.share.tokens

    @property
    def units(self) -> int | None:
        """u; None for all."""
        fraction = self.config.share.units
        return None if fraction is None else max(1, round(fraction * self.width))

    @property
    def is_everything(self) -> bool:
        return self.tokens is None and self.units is None and not self.config.padding

    def eligible(self, batch: Batch) -> Tensor:
        """(B, T) bool: tokens that may be kept."""
        if self.config.padding:
            return torch.ones_like(batch.attention_mask, dtype=torch.bool)
        real_BT = batch.attention_mask.bool()
        if self.tokens is None or self.config.tokens != "attention_no_sep" or self.sep is None:
            return real_BT
        return real_BT & (batch.input_ids != self.sep)

    def count(self, batch: Batch) -> Tensor:
        """(B,) int64: tokens of each sequence that are compared, in every state."""
        eligible_B = self.eligible(batch).sum(dim=1)
        return eligible_B if self.tokens is None else eligible_B.clamp(max=self.tokens)

    def fixed_units(self) -> Tensor | None:
        """(u,) int64: the units of every token and state, where they do not depend on the token."""
        if self.units is None or self.config.units == "magnitude":
            return None
        if self.config.units == "uniform":
            return torch.arange(self.units) * self.width // self.units
        drawn = permutation(self.width, Purpose.KEPT_UNITS, self.seed)[: self.units]
        return torch.from_numpy(drawn).sort().values

    def parts(
        self, states: Sequence[Tensor], numbers: Sequence[int], whole: Signals, batch: Batch, fixed_units: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[Kept, ...]]:
        """What is kept of `states`, (B, T, E) each, and which part that is.

        numbers: of each state, 0 the embeddings'. whole: the teacher's signals, of all its layers.
        """
        eligible_BT = self.eligible(batch)
        found = [
            self._part(state, number, whole, batch, eligible_BT, fixed_units)
            for state, number in zip(states, numbers, strict=True)
        ]
        return tuple(part for part, _ in found), tuple(kept for _, kept in found)

    def _part(
        self,
        state_BTE: Tensor,
        number: int,
        whole: Signals,
        batch: Batch,
        eligible_BT: Tensor,
        units: Tensor | None,
    ) -> tuple[Tensor, Kept]:
        positions, counted = None, eligible_BT
        if self.tokens is not None:
            scores_BT = self._scores(number, whole, batch)
            lowest = float("-inf") if scores_BT.is_floating_point() else torch.iinfo(scores_BT.dtype).min
            positions = top(scores_BT.masked_fill(~eligible_BT, lowest), self.tokens)
            counted, state_BTE = eligible_BT.gather(1, positions), at_tokens(state_BTE, positions)
        if self.units is not None:
            units = top(state_BTE.abs(), self.units) if units is None else units
            state_BTE = at_units(state_BTE, units)
            state_BTE, units = self.completed(state_BTE, units)
        return state_BTE, Kept(counted.to(batch.weights.dtype), positions, units)

    def completed(self, kept_Bnu: Tensor, units: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Kept units as the student is to meet them: by themselves, or among zeros, (B, n, E), where those that are
        left out are zero."""
        if units is None or self.config.left_out == "ignored":
            return kept_Bnu, units
        zeros = kept_Bnu.new_zeros((*kept_Bnu.shape[:-1], self.width))
        return zeros.scatter(-1, units.expand_as(kept_Bnu), kept_Bnu), None

    def _scores(self, number: int, whole: Signals, batch: Batch) -> Tensor:
        """(B, T): the higher the sooner a token is kept."""
        ids_BT = batch.input_ids
        if self.config.tokens == "left":
            return -torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        if self.config.tokens == "random":
            places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
            return tensor_hash(
                Purpose.KEPT_TOKENS, self.seed, number, batch.masking, batch.samples.unsqueeze(1), places_T
            )
        query_BATd, key_BATd = (states.float() for states in whole.queries_keys[max(number - 1, 0)])
        asking_B = batch.attention_mask.sum(dim=1) - 1 if self.causal else torch.zeros_like(batch.samples)
        index = asking_B.clamp(min=0)[:, None, None, None].expand(-1, query_BATd.shape[1], 1, query_BATd.shape[3])
        return (query_BATd.gather(2, index) * key_BATd).sum(dim=3).mean(dim=1)


def top(scores: Tensor, count: int) -> Tensor:
    """Indices, ascending, of the `count` largest along the last axis (of all, if there are fewer); among equals the
    lowest indices. Nothing here waits for the device."""
    count = min(count, scores.shape[-1])
    least = scores.topk(count, dim=-1, sorted=True).values[..., -1:]
    above, equal = scores > least, scores == least
    spare = count - above.sum(dim=-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=-1) <= spare))
    return numbered(chosen, count)


def numbered(chosen: Tensor, count: int) -> Tensor:
    """(..., count) int64: the indices, ascending, of the `count` that are chosen along the last axis."""
    places = torch.where(chosen, chosen.cumsum(dim=-1) - 1, count)
    numbers = torch.arange(chosen.shape[-1], device=chosen.device).expand_as(places)
    return places.new_zeros((*places.shape[:-1], count + 1)).scatter_(-1, places, numbers)[..., :count]


def shared_units(parts: Sequence[Kept], kept: Sequence[int], width: int) -> Tensor | None:
    """Of the units that are handed over, the share that a student with these dimensions has, a scalar; None where all
    are handed over."""
    chosen = [part.units for part in parts if part.units is not None]
    if not chosen:
        return None
    has = torch.zeros(width, device=chosen[0].device)
    has[list(kept)] = 1
    return torch.stack([has[units].mean() for units in chosen]).mean()


def at_units(state_BnE: Tensor, units: Tensor) -> Tensor:
    """(B, n, u), for units (u,) or (B, n, u)."""
    return state_BnE.index_select(-1, units) if units.ndim == 1 else state_BnE.gather(-1, units)
