"""Building shards: text becomes ids, repeated and quoted documents go, the others are packed and dealt at random.

Tells the story and chooses what is held out. Every step is shared out in pieces that depend on the text alone, so any
number of workers writes the same bytes; what was read stays until the end, so a build that was interrupted goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from homodistil.claim import lock
from homodistil.data.choice import Choice, choose
from homodistil.data.corpus import Corpus, PackedSequences, sentence_borders, sentence_starts
from homodistil.data.dealing import deal
from homodistil.data.encoding import dtype_of, request_of
from homodistil.data.evaluation_texts import evaluation_texts
from homodistil.data.fingerprints import Quotable
from homodistil.data.hashing import Purpose, permutation
from homodistil.data.options import Deduplicate, Packing
from homodistil.data.reading import Reading, read_all
from homodistil.data.removals import Removals
from homodistil.data.sampling import tokenizer_text
from homodistil.data.shards import ShardIndex, SourceCount, SpecialTokens, Split
from homodistil.data.sources import Part, parts_of
from homodistil.data.tokenizer import open_tokenizer, train_tokenizer, vocabulary_hash
from homodistil.data.workers import Workers, open_workers
from homodistil.errors import DataError
from homodistil.hardware import cores
from homodistil.tasks import LanguageTask

# N documents

HELD_OUT_SHARE, HELD_OUT_SEQUENCES, LARGEST_HELD_OUT_SHARE = 0.01, 256, 0.1
"""Held-out documents: this share of the tokens, or this many sequences if that is more, within the largest share."""
BYTES_OF_A_WORKER = 4_000_000
"""Text below which another process takes longer to start than to read it."""


def build_shards(
    source: str | list[str],
    output: Path,
    *,
    task: LanguageTask = "mlm",
    tokenizer: Path | None = None,
    vocab_size: int = 8192,
    sequence_length: Sequence[int] = (128,),
    packing: Packing = "documents",
    shards: int = 64,
    deduplicate: Deduplicate = "near",
    decontaminate: Sequence[Path] = (),
    max_tokens: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    mpi: bool = False,
    progress: bool = True,
) -> tuple[list[ShardIndex], Removals]:
    """Write `output`: training shards of equally many sequences, one shard of held-out documents, the tokenizer, and
    what was removed. Returns the index of every length, and the removals.

    Args:
        source: one or more of what sources.py reads.
        task: `mlm` for [CLS] text [SEP], with a [SEP] after each document; `clm` for nothing but text, with an
            end-of-text token after each document.
        tokenizer: what `open_tokenizer` reads; None trains one for the task with `vocab_size` pieces on the source.
        sequence_length: T, special tokens included; of several, each gets a folder of its own in `output`.
        packing: whether a sequence starts where the one before ended, or with a sentence (corpus.py).
        shards: of the training split. Sequences that do not fill them equally, at most shards - 1, are dropped.
        deduplicate, decontaminate: which documents go (choice.py); files of texts that models are judged by.
        max_tokens: where to stop reading.
        seed: decides what is held out and which sequence goes to which shard.
        workers: processes; None for one a core, where there is enough to do.
        mpi: whether, below mpirun, its processes are the workers instead: then all of them must call this.

    The same arguments and text give the same bytes. `output` appears complete or not at all. Raises `DataError`.
    """
    sources = [source] if isinstance(source, str) else source
    lengths = list(dict.fromkeys(sequence_length))
    _refuse_existing(output)
    parts = parts_of(sources)
    given = tokenizer and open_tokenizer(tokenizer, task)
    with open_workers(workers or _useful_workers(parts), mpi) as pool, _building(output) as folder:
        opened = given or _trained(folder, parts, pool, task, vocab_size, max_tokens, seed, progress)
        end = opened.sep_token_id if task == "mlm" else opened.eos_token_id
        quotable = Quotable.of(evaluation_texts(decontaminate), pool)
        request = request_of(folder / "parts", opened, end, quotable, deduplicate == "near", max_tokens)
        requests = [replace(request, part=part) for part in parts]
        reading = read_all(requests, pool, dtype_of(len(opened)), progress)
        choice = choose(reading.found, deduplicate)
        corpora = _split(folder / "corpus", reading, choice, max(lengths), seed)
        removals = Removals.of(reading, choice, opened, quotable.texts)
        indices = []
        for length in lengths:
            target = folder / "output" / (str(length) if len(lengths) > 1 else ".")
            packed = {name: _pack(corpus, length, packing, opened, task, end) for name, corpus in corpora.items()}
            _check_enough(packed, shards, removals, folder)
            index = _description(opened, task, length, removals)
            target.mkdir(parents=True)
            index.splits["train"] = deal(target, "train", packed["train"], shards, seed, pool, progress)
            index.splits["validation"] = deal(target, "validation", packed["validation"], 1, seed, pool, progress)
            opened.save_pretrained(target / index.tokenizer_name)
            index.save(target)
            indices.append(index)
        removals.save(folder / "output")
        (folder / "output").replace(output)
    return indices, removals


def _refuse_existing(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"output {output}: exists already. Remove it first, or give another folder.")


def _useful_workers(parts: list[Part]) -> int:
    """One a core, if there is enough for each to do."""
    size = sum(part.version[0] if part.version else BYTES_OF_A_WORKER for part in parts)
    return min(cores(), len(parts), -(-size // BYTES_OF_A_WORKER)) or 1


@contextmanager
def _building(output: Path) -> Iterator[Path]:
    """A scratch folder beside `output`, this process's alone, which goes when the work is done and stays when it is
    interrupted: then the same command goes on from what was read. Raises `DataError`, also for what cannot be written
    there."""
    scratch = output.with_name(f".{output.name}.partial")
    with lock(scratch, "output", DataError):
        try:
            _refuse_existing(output)  # whoever had the lock may have made it
        except DataError:
            shutil.rmtree(scratch)
            raise
        try:
            shutil.rmtree(scratch / "output", ignore_errors=True)
            (scratch / "corpus").mkdir(exist_ok=True)
            (scratch / "parts").mkdir(exist_ok=True)
            yield scratch
            shutil.rmtree(scratch)
        except OSError as fault:
            raise DataError(
                f"{fault.filename or scratch}: cannot be written or read ({fault.strerror or fault}). Make room for "
                f"--output {output}, or give another folder; the same command goes on from what was read."
            ) from fault


def _trained(
    folder: Path,
    parts: list[Part],
    workers: Workers,
    task: LanguageTask,
    vocab_size: int,
    max_tokens: int | None,
    seed: int,
    progress: bool,
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the text, or the one that an interrupted build trained on it."""
    decisive = [*parts, task, vocab_size, max_tokens, seed]
    path = folder / f"tokenizer-{hashlib.sha256(json.dumps(decisive, default=str).encode()).hexdigest()[:16]}"
    if not path.exists():
        text = tokenizer_text(parts, workers, max_tokens=max_tokens, seed=seed)
        if not text:
            raise DataError(f"source {', '.join(part.name for part in parts)}: 0 documents. Give text.")
        trained = train_tokenizer(text, vocab_size, task=task, progress=progress)
        trained.save_pretrained(folder / "tokenizer.partial")
        (folder / "tokenizer.partial").replace(path)
    return open_tokenizer(path, task)


def _split(folder: Path, reading: Reading, choice: Choice, longest: int, seed: int) -> dict[Split, Corpus]:
    """Training and held-out documents, of those that stay."""
    held_out = np.zeros_like(choice.kept)
    held_out[choice.kept] = _held_out(reading.found.lengths[choice.kept], longest, seed)
    chosen: dict[Split, NDArray[np.bool_]] = {"train": choice.kept & ~held_out, "validation": held_out}
    return {
        name: Corpus.join(folder / f"{name}.ids", reading.ids(which), reading.dtype) for name, which in chosen.items()
    }


def _held_out(lengths: NDArray[np.int64], length: int, seed: int) -> NDArray[np.bool_]:
    """(N,): the documents with the smallest hashes, as many as the held-out share takes, at least one. One that alone
    would take more than the largest share is left to training, unless there is no other."""
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


def _pack(
    corpus: Corpus, length: int, packing: Packing, tokenizer: PreTrainedTokenizerFast, task: LanguageTask, end: int
) -> PackedSequences:
    frame = (tokenizer.cls_token_id, tokenizer.sep_token_id) if task == "mlm" else None
    packed = PackedSequences(corpus, length, frame)
    if packing == "documents":
        return packed
    starts = corpus.path.with_suffix(".starts.npy")
    np.save(starts, sentence_starts(sentence_borders(corpus.ids, tokenizer, end), corpus.size, packed.body))
    return replace(packed, starts=starts)


def _check_enough(packed: dict[Split, PackedSequences], shards: int, removals: Removals, scratch: Path) -> None:
    """Raise `DataError` unless every shard and the held-out split get a sequence."""
    kept = sum(source.kept for source in removals.sources.values())
    tokens = sum(source.kept_tokens for source in removals.sources.values())
    found = f"source {', '.join(removals.sources)}: {kept} documents with {tokens} tokens"
    removed = f" ({len(removals.removed)} were removed)" if removals.removed else ""
    again = f"What was read is kept in {scratch} for the next try."
    if not len(packed["validation"]):
        raise DataError(
            f"{found}{removed} leave no held-out sequence, since whole documents are held out. Give at least two "
            f"longer documents (a `= Title =` line starts one), or a smaller --sequence_length. {again}"
        )
    if len(packed["train"]) < shards:
        raise DataError(
            f"{found}{removed} give {len(packed['train'])} training sequences, fewer than --shards {shards}. Give more "
            f"text, at most --shards {max(len(packed['train']), 1)}, or a smaller --sequence_length. {again}"
        )


def _description(tokenizer: PreTrainedTokenizerFast, task: LanguageTask, length: int, removals: Removals) -> ShardIndex:
    """The index, before any shard is written."""
    kept = {name: SourceCount(documents=s.kept, tokens=s.kept_tokens) for name, s in removals.sources.items() if s.read}
    return ShardIndex(
        task=task,
        sequence_length=length,
        dtype="uint16" if dtype_of(len(tokenizer)).itemsize == 2 else "uint32",
        vocab_size=len(tokenizer),
        tokenizer_sha256=vocabulary_hash(tokenizer),
        special_tokens=SpecialTokens.of(tokenizer, task),
        documents=sum(count.documents for count in kept.values()),
        tokens=sum(count.tokens for count in kept.values()),
        sources=kept,
        splits={},
    )
