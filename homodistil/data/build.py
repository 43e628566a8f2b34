"""Building shards: documents become ids, ids become packed sequences, sequences are dealt to shards at random.

Tells the story and chooses what is held out. Leaves where text comes from to sources.py, packing to corpus.py and the
layout on disk to shards.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from homodistil.data.corpus import Corpus, PackedSequences
from homodistil.data.hashing import Purpose, counter_hash, permutation
from homodistil.data.shards import SEQUENCES_PER_MEMBER, ShardEntry, ShardIndex, SpecialTokens, write_shard
from homodistil.data.sources import documents
from homodistil.data.tokenizer import open_tokenizer, train_tokenizer, vocabulary_hash
from homodistil.errors import DataError
from homodistil.tasks import LanguageTask

HELD_OUT_SHARE, HELD_OUT_SEQUENCES, LARGEST_HELD_OUT_SHARE = 0.01, 256, 0.1
"""Held-out documents: this share of the tokens, or this many sequences if that is more, within the largest share."""
TOKENIZER_CHARACTERS = 8_000_000
"""Text that a tokenizer is trained on; more changes little and takes longer."""
CHARACTERS_PER_TOKEN = 5
"""English and a trained vocabulary, generously."""


def build_shards(
    source: str | list[str],
    output: Path,
    *,
    task: LanguageTask = "mlm",
    tokenizer: Path | None = None,
    vocab_size: int = 8192,
    sequence_length: int = 128,
    shards: int = 64,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ShardIndex:
    """Write `output`: training shards of equally many sequences, one shard of held-out documents, the tokenizer.

    Args:
        source: one or more of what sources.py reads.
        task: `mlm` for [CLS] text [SEP], with a [SEP] after each document; `clm` for nothing but text, with an
            end-of-text token after each document.
        tokenizer: what `open_tokenizer` reads; None trains one for the task with `vocab_size` pieces on the source.
        sequence_length: T, special tokens included.
        shards: of the training split. Sequences that do not fill them equally, at most shards - 1, are dropped.
        max_tokens: where to stop reading.
        seed: decides what is held out and which sequence goes to which shard.

    The same arguments and text give the same bytes. `output` appears complete or not at all. Raises `DataError`.
    """
    sources = [source] if isinstance(source, str) else source
    with _appearing_whole(output) as folder:
        if tokenizer is None:
            text = tokenizer_text(sources, max_tokens=max_tokens, seed=seed)
            opened = train_tokenizer(text, vocab_size, task=task, progress=progress)
        else:
            opened = open_tokenizer(tokenizer, task)
        scratch = folder / "ids.scratch"
        frame = (opened.cls_token_id, opened.sep_token_id) if task == "mlm" else None
        end = frame[1] if frame else opened.eos_token_id
        corpus = Corpus.encode(documents(sources), opened, scratch, end, max_tokens=max_tokens, progress=progress)
        train, held_out = _split(corpus, frame, sequence_length, seed)
        _check_enough(train, held_out, shards, corpus, ", ".join(sources))
        index = _describe(corpus, opened, task, sequence_length)
        index.splits["train"] = _deal(folder, "train", train, shards, seed, progress)
        index.splits["validation"] = _deal(folder, "validation", held_out, 1, seed, progress)
        opened.save_pretrained(folder / index.tokenizer_name)
        index.save(folder)
        scratch.unlink()
    return index


@contextmanager
def _appearing_whole(output: Path) -> Iterator[Path]:
    """A scratch folder beside `output` that takes its name at the end, or vanishes if anything fails."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"output {output}: exists already. Remove it first, or give another folder.")
    scratch = output.with_name(f".{output.name}.{os.getpid()}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        scratch.replace(output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def tokenizer_text(sources: list[str], *, max_tokens: int | None = None, seed: int = 0) -> list[str]:
    """An even sample of the documents that will be encoded, of at most about TOKENIZER_CHARACTERS.

    Documents below a hash threshold are kept; whenever they grow too many, the threshold halves.
    """
    kept: list[tuple[int, str]] = []
    read = size = 0
    threshold = 2**64
    for number, document in enumerate(documents(sources)):
        drawn = int(counter_hash(Purpose.TOKENIZER_TEXT, seed, number)[0])
        if drawn < threshold:
            kept.append((drawn, document.text))
            size += len(document.text)
        while size > TOKENIZER_CHARACTERS:
            threshold //= 2
            kept = [(key, text) for key, text in kept if key < threshold]
            size = sum(len(text) for _, text in kept)
        read += len(document.text)
        if max_tokens is not None and read > max_tokens * CHARACTERS_PER_TOKEN:
            break
    return [text for _, text in kept]


def _split(
    corpus: Corpus, frame: tuple[int, int] | None, length: int, seed: int
) -> tuple[PackedSequences, PackedSequences]:
    """Training and held-out sequences."""
    held_out = _held_out(corpus.lengths, length, seed)
    return PackedSequences(corpus, ~held_out, length, frame), PackedSequences(corpus, held_out, length, frame)


def _held_out(lengths: NDArray[np.int64], length: int, seed: int) -> NDArray[np.bool_]:
    """(documents,): the documents with the smallest hashes, as many as the held-out share takes, at least one. One that
    alone would take more than the largest share is left to training, unless there is no other."""
    total = int(lengths.sum())
    largest = LARGEST_HELD_OUT_SHARE * total
    wanted = min(max(HELD_OUT_SHARE * total, HELD_OUT_SEQUENCES * length), largest)
    order = permutation(len(lengths), Purpose.HELD_OUT_DOCUMENTS, seed)
    small = order[lengths[order] <= largest]
    order = small if len(small) else order
    before = np.cumsum(lengths[order]) - lengths[order]
    chosen = np.zeros(len(lengths), dtype=np.bool_)
    chosen[order[before < wanted]] = True
    return chosen


def _check_enough(train: PackedSequences, held_out: PackedSequences, shards: int, corpus: Corpus, source: str) -> None:
    """Raise `DataError` unless every shard and the held-out split get a sequence."""
    found = f"source {source}: {len(corpus.lengths)} documents with {len(corpus.ids)} tokens"
    if not len(held_out):
        raise DataError(
            f"{found} leave no held-out sequence, since whole documents are held out. "
            "Give at least two longer documents (a `= Title =` line starts one), or a smaller --sequence_length."
        )
    if len(train) < shards:
        raise DataError(
            f"{found} give {len(train)} training sequences, fewer than --shards {shards}. "
            f"Give more text, at most --shards {max(len(train), 1)}, or a smaller --sequence_length."
        )


def _describe(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, task: LanguageTask, length: int) -> ShardIndex:
    """The index, before any shard is written."""
    return ShardIndex(
        task=task,
        sequence_length=length,
        dtype="uint16" if corpus.ids.dtype == np.uint16 else "uint32",
        vocab_size=len(tokenizer),
        tokenizer_sha256=vocabulary_hash(tokenizer),
        special_tokens=SpecialTokens.of(tokenizer, task),
        documents=len(corpus.lengths),
        tokens=sum(count.tokens for count in corpus.sources.values()),
        sources=corpus.sources,
        splits={},
    )


def _deal(
    folder: Path, split: str, sequences: PackedSequences, shards: int, seed: int, progress: bool
) -> list[ShardEntry]:
    """Write the sequences, in random order, to shards of equal size."""
    order = permutation(len(sequences), Purpose.CORPUS_ORDER, seed)
    size = len(sequences) // shards
    entries = []
    for shard in tqdm(range(shards), desc=f"writing {split}", unit="shard", disable=not progress):
        mine = order[shard * size : (shard + 1) * size]
        members = (mine[start : start + SEQUENCES_PER_MEMBER] for start in range(0, size, SEQUENCES_PER_MEMBER))
        entries.append(write_shard(folder / f"{split}-{shard:05d}.tar", map(sequences.rows, members)))
    return entries
