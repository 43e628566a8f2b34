"""TaskData and TaskStream: a benchmark's examples as a run knows them, and as an exact stream of batches.

Epoch e is a permutation of the training examples that depends on (seed, e) alone; grouped by length, on the size of
the global batch as well. The stream is the endless concatenation of epochs and an update reads the next `global_batch`
of it, so none is left out or comes twice in an epoch, the position is one integer, and the global batch is the same for
any number of ranks. What an example is, is glue.py's and squad.py's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from homodistil.batch import VALIDATION, Attach, Batch, Piece, unchanged
from homodistil.config import DataConfig, TaskConfig
from homodistil.data.encoded import Encoded, Integers, encode, gather, has_types
from homodistil.data.glue import Example, Split, check_files, read_glue
from homodistil.data.hashing import Purpose, permutation
from homodistil.data.squad import Windows, read_squad, windows
from homodistil.data.stream import attached
from homodistil.data.tokenizer import open_tokenizer, vocabulary_hash
from homodistil.ds_config import micro_batch_size
from homodistil.errors import DataError
from homodistil.ranks import Ranks
from homodistil.tasks import Task

# N examples, B rows of a batch

T = TypeVar("T")

PIECE = 4096
"""Examples of a cache's file."""
SORTED_TOGETHER = 64
"""Global batches out of which those of nearly equal lengths are made."""
TRAIN_AND_VALIDATION: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class TaskData:
    """What a run must know of a benchmark's examples. Made by `open`."""

    task: Task
    splits: dict[Split, Encoded]
    windows: Windows | None
    """Of SQuAD's validation split: what answers are read off."""
    tokenizer: Path
    tokenizer_sha256: str
    """Of the vocabulary's pieces in id order."""
    vocab_size: int
    pad_token_id: int
    sep_token_id: int | None
    sequence_length: int
    """Tokens of an example at most."""

    @classmethod
    def open(cls, config: TaskConfig, tokenizer: Path, splits: Sequence[Split] = TRAIN_AND_VALIDATION) -> TaskData:
        """Read and tokenize these splits of the task. Raises `DataError` for files and tokenizer, `ConfigError` for
        windows without room."""
        if config.path is not None and set(TRAIN_AND_VALIDATION) <= set(splits):
            _check_files(config.task, config.path)
        opened = open_tokenizer(tokenizer)
        encoded: dict[Split, Encoded] = {}
        answered = None
        for split in splits:
            if config.task.kind == "span":
                found = _windows(opened, config, split)
                encoded[split] = found.encoded
                answered = found if split == "validation" else answered
            else:
                encoded[split] = _encoded(opened, config, split)
        return cls(
            task=config.task,
            splits=encoded,
            windows=answered,
            tokenizer=tokenizer,
            tokenizer_sha256=vocabulary_hash(opened),
            vocab_size=len(opened),
            pad_token_id=_padding(opened, tokenizer),
            sep_token_id=opened.sep_token_id,
            sequence_length=config.max_length,
        )

    @property
    def sha256(self) -> str:
        """Of the tokenized examples and their labels, split by split."""
        digests = [f"{split} {encoded.digest()}\n" for split, encoded in self.splits.items()]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def mean_length(self) -> float:
        """Tokens of an example of the first split, padding left out."""
        return float(next(iter(self.splits.values())).lengths.mean())

    def count(self, split: Split) -> int:
        """Examples of a split; of SQuAD, windows."""
        return len(self.splits[split])

    def batch(self, split: Split, numbers: Integers, width: int | None = None, last_token: bool = False) -> Batch:
        """The examples of these numbers, padded to the longest of them, or to `width`."""
        encoded = self.splits[split]
        width = encoded.width(numbers, self.sequence_length) if width is None else width
        return encoded.batch(numbers, width, self.pad_token_id, last_token)


def _check_files(task: Task, path: Path) -> None:
    """What a run reads is there, at its end too, and what it is measured on is not what it trains on."""
    if task.kind != "span":
        check_files(task, path)
    elif path.is_file():
        raise DataError(
            f"task.path {path}: one file, which the run would train on and be measured on. Give a folder with "
            f"{task.name}'s train*.json and dev*.json."
        )


def updates_for(epochs: float, examples: int, global_batch: int) -> int:
    """Updates after which every example was seen `epochs` times: the last one may read on into the next epoch."""
    return math.ceil(Fraction(str(epochs)) * examples / global_batch)


class TaskStream:
    """Batches of a benchmark's examples; what data/stream.py's `Stream` is for shards, with the same methods."""

    def __init__(
        self,
        data: TaskData,
        config: DataConfig,
        seed: int,
        ranks: Ranks,
        last_token: bool = False,
        attach: Attach = unchanged,
        group_by_length: bool = False,
    ):
        """last_token: the scored slot is an example's last token, for causal models. attach: what is done with a batch
        at last. group_by_length: a global batch has examples of nearly equal lengths. Raises `ConfigError` for a global
        batch that the ranks cannot share."""
        micro_batch_size(config.global_batch, config.micro_batch, ranks.world_size)  # refuses what does not divide
        self._data, self._seed, self._ranks, self._last_token = data, seed, ranks, last_token
        self._global_batch, self._attach, self._group_by_length = config.global_batch, attach, group_by_length
        self._order = lru_cache(maxsize=2)(self._epoch)  # a batch seldom touches more

    @property
    def bad_shards(self) -> list[str]:
        """There are no shards here."""
        return []

    def updates(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """(n + 1, this rank's rows of that global batch) for n = start .. stop - 1.

        All ranks' rows have the width that the longest of the global batch needs. Collective where something is
        attached.
        """
        for update in range(start, stop):
            numbers = self._numbers(update)
            width = self._data.splits["train"].width(numbers, self._data.sequence_length)
            rows = numbers[self._ranks.rank :: self._ranks.world_size]
            batch = self._data.batch("train", rows, width, self._last_token)
            yield update + 1, self._pinned(attached(batch, self._attach, self._ranks))

    def validation(self, sequences: int, micro_batch: int) -> list[Batch]:
        """This rank's share of `sequences` validation examples (all, if there are fewer), drawn once for all runs.

        They come sorted by length, and each batch is as wide as its longest, so that little of it is padding. Every
        rank gets equally many batches of equally many rows: a short share is filled up with rows of weight 0.
        Collective where something is attached.
        """
        encoded, world_size = self._data.splits["validation"], self._ranks.world_size
        drawn = np.sort(permutation(len(encoded), Purpose.VALIDATION_EXAMPLES)[:sequences])
        drawn = drawn[np.argsort(-encoded.lengths[drawn], kind="stable")]
        places = self._ranks.rank + world_size * np.arange(-(-len(drawn) // world_size))
        batches = []
        for start in range(0, len(places), micro_batch):
            part = places[start : start + micro_batch]
            batch = attached(self._held_out(drawn[part % len(drawn)]), self._attach, self._ranks)
            batch.weights[part >= len(drawn)] = 0
            batches.append(batch)
        return batches

    def _held_out(self, numbers: Integers) -> Batch:
        return replace(self._data.batch("validation", numbers, last_token=self._last_token), masking=VALIDATION)

    def pieces(self, maskings: int, held_out: int) -> list[Piece]:
        """All there is to say of the examples: of the validation split too, and nothing is masked."""
        splits: list[tuple[int, Split]] = [(VALIDATION, "validation"), (0, "train")]
        starts = {masking: range(0, self._data.count(split), PIECE) for masking, split in splits}
        return [
            Piece(masking, number, start, min(start + PIECE, self._data.count(split)))
            for masking, split in splits
            for number, start in enumerate(starts[masking])
        ]

    def examples(self, piece: Piece, micro_batch: int) -> Iterator[Batch]:
        """A piece's examples in order of their numbers, each micro-batch as wide as its longest."""
        for start in range(piece.start, piece.stop, micro_batch):
            numbers = np.arange(start, min(start + micro_batch, piece.stop))
            if piece.masking == VALIDATION:
                yield self._held_out(numbers)
            else:
                yield self._data.batch("train", numbers, last_token=self._last_token)

    def _numbers(self, update: int) -> Integers:
        """(global batch,): the examples of the update after `update` completed ones."""
        size = self._data.count("train")
        position, stop, parts = update * self._global_batch, (update + 1) * self._global_batch, []
        while position < stop:
            epoch, offset = divmod(position, size)
            parts.append(self._order(epoch)[offset : offset + stop - position])
            position += len(parts[-1])
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> Integers:
        order = permutation(self._data.count("train"), Purpose.EXAMPLE_ORDER, self._seed, epoch)
        return self._grouped(order, epoch) if self._group_by_length else order

    def _grouped(self, order: Integers, epoch: int) -> Integers:
        """The same examples: out of every 64 batches' as many batches of nearly equal lengths, and all of these in a
        drawn order. The batches that an epoch shares with its neighbours stay at its ends."""
        size, lengths = self._global_batch, self._data.splits["train"].lengths
        windows = np.split(order, range(size * SORTED_TOGETHER, len(order), size * SORTED_TOGETHER))
        sorted_in_windows = np.concatenate([w[np.argsort(-lengths[w], kind="stable")] for w in windows])
        begun = -epoch * len(order) % size  # rows of a batch that the epoch before began
        first, *batches = np.split(sorted_in_windows, range(begun, len(order), size))
        rest = batches.pop() if batches and len(batches[-1]) < size else order[:0]
        drawn = permutation(len(batches), Purpose.BATCH_ORDER, self._seed, epoch)
        return np.concatenate([first, *(batches[number] for number in drawn), rest])

    def _pinned(self, batch: Batch) -> Batch:
        return batch.pin_memory() if self._ranks.device.type == "cuda" else batch


def _windows(tokenizer: Any, config: TaskConfig, split: Split) -> Windows:
    questions = _kept(read_squad(config.task, config.path, split), config, split)
    return windows(tokenizer, questions, config.max_length, config.stride)


def _encoded(tokenizer: Any, config: TaskConfig, split: Split) -> Encoded:
    examples = _kept(read_glue(config.task, config.path, split), config, split)
    texts = [[example.text for example in examples]]
    if examples[0].pair is not None:
        texts.append([example.pair or "" for example in examples])
    encodings = encode(tokenizer, *texts, truncation=True, max_length=config.max_length)
    dtype = np.float32 if config.task.kind == "regression" else np.int64
    return gather(_with_tokens(encodings, examples), dtype, has_types(tokenizer))


def _with_tokens(encodings: Iterator[tuple[int, Any]], examples: list[Example]) -> Iterator[tuple[Any, list[float]]]:
    for number, encoding in encodings:
        example = examples[number]
        if not encoding.ids:
            raise DataError(f"example {example.number}: '{example.text}' has no tokens, and the tokenizer adds none.")
        yield encoding, [example.label]


def _kept(examples: list[T], config: TaskConfig, split: Split) -> list[T]:
    """A fixed part of the training examples, in order; all of another split."""
    if split != "train" or config.train_examples is None:
        return examples
    drawn = permutation(len(examples), Purpose.TRAINING_EXAMPLES)[: config.train_examples]
    return [examples[n] for n in np.sort(drawn)]


def _padding(tokenizer: Any, path: Path) -> int:
    """Id of padding; GPT-2's tokenizer has none, and its end of text serves as well behind a mask."""
    for number in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if number is not None:
            return int(number)
    raise DataError(f"tokenizer {path}: has neither a pad_token nor an eos_token to fill rows with. Add a pad_token.")
