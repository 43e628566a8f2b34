"""Small and awkward: models and batches whose sizes no world size divides, for tests that claim exactness.

Hidden 72 = 6 heads x 12, FFN 136, vocabulary 997, tied embeddings, padding present.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DebertaV2Config,
    GPT2Config,
    PreTrainedModel,
)

from homodistil.batch import Batch
from homodistil.data.shards import ShardEntry, ShardIndex, SpecialTokens, write_shard
from homodistil.data.tokenizer import tokenizer_hash
from homodistil.models.loading import AUTO_CLASSES
from homodistil.ranks import Ranks
from homodistil.tasks import Kind

T = TypeVar("T")

VOCABULARY = 997
PAD, UNK, CLS, SEP, MASK, FIRST_WORD = range(6)


class SilentRanks(Ranks):
    """One rank's share of a world whose other ranks are not there: whatever they would say is nothing."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def broadcast(self, value: T) -> T:
        return value

    def once(self, work: Callable[[], T]) -> T:
        return work()

    def gather(self, value: T) -> list[T]:
        return [value]


def bert_config(**changes: Any) -> BertConfig:
    """The awkward BERT's config; dropout is BERT's own 0.1."""
    values: dict[str, Any] = {
        "hidden_size": 72,
        "num_attention_heads": 6,
        "intermediate_size": 136,
        "num_hidden_layers": 3,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    return BertConfig(**{**values, **changes})


def bert(seed: int = 0, **changes: Any) -> BertForMaskedLM:
    """A real `BertForMaskedLM`, fp32, in eval mode; no tensor is left constant, biases and norms included."""
    torch.manual_seed(seed)
    model = BertForMaskedLM(bert_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.bert.embeddings.word_embeddings.weight[0].zero_()  # the padding row, as training leaves it
    return model


def gpt2_config(**changes: Any) -> GPT2Config:
    """The awkward GPT-2's config; dropout is GPT-2's own 0.1."""
    values: dict[str, Any] = {
        "n_embd": 72,
        "n_head": 6,
        "n_inner": 136,
        "n_layer": 3,
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "bos_token_id": SEP,
        "eos_token_id": SEP,
        "pad_token_id": PAD,
    }
    return GPT2Config(**{**values, **changes})


def gpt2(seed: int = 0, kind: Kind = "causal", **changes: Any) -> PreTrainedModel:
    """A real GPT-2 with the head of a kind of task, fp32, in eval mode; no tensor is left constant, biases and norms
    included."""
    torch.manual_seed(seed)
    attention = {key: changes.pop(key) for key in ("attn_implementation",) if key in changes}
    model = AUTO_CLASSES[kind].from_config(gpt2_config(**changes), **attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def deberta_config(**changes: Any) -> DebertaV2Config:
    """The awkward DeBERTa's config, with the parts of a DeBERTaV3; dropout is its own 0.1."""
    values: dict[str, Any] = {
        "hidden_size": 72,
        "num_attention_heads": 6,
        "intermediate_size": 136,
        "num_hidden_layers": 3,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "relative_attention": True,
        "position_buckets": 16,
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    }
    return DebertaV2Config(**{**values, **changes})


def deberta(seed: int = 0, kind: Kind = "masked", **changes: Any) -> PreTrainedModel:
    """A real DeBERTa with a head of `kind`, fp32, in eval mode; no tensor is left constant, biases and norms included.

    Its matrices are larger than a new model's, so that attention is far from even and positions count.
    """
    torch.manual_seed(seed)
    model: PreTrainedModel = AUTO_CLASSES[kind].from_config(deberta_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15 if parameter.ndim > 1 else 0.05)
        model.get_input_embeddings().weight[0].zero_()  # the padding row, as training leaves it
    return model


def batch(sequences: int = 6, tokens: int = 24, slots: int = 4, seed: int = 0, vocabulary: int = VOCABULARY) -> Batch:
    """Random masked sequences of unequal lengths, padded; every third has an empty last slot."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_WORD, vocabulary, (sequences, tokens), generator=random)
    lengths = torch.randint(max(2, tokens // 3), tokens + 1, (sequences, 1), generator=random)
    attention_mask = (torch.arange(tokens) < lengths).long()
    order = torch.rand(sequences, tokens, generator=random).masked_fill(attention_mask == 0, 2.0)
    positions = order.argsort(dim=1)[:, :slots].sort(dim=1).values
    real = positions < lengths
    real[::3, -1] = False
    labels = ids.gather(1, positions)
    masked = ids.scatter(1, positions, torch.where(real, MASK, labels))
    return Batch(
        input_ids=masked * attention_mask,
        attention_mask=attention_mask,
        token_type_ids=torch.zeros_like(ids),
        scored_positions=positions,
        labels=labels,
        weights=real.float(),
        samples=torch.arange(sequences),
    )


def save_bert(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face directory with the awkward BERT and a tokenizer of its vocabulary."""
    directory.mkdir(parents=True, exist_ok=True)
    bert(seed, **changes).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """A WordPiece tokenizer whose ids are 0 [PAD], 1 [UNK], 2 [CLS], 3 [SEP], 4 [MASK], then made-up words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"w{i}" for i in range(FIRST_WORD, VOCABULARY)]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(directory)


def save_shards(directory: Path, shards: int = 4, sequences: int = 12, tokens: int = 24, seed: int = 0) -> ShardIndex:
    """Shards of random words, low ids far more often than high ones, and a held-out shard; the last row is padded."""
    random = np.random.default_rng(seed)
    save_tokenizer(directory / "tokenizer")

    def write(name: str) -> ShardEntry:
        words = (FIRST_WORD + (VOCABULARY - FIRST_WORD) * random.random((sequences, tokens)) ** 4).astype(np.uint16)
        words[:, 0], words[:, -1] = CLS, SEP
        words[-1, tokens // 2 :] = PAD
        return write_shard(directory / name, [words])

    index = ShardIndex(
        sequence_length=tokens,
        dtype="uint16",
        vocab_size=VOCABULARY,
        tokenizer_sha256=tokenizer_hash(directory / "tokenizer"),
        special_tokens=SpecialTokens(pad=PAD, unk=UNK, cls=CLS, sep=SEP, mask=MASK),
        documents=1,
        tokens=(shards + 1) * sequences * tokens,
        sources={},
        splits={"train": [write(f"train-{i}.tar") for i in range(shards)], "validation": [write("validation.tar")]},
    )
    index.save(directory)
    return index
