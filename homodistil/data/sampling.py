"""Sampling text for a tokenizer: an even share of the documents that will be read, whoever reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from homodistil.data.hashing import Purpose, counter_hash
from homodistil.data.sources import Part, read
from homodistil.data.workers import Workers

TOKENIZER_CHARACTERS = 8_000_000
"""Text that a tokenizer is trained on; more changes little and takes longer."""
CHARACTERS_PER_TOKEN = 5
"""English and a trained vocabulary, generously."""


class Drawn(NamedTuple):
    """A document and its lot."""

    draw: int
    """Of 64 bits."""
    before: int
    """Characters before it, in its part or, later, in all."""
    text: str


@dataclass
class Sample:
    """Documents below a threshold of their draws; whenever they grow too many, the threshold halves.

    So the samples of parts, put together, are the sample of the whole.
    """

    size: int
    """Characters, at most."""
    read: int = 0
    """Characters of all documents."""
    threshold: int = 2**64
    kept: list[Drawn] = field(default_factory=list)
    characters: int = 0
    """Of those that are kept."""

    def add(self, document: Drawn) -> None:
        if document.draw < self.threshold:
            self.kept.append(document)
            self.characters += len(document.text)
        while self.characters > self.size:
            self.lower(self.threshold // 2)

    def lower(self, threshold: int) -> None:
        """Keep what lies below this one as well."""
        if threshold < self.threshold:
            self.threshold = threshold
            self.kept = [kept for kept in self.kept if kept.draw < threshold]
            self.characters = sum(len(kept.text) for kept in self.kept)


class Wanted(NamedTuple):
    """What is asked of whoever samples a part."""

    number: int
    part: Part
    seed: int
    size: int
    enough: float
    """Characters."""


def sample_part(wanted: Wanted) -> Sample:
    """An even sample of a part's documents, as far as it is read."""
    sample = Sample(wanted.size)
    for number, document in enumerate(read(wanted.part)):
        if sample.read > wanted.enough:
            break
        draw = int(counter_hash(Purpose.TOKENIZER_TEXT, wanted.seed, wanted.number, number)[0])
        sample.add(Drawn(draw, sample.read, document.text))
        sample.read += len(document.text)
    return sample


def tokenizer_text(parts: list[Part], workers: Workers, *, max_tokens: int | None = None, seed: int = 0) -> list[str]:
    """Of the documents that will be encoded, of at most about TOKENIZER_CHARACTERS; the same for any workers."""
    enough = float("inf") if max_tokens is None else max_tokens * CHARACTERS_PER_TOKEN
    whole = Sample(TOKENIZER_CHARACTERS)
    wanted = (Wanted(number, part, seed, TOKENIZER_CHARACTERS, enough) for number, part in enumerate(parts))
    for sample in workers.results(sample_part, wanted):
        whole.lower(sample.threshold)
        for document in sample.kept:
            if (before := whole.read + document.before) <= enough:
                whole.add(document._replace(before=before))
        whole.read += sample.read
        if whole.read > enough:
            break
    return [document.text for document in whole.kept if document.text]
