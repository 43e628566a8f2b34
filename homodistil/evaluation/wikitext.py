"""WikiText's conventions: what counts as a word, and how its word-level files were tokenised.

Word-level files (WikiText-2 and -103 as of Merity et al. 2016) set off every word and mark by spaces, write `@-@` for a
hyphen within a word, and `<unk>` for a rare word.
"""

from __future__ import annotations

import re

TOKENISED = re.compile(r" @[-,.]@ ")
"""Stands in WikiText's word-level files alone."""

RULES = (
    (r"(?m)^ +| +$", r""),
    (r"(?<==) (?==)", r""),
    (r" @([-,.])@ ", r"\1"),
    (r'(?m)" ([^"\n]*?) "', r'"\1"'),
    (r" '(s|t|d|m|re|ve|ll)\b", r"'\1"),
    (r"s ' ", r"s' "),
    (r"([(\[$£]) ", r"\1"),
    (r" (?=[.,;:!?%)\]])", r""),
)
"""(pattern, replacement), in this order: line ends, headings, @-@, quotations, contractions, possessives, brackets and
currencies, marks that follow a word."""


def count_words(text: str) -> int:
    """Tokens between white space, and one, `<eos>`, for the end of each line, empty ones included.

    This makes 217,646 of WikiText-2's validation file, the number that its perplexities are stated for.
    """
    return len(text.split()) + text.count("\n")


def as_typed(text: str) -> str:
    """A word-level file as its authors may have typed it; lines stay lines, and `<unk>` stays."""
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text)
    return text
