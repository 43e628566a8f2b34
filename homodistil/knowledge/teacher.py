"""Teacher: whoever hands over knowledge for a batch. FrozenModel is the live one's module."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from homodistil.batch import Batch
from homodistil.knowledge.filters import FilterSet
from homodistil.models.base import ModelFamily
from homodistil.signals import Compared, Knowledge


class Teacher(Protocol):
    """Live or cached, behind one question."""

    config: PretrainedConfig
    parameters: int

    def knowledge(self, batch: Batch) -> Knowledge:
        """What the student should match on this batch. Live and sharded: collective."""
        ...

    def close(self) -> None: ...


class FrozenModel(nn.Module):
    """A model in eval mode whose forward gives its knowledge as plain tuples, which ZeRO-3's hooks can walk."""

    def __init__(
        self, model: PreTrainedModel, family: ModelFamily, compared: Compared | None = None, filters: Path | None = None
    ) -> None:
        """compared: whose hidden states and attention are handed over, all by default. filters: folder of the
        model's, through which these states go first."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.family, self.compared = family, compared
        own = [FilterSet.load(filters).filter(layer) for layer in compared.teacher] if compared and filters else []
        self.filters = nn.ModuleList(own).to(model.dtype).requires_grad_(False)

    @torch.no_grad()
    def forward(self, *batch: Any) -> tuple[object, ...]:
        signals = self.family.signals(self.model, Batch(*batch))
        if self.compared is not None:
            signals = signals.at(self.compared.teacher, self.compared.embeddings)
        states = signals.hidden_states
        if self.filters:
            states = tuple(let_through(state) for let_through, state in zip(self.filters, states, strict=True))
        return states, signals.queries_keys, signals.attention_scale, signals.logits
