"""Random signals of a teacher and of a narrower student, and the shape that says what the student kept."""

from __future__ import annotations

import torch

from homodistil.batch import Batch
from homodistil.models.shape import HIDDEN, StudentShape, Widths, ffn, heads, qk, vo
from homodistil.signals import Signals

LAYERS, VOCABULARY = 2, 31
TEACHER = Widths(hidden=12, ffn=16, heads=3, head_width=4)
FULL = StudentShape.full(LAYERS, TEACHER)
SCALE = TEACHER.head_width**-0.5


def narrow_shape() -> StudentShape:
    """Seven of twelve dimensions, other two of three heads in each layer, other three of four columns in each head."""
    kept = {HIDDEN: (0, 2, 3, 5, 8, 10, 11)}
    for layer, chosen in enumerate([(0, 2), (1, 2)]):
        kept |= {ffn(layer): tuple(range(8)), heads(layer): chosen}
        for head in range(TEACHER.heads):
            columns = tuple(c for c in range(TEACHER.head_width) if c != (head + layer) % TEACHER.head_width)
            kept |= {qk(layer, head): columns, vo(layer, head): columns}
    return FULL.narrowed(kept)


def signals(batch: Batch, widths: Widths, seed: int, dtype: torch.dtype = torch.float64) -> Signals:
    """Independent normal numbers, as leaves that want gradients."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    rows, tokens = batch.input_ids.shape
    return Signals(
        hidden_states=tuple(normal(rows, tokens, widths.hidden) for _ in range(LAYERS + 1)),
        queries_keys=tuple(
            (
                normal(rows, widths.heads, tokens, widths.head_width),
                normal(rows, widths.heads, tokens, widths.head_width),
            )
            for _ in range(LAYERS)
        ),
        attention_scale=SCALE,
        logits=normal(rows, batch.labels.shape[1], VOCABULARY),
    )


def leaves(of: Signals) -> list[torch.Tensor]:
    """Every tensor of `of`."""
    return [*of.hidden_states, *(states for layer in of.queries_keys for states in layer), of.logits]


def cropped(batch: Batch, of: Signals, row: int) -> tuple[Batch, Signals]:
    """One sequence alone, without its padding."""
    length = int(batch.attention_mask[row].sum())
    one = slice(row, row + 1)
    alone = Batch(
        input_ids=batch.input_ids[one, :length],
        attention_mask=batch.attention_mask[one, :length],
        token_type_ids=batch.token_type_ids[one, :length],
        scored_positions=batch.scored_positions[one],
        labels=batch.labels[one],
        weights=batch.weights[one],
        samples=batch.samples[one],
    )
    return alone, Signals(
        hidden_states=tuple(state[one, :length] for state in of.hidden_states),
        queries_keys=tuple((query[one, :, :length], key[one, :, :length]) for query, key in of.queries_keys),
        attention_scale=of.attention_scale,
        logits=of.logits[one],
    )
