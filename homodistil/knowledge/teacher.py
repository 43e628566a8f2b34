"""Teacher: whoever hands over knowledge for a batch. FrozenModel is the live one's module."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from homodistil.batch import Batch
from homodistil.knowledge.filters import FilterSet
from homodistil.knowledge.selection import Selection
from homodistil.models.base import ModelFamily
from homodistil.models.outputs import at_slots
from homodistil.signals import Compared, Knowledge


class Teacher(Protocol):
    """Live or cached, behind one question."""

    parameters: int

    def knowledge(self, batch: Batch) -> Knowledge:
        """What the student should match on this batch. Live and sharded: collective."""
        ...

    def close(self) -> None: ...


class FrozenModel(nn.Module):
    """A model in eval mode whose forward gives its knowledge as plain tuples, which ZeRO-3's hooks can walk."""

    fixed_units: Tensor | None
    """Kept of every token and state."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: ModelFamily,
        compared: Compared | None = None,
        filters: Path | None = None,
        selection: Selection | None = None,
        recorded: bool = False,
    ) -> None:
        """compared: whose hidden states and attention are handed over, all by default. filters: folder of the
        model's, through which these states go first. selection: which part of what comes out. recorded: for a cache,
        which may hold the last hidden states in place of logits."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.family, self.compared, self.recorded = family, compared, recorded
        own = [FilterSet.load(filters).filter(layer) for layer in compared.teacher] if compared and filters else []
        self.filters = nn.ModuleList(own).to(model.dtype).requires_grad_(False)
        self.selection = None if selection is None or selection.is_everything else selection
        fixed = self.selection.fixed_units() if self.selection else None
        self.register_buffer("fixed_units", fixed, persistent=False)

    @torch.no_grad()
    def forward(self, *batch: Any) -> tuple[object, ...]:
        rows = Batch(*batch)
        whole = signals = self.family.signals(self.model, rows)
        if self.compared is not None:
            signals = whole.at(self.compared.teacher, self.compared.embeddings)
        states, kept = signals.hidden_states, signals.kept
        if self.filters:
            states = tuple(let_through(state) for let_through, state in zip(self.filters, states, strict=True))
        if self.selection is not None and self.compared is not None:
            states, kept = self.selection.parts(states, self.compared.teacher_states, whole, rows, self.fixed_units)
        final = at_slots(whole.hidden_states[-1], rows) if self.recorded else None
        return states, signals.queries_keys, signals.attention_scale, signals.logits, kept, None, final
