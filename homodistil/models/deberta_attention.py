"""DeBERTa's attention, written for distilling: queries and keys come out, and a narrowed head keeps its scale.

Stock DeBERTa has no attention interface, and scales by its own head width inside its forward. So `adopt` makes that
module ours in place: same parameters and names, another forward. Which models are adopted is the family's affair.
"""

# B sequences, A heads, T tokens, d head width, D hidden width, S reach of relative positions

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

POSITIONS = ("c2p", "p2c")
"""Scores besides content to content: of a query's content and a key's relative position, and the reverse."""


class DistilledAttention(DisentangledSelfAttention):
    """Stock attention (He et al. 2021, eq. 2-4) up to rounding, while the head width is the original's."""

    original_head_width: int
    """Of the model that was narrowed into this one: scores are scaled by it, whatever is left of a head."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """hidden_states (B, T, D), attention_mask (B, 1, T, T), relative_pos (1, T, T), rel_embeddings (2S, D).

        Returns the heads' values (B, T, A d) and, if `output_attentions`, (queries, keys), each (B, A, T, d).
        """
        assert query_states is None, "no layer of these is run twice"
        assert relative_pos is not None and rel_embeddings is not None, "widths refuses models without them"
        query, key, value = (self._heads(p, hidden_states) for p in (self.query_proj, self.key_proj, self.value_proj))
        scale = 1 / math.sqrt(self.original_head_width * (1 + sum(kind in self.pos_att_type for kind in POSITIONS)))
        scores = (query * scale) @ key.transpose(2, 3)
        scores = scores + self._position_scores(query * scale, key, scale, relative_pos, rel_embeddings)
        scores = scores.masked_fill(~attention_mask.bool(), torch.finfo(scores.dtype).min)
        context = self.dropout(scores.softmax(dim=-1)) @ value
        return context.transpose(1, 2).flatten(2), (query, key) if output_attentions else None

    def _heads(self, projection: nn.Module, states: Tensor) -> Tensor:
        """(..., A, T, d) of states (..., T, D)."""
        heads: Tensor = projection(states).unflatten(-1, (self.num_attention_heads, -1))
        return heads.transpose(-2, -3)

    def _position_scores(
        self, scaled_query: Tensor, key: Tensor, scale: float, relative_pos: Tensor, rel_embeddings: Tensor
    ) -> Tensor | float:
        """(B, A, T, T). Every content meets all 2S positions at once; each pair then picks its own."""
        reach = self.pos_ebd_size
        positions = self.pos_dropout(rel_embeddings[: 2 * reach])
        index = (relative_pos + reach).clamp(0, 2 * reach - 1).expand(*key.shape[:3], -1)
        scores: Tensor | float = 0.0
        if "c2p" in self.pos_att_type:
            keys = self._heads(self.key_proj if self.share_att_key else self.pos_key_proj, positions)
            scores = scores + torch.einsum("batd,asd->bats", scaled_query, keys).gather(3, index)
        if "p2c" in self.pos_att_type:
            queries = self._heads(self.query_proj if self.share_att_key else self.pos_query_proj, positions) * scale
            met = torch.einsum("batd,asd->bats", key, queries)
            scores = scores + met.gather(3, index.transpose(2, 3)).transpose(2, 3)
        return scores


def adopt(model: nn.Module) -> None:
    """Make a stock model's attention ours, in place; once is enough, and twice changes nothing."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if type(module) is DisentangledSelfAttention:
            module.__class__ = DistilledAttention
            module.original_head_width = module.attention_head_size


def attentions(model: nn.Module) -> Iterator[DistilledAttention]:
    """Of an adopted model, layer by layer."""
    return (module for module in model.modules() if isinstance(module, DistilledAttention))
