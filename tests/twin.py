"""The independent twin: HomoDistil on one process, in plain PyTorch, written from the specification.

Stock `BertForMaskedLM`s, every position's logits, attention scores from the projections, whole maps, a plain AdamW,
tensors sliced by hand. Nothing here comes from homodistil but the `Batch` it reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM

from homodistil.batch import Batch

WEIGHTS = {"task": 1.0, "kl": 0.7, "hidden": 0.3, "attention": 0.2}
TEMPERATURE = 2.0
LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.999), 1e-6, 0.01, 0.5
WINDOW, BETA = 2, 0.85


def scaled(model: BertForMaskedLM, head_width: int) -> BertForMaskedLM:
    """No dropout, and attention scaled as in a model whose heads are `head_width` wide."""
    for layer in model.bert.encoder.layer:
        layer.attention.self.scaling = 1 / math.sqrt(head_width)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def signals(model: BertForMaskedLM, batch: Batch) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits everywhere, hidden states, and unscaled attention scores (B, A, T, T)."""
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    scores = []
    for layer, states in zip(model.bert.encoder.layer, out.hidden_states, strict=False):
        attention = layer.attention.self
        heads = attention.num_attention_heads
        q, k = (p(states).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (attention.query, attention.key))
        scores.append(q @ k.transpose(-1, -2))
    return out.logits, list(out.hidden_states), scores


def losses(
    student: BertForMaskedLM,
    teacher: BertForMaskedLM,
    aligners: list[nn.Linear],
    batch: Batch,
    kept_heads: list[list[int]] | None = None,
) -> dict[str, Tensor]:
    """The four terms of docs/methods.md, "The objective", on a whole global batch."""
    logits, hidden, scores = signals(student, batch)
    with torch.no_grad():
        t_logits, t_hidden, t_scores = signals(teacher, batch)
    rows = torch.arange(len(batch)).unsqueeze(1)
    z, zt = logits[rows, batch.scored_positions], t_logits[rows, batch.scored_positions]
    w, n = batch.weights, batch.weights.sum()
    mlm = -(z.log_softmax(-1).gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1) * w).sum() / n
    p, logp, logq = (
        (zt / TEMPERATURE).softmax(-1),
        (zt / TEMPERATURE).log_softmax(-1),
        (z / TEMPERATURE).log_softmax(-1),
    )
    kl = TEMPERATURE**2 * ((p * (logp - logq)).sum(-1) * w).sum() / n
    mask = batch.attention_mask.bool()
    differences = [(a(h) - t).square().mean(-1) for a, h, t in zip(aligners, hidden, t_hidden, strict=True)]
    hid = sum(d[mask].sum() for d in differences) / mask.sum() / len(differences)
    pairs = mask.unsqueeze(1) & mask.unsqueeze(2)
    scale = 1 / math.sqrt(teacher.config.hidden_size // teacher.config.num_attention_heads)
    att = torch.zeros(())
    for layer, (s, t) in enumerate(zip(scores, t_scores, strict=True)):
        t = t if kept_heads is None else t[:, kept_heads[layer]]
        att = att + ((s - t) * scale).square().mean(1)[pairs].sum() / pairs.sum() / len(scores)
    return {"task": mlm, "kl": kl, "hidden": hid, "attention": att}


@dataclass
class Twin:
    """A student under training, its Adam state, and its smoothed scores per named vector."""

    student: BertForMaskedLM
    teacher: BertForMaskedLM
    aligners: list[nn.Linear]
    metric: str = "sensitivity"
    kept_heads: list[list[int]] | None = None
    """Per layer, the teacher's head behind each of the student's; None: all."""
    optimizer: torch.optim.AdamW = field(init=False)
    ema: dict[Any, Tensor] = field(default_factory=dict)
    uncertainty: dict[str, Tensor] = field(default_factory=dict)
    window: list[dict[tuple[str, int], Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = self._adamw()

    @classmethod
    def start(cls, teacher: BertForMaskedLM, student: BertForMaskedLM, metric: str = "sensitivity") -> Twin:
        """A full-size student with identity projections."""
        width, states = teacher.config.hidden_size, teacher.config.num_hidden_layers + 1
        head_width = width // teacher.config.num_attention_heads
        aligners = [nn.Linear(width, width) for _ in range(states)]
        for aligner in aligners:
            nn.init.eye_(aligner.weight)
            nn.init.zeros_(aligner.bias)
        return cls(scaled(student, head_width), scaled(teacher, head_width), aligners, metric)

    def named(self) -> dict[str, nn.Parameter]:
        return dict(self.student.named_parameters()) | {
            f"aligners.{i}.{n}": p for i, a in enumerate(self.aligners) for n, p in a.named_parameters()
        }

    def accumulate(self, batch: Batch) -> dict[str, float]:
        """Gradients of the weighted sum; the losses."""
        self.optimizer.zero_grad()
        parts = losses(self.student, self.teacher, self.aligners, batch, self.kept_heads)
        sum(WEIGHTS[name] * value for name, value in parts.items()).backward()
        return {name: value.item() for name, value in parts.items()}

    def observe(self) -> None:
        """Smoothed scores of this update: sums along each axis of each tensor, or for PLATON every weight's own."""
        named = {n: p for n, p in self.named().items() if not n.startswith("aligners")}
        per_weight = {n: p.abs() if self.metric == "magnitude" else (p * p.grad).abs() for n, p in named.items()}
        per_weight = {n: v.detach().double() for n, v in per_weight.items()}
        if self.metric == "platon":
            return self._platon(per_weight)
        self.window.append({key: v for n, w in per_weight.items() for key, v in _axis_sums(n, w).items()})
        if len(self.window) == WINDOW:
            self.ema, self.window = self._folded(), []

    def _folded(self) -> dict[Any, Tensor]:
        """Mean over the window, then the moving average, which starts from zero."""
        means = {key: torch.stack([entry[key] for entry in self.window]).mean(0) for key in self.window[0]}
        return {key: BETA * self.ema.get(key, torch.zeros_like(m)) + (1 - BETA) * m for key, m in means.items()}

    def _platon(self, per_weight: dict[str, Tensor]) -> None:
        """At every update, with the windows' time constant: mean of I, then mean of |I - mean|."""
        b = BETA ** (1 / WINDOW)
        for name, new in per_weight.items():
            mean = b * self.ema.get(name, torch.zeros_like(new)) + (1 - b) * new
            old = self.uncertainty.get(name, torch.zeros_like(new))
            self.ema[name], self.uncertainty[name] = mean, b * old + (1 - b) * (new - mean).abs()

    def _smoothed(self) -> dict[tuple[str, int], Tensor]:
        """A part of a window counts as one more."""
        if self.metric == "platon":
            weights = {name: mean * self.uncertainty[name] for name, mean in self.ema.items()}
            return {key: v for n, w in weights.items() for key, v in _axis_sums(n, w).items()}
        return self._folded() if self.window else self.ema

    def unit_scores(self) -> dict[str, Tensor]:
        """Group -> score of each unit: per matrix, sums normalised to 1 (docs/methods.md, "What is pruned").
        Heads are numbered by their place in the present student."""
        s = self._smoothed()
        attention = self.student.bert.encoder.layer[0].attention.self
        heads, width = attention.num_attention_heads, attention.attention_head_size

        def rows(linear: str) -> Tensor:
            return s[f"{linear}.weight", 0] + s[f"{linear}.bias", 0]

        def columns(linear: str) -> Tensor:
            return s[f"{linear}.weight", 1]

        def norm(block: str) -> Tensor:
            return s[f"{block}.LayerNorm.weight", 0] + s[f"{block}.LayerNorm.bias", 0]

        emb, transform = "bert.embeddings", "cls.predictions.transform"
        hidden = [columns(f"{emb}.word_embeddings") + norm(emb)]
        hidden += [columns(f"{emb}.{kind}_embeddings") for kind in ("position", "token_type")]
        groups: dict[str, list[Tensor]] = {}
        for layer in range(self.student.config.num_hidden_layers):
            name = f"bert.encoder.layer.{layer}"
            up, down, written = f"{name}.intermediate.dense", f"{name}.output", f"{name}.attention.output"
            q, k, v = (f"{name}.attention.self.{x}" for x in ("query", "key", "value"))
            out = columns(f"{written}.dense")
            hidden += [columns(x) for x in (q, k, v, up)]
            hidden += [rows(f"{x}.dense") + norm(x) for x in (written, down)]
            groups[f"layers.{layer}.ffn"] = [rows(up), columns(f"{down}.dense")]
            groups[f"layers.{layer}.heads"] = [x.view(heads, width).sum(1) for x in (rows(q), rows(k), rows(v), out)]
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                groups[f"layers.{layer}.heads.{head}.qk"] = [rows(q)[part], rows(k)[part]]
                groups[f"layers.{layer}.heads.{head}.vo"] = [rows(v)[part], out[part]]
        groups["hidden"] = [*hidden, rows(f"{transform}.dense") + norm(transform), columns(f"{transform}.dense")]
        return {group: sum(v / v.sum() for v in matrices) for group, matrices in groups.items()}

    def step(self) -> None:
        nn.utils.clip_grad_norm_(list(self.named().values()), CLIP)
        self.optimizer.step()

    def _adamw(self) -> torch.optim.AdamW:
        parameters = list(self.named().values())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)

    def narrowed(self, keep: Keep) -> Twin:
        """A new twin whose model, aligners, Adam moments and scores were cut by hand."""
        old = self.named()
        small = BertForMaskedLM(self.student.config).eval()
        for layer in small.bert.encoder.layer:
            attention = layer.attention.self
            attention.num_attention_heads, attention.attention_head_size = len(keep.heads[0]), len(keep.qk[0][0])
        for module in small.modules():
            if isinstance(module, nn.LayerNorm):
                module.normalized_shape = (len(keep.hidden),)
        teacher_head = self.teacher.config.hidden_size // self.teacher.config.num_attention_heads
        aligners = [nn.Linear(len(keep.hidden), a.out_features) for a in self.aligners]
        for name, parameter in small.named_parameters():
            parameter.data = keep.cut(name, old[name].data).clone()
        twin = Twin(scaled(small, teacher_head), self.teacher, aligners, self.metric, keep.teacher_heads)
        for name, parameter in twin.named().items():
            source = old[name]
            parameter.data = keep.cut(name, source.data).clone()
            state = self.optimizer.state[source]
            moments = {k: keep.cut(name, state[k]).clone() for k in ("exp_avg", "exp_avg_sq")}
            twin.optimizer.state[parameter] = {"step": state["step"].clone(), **moments}
        cut = (lambda n, v: keep.cut(n, v)) if self.metric == "platon" else (lambda key, v: v[keep.along(*key, old)])
        twin.ema = {key: cut(key, v) for key, v in self.ema.items()}
        twin.uncertainty = {name: keep.cut(name, v) for name, v in self.uncertainty.items()}
        twin.window = [{key: v[keep.along(*key, old)] for key, v in entry.items()} for entry in self.window]
        return twin


def _axis_sums(name: str, weights: Tensor) -> dict[tuple[str, int], Tensor]:
    if weights.ndim == 1:
        return {(name, 0): weights}
    return {(name, 0): weights.sum(1), (name, 1): weights.sum(0)}


@dataclass
class Keep:
    """Kept units by index into the present student; `rows(l, which)` are positions of an attention projection."""

    hidden: list[int]
    ffn: list[list[int]]
    heads: list[list[int]]
    qk: list[list[list[int]]]
    vo: list[list[list[int]]]
    head_width: int
    teacher_heads: list[list[int]]

    def rows(self, layer: int, dims: list[list[list[int]]]) -> list[int]:
        return [head * self.head_width + d for head, ds in zip(self.heads[layer], dims[layer], strict=True) for d in ds]

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """The slices of every group, spelled out tensor by tensor."""
        hidden = torch.tensor(self.hidden)
        if name.startswith("aligners"):
            return tensor[:, hidden] if name.endswith("weight") else tensor
        if name.endswith("predictions.bias") or name.endswith("decoder.bias"):
            return tensor
        if "LayerNorm" in name:
            return tensor[hidden]
        if "embeddings" in name:
            return tensor[:, hidden]
        if "transform.dense.weight" in name:
            return tensor[hidden][:, hidden]
        if "transform.dense.bias" in name:
            return tensor[hidden]
        layer = int(name.split("encoder.layer.")[1].split(".")[0])
        qk, vo = torch.tensor(self.rows(layer, self.qk)), torch.tensor(self.rows(layer, self.vo))
        ffn = torch.tensor(self.ffn[layer])
        is_weight = name.endswith("weight")
        if "attention.self.value" in name:
            return tensor[vo][:, hidden] if is_weight else tensor[vo]
        if "attention.self" in name:
            return tensor[qk][:, hidden] if is_weight else tensor[qk]
        if "attention.output" in name:
            return tensor[hidden][:, vo] if is_weight else tensor[hidden]
        if "intermediate" in name:
            return tensor[ffn][:, hidden] if is_weight else tensor[ffn]
        assert "output.dense" in name, name
        return tensor[hidden][:, ffn] if is_weight else tensor[hidden]

    def along(self, name: str, axis: int, old: dict[str, nn.Parameter]) -> Tensor:
        """Kept positions of one axis: cut a tensor that holds each element's position on it."""
        shape = old[name].shape
        positions = torch.arange(shape[axis]).view([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)
        kept = self.cut(name, positions)
        return kept.select(1 - axis, 0) if kept.ndim == 2 else kept
