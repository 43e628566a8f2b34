"""R and R+: what a good script does with stock transformers, against which this project's step is measured.

Both have two whole models, all-position logits, the model's own masked-language-model loss over them, learned
projections, `kl_div` under a mask of the scored positions and `mse_loss` over whole attention maps. R attends eagerly,
which is what hands maps out, keeps the student's full width under a mask, and runs torch's default AdamW. R+ has what
a careful engineer adds: SDPA, the student cut to its width, torch.compile over models and losses, and fused AdamW.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, BertForMaskedLM

from homodistil.batch import Batch

MAPS, PARTS = "benchmark_maps", "benchmark_queries_and_keys"


def _maps(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any) -> Any:
    """Eager attention; hands out the scaled scores, before masking."""
    scores = query @ key.mT * settings["scaling"]
    masked = scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (masked.softmax(dim=-1) @ value).transpose(1, 2).contiguous(), scores


def _parts(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any) -> Any:
    """SDPA, which has no maps; hands out the parts to make them from."""
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=settings["scaling"])
    return output.transpose(1, 2).contiguous(), query @ key.mT * settings["scaling"]


class Reference:
    """One training process of its own: student, frozen teacher, projections, optimizer."""

    def __init__(
        self,
        teacher: BertForMaskedLM,
        student: BertForMaskedLM,
        projections: Sequence[nn.Linear],
        heads: Sequence[Sequence[int]],
        weights: dict[str, float],
        rate: float,
        *,
        plus: bool,
        masks: dict[str, Tensor] | None = None,
    ) -> None:
        """heads: the teacher's heads that each layer's are compared with. masks: parameter -> 1 where it is kept."""
        for name, function in ((MAPS, _maps), (PARTS, _parts)):
            AttentionInterface.register(name, function)
        device = next(teacher.parameters()).device
        self.teacher, self.student = copy.deepcopy(teacher).eval(), copy.deepcopy(student).train()
        self.projections = nn.ModuleList(copy.deepcopy(list(projections))).to(device)
        for model in (self.teacher, self.student):
            model.set_attn_implementation(PARTS if plus else MAPS)
        self._heads = [None if list(h) == list(range(_heads(teacher))) else torch.tensor(h) for h in heads]
        self._weights, self._device = weights, device
        trained = [*self.student.parameters(), *self.projections.parameters()]
        decay = [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim == 1]}]
        decay[1]["weight_decay"] = 0.0  # type: ignore[assignment]
        self._optimizer = torch.optim.AdamW(decay, lr=rate, eps=1e-6, weight_decay=0.01, fused=plus or None)
        parameters = dict(self.student.named_parameters())
        self._masked = [(parameters[name], mask) for name, mask in (masks or {}).items()]
        self._losses: Callable[[Batch], list[Tensor]] = torch.compile(self._terms) if plus else self._terms

    def step(self, batch: Batch) -> list[float]:
        """One update; mlm, kl, hidden, attention."""
        rows = batch.to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16):
            terms = self._losses(rows)
        total = torch.stack([weight * term for weight, term in zip(self._weights.values(), terms, strict=True)]).sum()
        total.backward()
        nn.utils.clip_grad_norm_([*self.student.parameters(), *self.projections.parameters()], 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for parameter, mask in self._masked:
                parameter *= mask
        return [term.item() for term in terms]

    def _terms(self, batch: Batch) -> list[Tensor]:
        """Means over scored positions, tokens and pairs; every sequence of a benchmark is full."""
        asked = {"attention_mask": batch.attention_mask, "output_hidden_states": True, "output_attentions": True}
        everywhere = torch.full_like(batch.input_ids, -100).scatter(1, batch.scored_positions, batch.labels)
        student = self.student(batch.input_ids, labels=everywhere, **asked)
        with torch.no_grad():
            teacher = self.teacher(batch.input_ids, **asked)
        log_p, log_q = (out.logits.float().log_softmax(-1) for out in (student, teacher))
        scored = everywhere != -100
        kl = (F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1) * scored).sum() / scored.sum()
        pairs = zip(self.projections, student.hidden_states, teacher.hidden_states, strict=True)
        hidden = torch.stack([F.mse_loss(project(s).float(), t.float()) for project, s, t in pairs]).mean()
        maps = zip(self._heads, student.attentions, teacher.attentions, strict=True)
        chosen = [(s, t if heads is None else t[:, heads]) for heads, s, t in maps]
        attention = torch.stack([F.mse_loss(s.float(), t.float()) for s, t in chosen]).mean()
        return [student.loss, kl, hidden, attention]


def _heads(model: BertForMaskedLM) -> int:
    return int(model.config.num_attention_heads)
