"""LAMBADA (Paperno et al. 2016): does a causal model name the last word of a passage?

Counted as is usual: the target is the last word with the space before it, and is right if each of its tokens is the
likeliest one given all before it; no token is put before the passage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from homodistil.data.sources import verbatim
from homodistil.errors import DataError
from homodistil.evaluation.scoring import Question, Scores, continuation, perplexity, score
from homodistil.evaluation.stock import Precision, check_kind, device, load_stock, positions, stock_tokenizer


def evaluate_lambada(
    model: Path, source: str, rows: int | None = None, micro_batch: int = 32, dtype: Precision = "float32"
) -> Scores:
    """Of the first `rows` passages (all by default) of a .jsonl file with a passage under `text` in each row.

    lambada_accuracy; last_word_log_probability, in nats, the mean over passages of the sum over the word's tokens;
    last_word_perplexity, exp of minus that; examples; cut, how many of them were longer than the model sees, and lost
    their beginning. Raises `DataError` and `ModelError`.
    """
    config = check_kind(model, "causal")
    tokenizer = stock_tokenizer(model, config)
    limit = positions(config, tokenizer)
    passages = list(islice(verbatim(source), rows))
    if not passages:
        raise DataError(f"{source}: no rows in it, expected at least one. Give another --data.path.")
    questions = list(_questions(passages, source, tokenizer))
    shown = sorted((_cut(question, limit) for question in questions), key=lambda question: len(question.ids))
    loaded = load_stock(model, dtype, "causal").to(device())  # type: ignore[arg-type]  # a decorator hides its signature

    log_probability, right = score(loaded, shown, len(shown), micro_batch, "lambada")
    mean = float(log_probability.mean())
    return {
        "lambada_accuracy": float(right.double().mean()),
        "last_word_log_probability": mean,
        "last_word_perplexity": perplexity(-mean),
        "examples": len(questions),
        "cut": sum(limit is not None and len(question.ids) > limit for question in questions),
        "convention": "The last word with the space before it; right if each of its tokens is the likeliest one.",
    }


def _questions(passages: Iterable[str], source: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Question]:
    """Raises `DataError` for a passage that is no more than a word."""
    for number, passage in enumerate(passages, start=1):
        context, space, word = passage.strip().rpartition(" ")
        before, ids = (
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for text in (context, context + space + word)
        )
        if not 0 < len(before) < len(ids):
            raise DataError(
                f"{source}, row {number}: found {passage[:40]!r}, expected a passage that ends with a space and a word."
            )
        yield continuation(ids, len(ids) - len(before))


def _cut(question: Question, limit: int | None) -> Question:
    """The end of a question, as much as the model sees."""
    surplus = 0 if limit is None else max(0, len(question.ids) - limit)
    if surplus > question.positions[0]:
        raise DataError(f"a last word has {len(question.answers)} tokens, but the model has {limit} positions.")
    return Question(question.ids[surplus:], [place - surplus for place in question.positions], question.answers)
