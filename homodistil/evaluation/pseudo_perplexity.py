"""Pseudo-perplexity of a masked language model (Salazar et al. 2020, eqs. 1 and 3).

Every token of a sequence is masked in its turn and foretold from all the others: a pass per token. Sequences are
held-out ones of shards, or the lines of a text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from homodistil.data.shards import ShardIndex, read_shard
from homodistil.data.sources import verbatim
from homodistil.errors import DataError, ModelError
from homodistil.evaluation.scoring import Question, Scores, perplexity, score
from homodistil.evaluation.stock import (
    Precision,
    check_fits,
    check_kind,
    device,
    load_stock,
    positions,
    stock_tokenizer,
)


@dataclass(frozen=True)
class Sentences:
    """Sequences of ids, as a model sees them, and which ids are not words."""

    ids: Sequence[Sequence[int]]
    mask: int
    never_masked: Collection[int]
    """What frames and fills a sequence; an unknown word is a word."""
    tokens_cut: int = 0
    """Tokens at the ends of sequences that were left out, because the model sees no more."""

    def places(self) -> list[tuple[Sequence[int], int]]:
        """(sequence, position) of every token to be foretold, sequences in order of their lengths."""
        ordered = sorted(self.ids, key=len)
        return [(ids, place) for ids in ordered for place, token in enumerate(ids) if token not in self.never_masked]


def evaluate_pseudo_perplexity(
    model: Path,
    shards: Path | None = None,
    source: str | None = None,
    sequences: int = 128,
    micro_batch: int = 32,
    dtype: Precision = "float32",
) -> Scores:
    """Of the first `sequences` held-out sequences of `shards`, or else lines of `source` that aren't blank.

    pseudo_perplexity, exp of minus the mean log-probability of a token given all the others of its sequence;
    pseudo_log_likelihood, nats a token; tokens; sequences; tokens_cut, those at the ends of sequences that are
    longer than the model sees. Raises `DataError` and `ModelError`.
    """
    config = check_kind(model, "masked")
    if shards is not None:
        sentences = _held_out(shards, sequences, model, config)
    else:
        assert source is not None
        sentences = _lines(source, sequences, stock_tokenizer(model, config), config)
    places = sentences.places()
    if not places:
        raise DataError(f"{shards or source}: no words in it, expected at least one. Give another text.")
    loaded = load_stock(model, dtype).to(device())  # type: ignore[arg-type]  # a decorator hides its signature

    log_probability, _ = score(
        loaded, _questions(places, sentences.mask), len(places), micro_batch, "pseudo-perplexity"
    )
    mean = float(log_probability.mean())
    return {
        "pseudo_perplexity": perplexity(-mean),
        "pseudo_log_likelihood": mean,
        "tokens": len(places),
        "sequences": len(sentences.ids),
        "tokens_cut": sentences.tokens_cut,
        "convention": "Each token is masked alone and foretold from all others of its sequence; what frames a sequence "
        "is not scored.",
    }


def _questions(places: Iterable[tuple[Sequence[int], int]], mask: int) -> Iterator[Question]:
    for ids, place in places:
        yield Question([*ids[:place], mask, *ids[place + 1 :]], [place], [ids[place]])


def _held_out(shards: Path, count: int, model: Path, config: PretrainedConfig) -> Sentences:
    """The first held-out sequences, without padding. Raises `DataError`, or `ModelError` where they don't fit."""
    index = ShardIndex.load(shards)
    check_fits(model, config, shards, index)
    rows = (row for entry in index.splits["validation"] for row in read_shard(shards, index, entry).tolist())
    special = index.special_tokens
    ids = [[token for token in row if token != special.pad] for row in islice(rows, count)]
    assert special.mask is not None, "shards for masked language modelling have one"
    framing = {token for token in (special.pad, special.cls, special.sep) if token is not None}
    return Sentences(ids, special.mask, framing)


def _lines(source: str, count: int, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Sentences:
    """The first lines that aren't blank, each framed as the tokenizer does. Raises `ModelError`, `DataError`."""
    if tokenizer.mask_token_id is None:
        raise ModelError(
            f"{config._name_or_path}: the tokenizer has no mask_token, expected one to hide words with. Name it in "
            "tokenizer_config.json."
        )
    lines = (line.strip() for text in verbatim(source) for line in text.split("\n") if line.strip())
    chosen, limit = list(islice(lines, count)), positions(config, tokenizer)
    whole = [tokenizer(line, verbose=False)["input_ids"] for line in chosen]
    seen = [tokenizer(line, truncation=limit is not None, max_length=limit)["input_ids"] for line in chosen]
    framing = {tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    return Sentences(seen, tokenizer.mask_token_id, framing, sum(map(len, whole)) - sum(map(len, seen)))
