"""Encoder: documents to ids, as their tokenizer gives them, in less time where text is plain.

Of BERT's tokenizers, a quarter of the time goes into normalising, which to ASCII does nothing but make it small: lines
of ASCII are made small here and go to a copy without a normalizer. Ids are the same, since words end with a line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from homodistil.data.tokenizer import open_tokenizer


class Encoder:
    """Of the tokenizer at `path`; a special token's name in a text is text."""

    def __init__(self, path: Path) -> None:
        tokenizer = open_tokenizer(path)
        self.size = len(tokenizer)
        self._any, self._plain = _opened(path), _opened(path)
        normalizer = self._any.normalizer
        splits = isinstance(self._any.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        self._has_plain = isinstance(normalizer, normalizers.BertNormalizer) and splits
        self._lowercase = self._has_plain and normalizer.lowercase
        if self._has_plain:
            self._plain.normalizer = normalizers.Sequence([])

    def ids(
        self, texts: Sequence[str], end: int, dtype: np.dtype[np.unsignedinteger]
    ) -> list[NDArray[np.unsignedinteger]]:
        """Of each text, with `end` behind them."""
        if not self._has_plain:
            return [_array([ids], end, dtype) for ids in _encoded(self._any, texts)]
        runs = [(number, plain, run) for number, text in enumerate(texts) for plain, run in _runs(text)]
        plain = _encoded(
            self._plain, [run.lower() if self._lowercase else run for _, is_plain, run in runs if is_plain]
        )
        other = _encoded(self._any, [run for _, is_plain, run in runs if not is_plain])
        parts: list[list[list[int]]] = [[] for _ in texts]
        for number, is_plain, _ in runs:
            parts[number].append(next(plain if is_plain else other))
        return [_array(part, end, dtype) for part in parts]


def _opened(path: Path) -> Tokenizer:
    backend = open_tokenizer(path).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()  # a tokenizer may have been saved with both
    backend.encode_special_tokens = True  # who writes about [PAD] does not mean the token
    return backend


def _runs(text: str) -> Iterator[tuple[bool, str]]:
    """Whether they are ASCII, and lines one after another that are or are not."""
    if text.isascii():
        yield True, text
    else:
        yield from ((plain, "\n".join(lines)) for plain, lines in groupby(text.split("\n"), str.isascii))


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    return (encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))


def _array(parts: list[list[int]], end: int, dtype: np.dtype[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    return np.concatenate([*(np.array(part, dtype=dtype) for part in parts), np.array([end], dtype=dtype)])
