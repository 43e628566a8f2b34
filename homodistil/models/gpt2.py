"""Gpt2Family: what GPT-2 and its heads are made of. The only file that knows GPT-2's module names.

Its linear maps are `Conv1D`s, whose weights are (inputs, outputs). `c_attn` is three matrices side by side: outputs of
queries, then keys, then values. The language model's head is the word embeddings: one tensor, scored and sliced once.
Rows of the word and position embeddings are per word and position, those of a task's head per class: no group owns
them. Hidden states are what the blocks add to, which no LayerNorm has seen; `ln_f` belongs to the head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from homodistil.batch import Batch
from homodistil.errors import ShapeError
from homodistil.models.attention import nothing_masked
from homodistil.models.groups import Member, PrunableGroup, columns, norm
from homodistil.models.outputs import at_slots, signals_of, spans
from homodistil.models.shape import HIDDEN, StudentShape, Widths, ffn, heads, nearest_stock, qk, stock_config_at, vo
from homodistil.signals import Signals
from homodistil.tasks import Kind

# B sequences, T tokens, D hidden width, S scored slots, V vocabulary, n = heads x head width

WORDS, POSITIONS, LAST_NORM = "transformer.wte", "transformer.wpe", "transformer.ln_f"
HEADS: dict[Kind, str] = {
    "causal": "lm_head",
    "classification": "score",
    "regression": "score",
    "span": "qa_outputs",
}
"""The map from normalised states to logits."""
PLAIN: dict[str, bool] = {
    "add_cross_attention": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
}
"""Fields of a config that can be distilled."""


@dataclass(frozen=True)
class Gpt2Family:
    """GPT-2; as a language model with a tied head."""

    kind: Kind = "causal"
    kinds: ClassVar[tuple[Kind, ...]] = tuple(HEADS)
    causal: ClassVar[bool] = True
    pre_norm: ClassVar[bool] = True
    own_attention: ClassVar[bool] = False

    def for_config(self, _config: PretrainedConfig) -> Gpt2Family:
        return self

    @property
    def head_names(self) -> tuple[str, ...]:
        return (HEADS[self.kind],)

    def widths(self, config: PretrainedConfig) -> Widths:
        """The shape that a config describes. Raises `ShapeError` for cross-attention, attention scaled in another way
        than by its head width, an untied head and uneven heads."""
        where = config._name_or_path or "GPT2Config"
        wanted = {**PLAIN, "tie_word_embeddings": True} if self.kind == "causal" else PLAIN
        for field, value in wanted.items():
            if getattr(config, field) != value:
                raise ShapeError(
                    f"{where}: {field} is {getattr(config, field)}, expected {value}. Only plain GPT-2 decoders, a "
                    "language model's head tied to the word embeddings, can be distilled; use such a teacher."
                )
        if config.hidden_size % config.num_attention_heads:
            near = nearest_stock(config.hidden_size, config.num_attention_heads, config.hidden_size)
            raise ShapeError(
                f"{where}: n_embd {config.hidden_size} is not a multiple of n_head {config.num_attention_heads}. "
                f"Nearest that is: {near}."
            )
        return Widths(
            hidden=config.hidden_size,
            ffn=4 * config.hidden_size if config.n_inner is None else config.n_inner,
            heads=config.num_attention_heads,
            head_width=config.hidden_size // config.num_attention_heads,
        )

    def layers(self, config: PretrainedConfig) -> int:
        return int(config.num_hidden_layers)

    def with_layers(self, config: PretrainedConfig, count: int) -> PretrainedConfig:
        config = copy.deepcopy(config)
        config.num_hidden_layers = count
        return config

    def keep_layers(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        decoder: Any = model.base_model
        decoder.h = nn.ModuleList(decoder.h[layer] for layer in layers)
        for number, attention in enumerate(_attentions(model)):
            attention.layer_idx = number
        model.config.num_hidden_layers = len(layers)

    def groups(self, shape: StudentShape) -> list[PrunableGroup]:
        """Those of docs/methods.md, "What is pruned", for this shape; a head's comes before those of its dimensions."""
        members = _hidden_members(shape.layers)
        if self.kind != "causal":
            members += columns(HEADS[self.kind])
        groups = [PrunableGroup(HIDDEN, shape.widths.hidden, members)]
        for layer in range(shape.layers):
            groups += [_ffn_group(layer, shape), _heads_group(layer, shape), *_head_width_groups(layer, shape)]
        return groups

    def configure(self, model: PreTrainedModel, shape: StudentShape) -> None:
        """Head counts, the original attention scale, and the width fields of the model's own config."""
        decoder: Any = model.base_model
        widths, decoder.embed_dim = shape.widths, shape.widths.hidden
        _write_widths(model.config, widths)
        for attention in _attentions(model):
            attention.embed_dim = widths.hidden
            attention.num_heads, attention.head_dim = widths.heads, widths.head_width
            attention.split_size = widths.heads * widths.head_width
            attention.scaling = 1 / math.sqrt(shape.teacher.head_width)

    def stock_config(self, config: PretrainedConfig, widths: Widths) -> PretrainedConfig:
        """The teacher's config at other widths. Raises `ShapeError` unless hidden = heads x head width."""
        return stock_config_at(config, widths, _write_widths)

    def fold_attention_scale(self, shape: StudentShape) -> dict[str, Tensor]:
        """Factors (3n,) on the outputs of each `c_attn`: on the queries' alone other than 1."""
        widths = shape.widths
        factors = torch.ones(3, widths.heads * widths.head_width)
        factors[0] = math.sqrt(widths.head_width / shape.teacher.head_width)
        maps = [f"{_layer(layer)}.attn.c_attn" for layer in range(shape.layers)]
        return {f"{name}.{part}": factors.flatten() for name in maps for part in ("weight", "bias")}

    def signals(self, model: PreTrainedModel, batch: Batch, with_logits: bool = True) -> Signals:
        """One forward pass. `model` must use an attention function that hands out (query, key) as its weights.

        Modules are called and their parameters never read here, so that ZeRO-3 gathers them in time.
        """
        decoder: Any = model.base_model
        decoder.config.tie_last_hidden_states = False  # else the last layer's output would be given after `ln_f`
        outputs = decoder(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask if batch.padded else nothing_masked(batch.input_ids.device),
            use_cache=False,
            output_hidden_states=True,
            output_attentions=True,
        )
        logits = partial(self.logits, self._last_map(model)) if with_logits else None
        return signals_of(outputs, next(_attentions(model)).scaling, batch, logits)

    def head(self, model: Any) -> nn.Module:
        """`ln_f` and the map behind it."""
        return nn.Sequential(model.transformer.ln_f, self._last_map(model))

    def logits(self, head: nn.Module, states_BTD: Tensor, batch: Batch) -> Tensor:
        """(B, S, V); a classifier's slot is the last token, the only one that has seen all others."""
        if self.kind == "span":
            return spans(head(states_BTD), batch)
        return head(at_slots(states_BTD, batch))

    def _last_map(self, model: Any) -> nn.Module:
        return getattr(model, HEADS[self.kind])


def _attentions(model: nn.Module) -> Iterator[GPT2Attention]:
    return (module for module in model.modules() if isinstance(module, GPT2Attention))


def _hidden_members(layers: int) -> tuple[Member, ...]:
    """A LayerNorm is scored with the matrix that last wrote what it standardises."""
    members, writer = columns(WORDS) + columns(POSITIONS), (f"{WORDS}.weight", 1)
    for name in map(_layer, range(layers)):
        for before, reader, block in (("ln_1", "attn.c_attn", "attn"), ("ln_2", "mlp.c_fc", "mlp")):
            members += norm(f"{name}.{before}", written_by=writer)
            members += _inputs(f"{name}.{reader}") + _outputs(f"{name}.{block}.c_proj")
            writer = (f"{name}.{block}.c_proj.weight", 1)
    return members + norm(LAST_NORM, written_by=writer)


def _ffn_group(layer: int, shape: StudentShape) -> PrunableGroup:
    name = _layer(layer)
    return PrunableGroup(ffn(layer), shape.widths.ffn, _outputs(f"{name}.mlp.c_fc") + _inputs(f"{name}.mlp.c_proj"))


def _heads_group(layer: int, shape: StudentShape) -> PrunableGroup:
    name, width, n = _layer(layer), shape.widths.head_width, shape.widths.heads * shape.widths.head_width
    members = _inputs(f"{name}.attn.c_proj", width=width)
    for block in range(3):
        members += _outputs(f"{name}.attn.c_attn", block * n, width)
    return PrunableGroup(heads(layer), shape.widths.heads, members)


def _head_width_groups(layer: int, shape: StudentShape) -> list[PrunableGroup]:
    name, width, n = _layer(layer), shape.widths.head_width, shape.widths.heads * shape.widths.head_width
    groups = []
    for position, head in enumerate(shape.kept[heads(layer)]):
        offset, parent = position * width, (heads(layer), position)
        queries, keys, values = (_outputs(f"{name}.attn.c_attn", block * n + offset) for block in range(3))
        read = _inputs(f"{name}.attn.c_proj", offset)
        groups.append(PrunableGroup(qk(layer, head), width, queries + keys, parent))
        groups.append(PrunableGroup(vo(layer, head), width, values + read, parent))
    return groups


def _outputs(conv: str, offset: int = 0, width: int = 1) -> tuple[Member, ...]:
    """Outputs of a Conv1D: its columns, with their biases."""
    matrix = (f"{conv}.weight", 1)
    return Member(*matrix, matrix, offset, width), Member(f"{conv}.bias", 0, matrix, offset, width)


def _inputs(conv: str, offset: int = 0, width: int = 1) -> tuple[Member, ...]:
    """Inputs of a Conv1D: its rows."""
    matrix = (f"{conv}.weight", 0)
    return (Member(*matrix, matrix, offset, width),)


def _layer(layer: int) -> str:
    return f"transformer.h.{layer}"


def _write_widths(config: PretrainedConfig, widths: Widths) -> None:
    config.hidden_size = widths.hidden
    config.n_inner = widths.ffn
    config.num_attention_heads = widths.heads
