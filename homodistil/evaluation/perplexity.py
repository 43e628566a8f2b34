"""Perplexity of a causal language model on text, a token, a word and a byte.

A text is one sequence, lines and all, behind one token that begins it; documents of a source with several are
sequences of their own. A window slides over it, and every token of the text is scored once. What is a word is
wikitext.py's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from homodistil.data.sources import verbatim
from homodistil.errors import ConfigError, DataError, ModelError
from homodistil.evaluation.scoring import Question, Scores, continuation, perplexity, score
from homodistil.evaluation.stock import Precision, check_kind, device, load_stock, positions, stock_tokenizer
from homodistil.evaluation.wikitext import TOKENISED, as_typed, count_words

LONGEST_WINDOW = 2048
"""Tokens; what a model with more positions sees by default."""


@dataclass(frozen=True)
class Windows:
    """`length` tokens are seen at a time; the last `stride` of them, or all of the first window, are foretold."""

    length: int
    stride: int

    @classmethod
    def of(cls, limit: int | None, window: int | None, stride: int | None) -> Windows:
        """As asked for; by default as many tokens as a model with `limit` positions sees, and half of them.

        Raises `ConfigError`.
        """
        if limit is None and window is None:
            raise ConfigError(
                "--perplexity.window: not given, and neither config.json nor the tokenizer says how many tokens the "
                "model sees. Give the number, such as 1024."
            )
        length = window or min(limit or LONGEST_WINDOW, LONGEST_WINDOW)
        if limit is not None and length > limit:
            raise ConfigError(f"--perplexity.window {length}: the model has {limit} positions. Give {limit} or less.")
        step = stride or max(1, length // 2)
        if step > length:
            raise ConfigError(f"--perplexity.stride {step}: expected at most the window, {length}. Give less.")
        return cls(length, step)

    def over(self, count: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, scored) of the windows over `count` tokens: of tokens[start:end], the last `scored` are
        foretold, each given those before it from `start` on. All but tokens[0] are foretold, once, and given more than
        length - stride others, or all there are."""
        done = 1
        while done < count:
            end = min(done + (self.length if done == 1 else self.stride), count)
            yield max(0, end - self.length - 1), end, end - done
            done = end


def evaluate_perplexity(
    model: Path,
    source: str,
    window: int | None = None,
    stride: int | None = None,
    detokenize: bool = False,
    micro_batch: int = 4,
    dtype: Precision = "float32",
) -> Scores:
    """Perplexities of the causal model in a directory, on whatever data/sources.py reads, as it stands.

    Negative log-likelihoods are in nats, summed over all tokens of the text, line ends included. Words and bytes are
    the source's own, also where `detokenize` lets the model read WikiText's word-level text as typed: so figures with
    and without it, and of any tokenizer, share a denominator. Raises `ConfigError`, `DataError` and `ModelError`.
    """
    config = check_kind(model, "causal")
    tokenizer = stock_tokenizer(model, config)
    windows = Windows.of(positions(config, tokenizer), window, stride)
    texts = [text for text in verbatim(source) if text.strip()]
    if not texts:
        raise DataError(f"{source}: no text in it, expected at least a word. Give another --data.path.")
    sequences = _sequences(texts, tokenizer, config, detokenize)
    questions = sorted(_questions(sequences, windows), key=lambda question: len(question.ids))
    loaded = load_stock(model, dtype, "causal").to(device())  # type: ignore[arg-type]  # a decorator hides its signature

    started = time.perf_counter()
    log_probability, _ = score(loaded, questions, len(questions), micro_batch, "perplexity")
    nll, seconds = -float(log_probability.sum()), time.perf_counter() - started
    tokens = sum(len(question.answers) for question in questions)
    words, size = sum(map(count_words, texts)), sum(len(text.encode()) for text in texts)
    return {
        "word_perplexity": perplexity(nll / words),
        "token_perplexity": perplexity(nll / tokens),
        "nll_per_token": nll / tokens,
        "bits_per_byte": nll / math.log(2) / size,
        "tokens": tokens,
        "words": words,
        "bytes": size,
        "documents": len(texts),
        "tokens_per_second": tokens / seconds,
        "convention": _convention(windows, detokenize, texts),
    }


def _sequences(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, detokenize: bool
) -> Iterator[list[int]]:
    """Each text's ids, behind one that begins it. Raises `ModelError` for a tokenizer without such a one."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None or begin >= config.vocab_size:
        raise ModelError(
            f"{config._name_or_path}: the tokenizer has neither a bos_token nor an eos_token, expected one to begin a "
            "text with. Name it in tokenizer_config.json."
        )
    for text in texts:
        read = as_typed(text) if detokenize else text
        yield [begin, *tokenizer(read, add_special_tokens=False, verbose=False)["input_ids"]]


def _questions(sequences: Iterator[list[int]], windows: Windows) -> Iterator[Question]:
    for ids in sequences:
        for start, end, scored in windows.over(len(ids)):
            yield continuation(ids[start:end], scored)


def _convention(windows: Windows, detokenize: bool, texts: Sequence[str]) -> str:
    """What must be the same where two figures are compared."""
    typed = "as it stands"
    if detokenize:
        typed = "with WikiText's tokenisation undone"
    elif any(TOKENISED.search(text) for text in texts):
        typed += " (it is tokenised as WikiText is; --perplexity.detokenize undoes that)"
    return (
        f"Text {typed}, line ends included, `<unk>` spelt out. Words are those of the source between white space, and "
        f"`<eos>` for each end of a line. Windows of {windows.length} tokens, stride {windows.stride}, begun by one "
        "token that is not scored; each token is scored once."
    )
