"""Stream: update number -> this rank's share of that global batch, the same for any number of ranks.

K lanes each own a fixed share of the shards in an epoch and supply a fixed share of every batch; rank r of W serves
the lanes congruent to r modulo W. Order and masks are pure functions of (seed, update), so the position is one
integer and resuming reads nothing but the shards it continues in. Leaves the layout on disk to shards.py.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from homodistil.batch import VALIDATION, Attach, Batch, Piece, unchanged
from homodistil.config import DataConfig
from homodistil.data.causal import CausalScorer
from homodistil.data.hashing import Purpose, permutation
from homodistil.data.masking import VALIDATION_MASKS, Masker, training_masks
from homodistil.data.shards import Sequences, ShardIndex, read_shard
from homodistil.data.tokenizer import continuation_pieces
from homodistil.errors import ConfigError, DataError, ShardError
from homodistil.ranks import Ranks

# b global batch, K lanes, W world size, S shards of n sequences, q = S / K shards of a lane, T tokens

logger = logging.getLogger(__name__)

Numbers = NDArray[np.int64]


class Stream:
    """Batches of a folder of shards, masked or with each next token as a label, by what the shards were built for.
    Raises `ConfigError` or `DataError` where the sizes do not divide."""

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        ranks: Ranks,
        bad_shards: Iterable[str] = (),
        mask_seed: int | None = None,
        attach: Attach = unchanged,
    ):
        """bad_shards: those that an earlier process of this run found, so that the same ones are replaced. mask_seed:
        decides the masks, by default `seed`. attach: what the worker does with a batch at last."""
        self.index = ShardIndex.load(config.shards, check_files=config.on_bad_shard == "stop")
        self._config, self._seed, self._ranks = config, seed, ranks
        self._mask_seed, self._attach = seed if mask_seed is None else mask_seed, attach
        self._bad = BadShards(config.on_bad_shard == "replace", bad_shards)
        check_divisions(config, self.index, ranks.world_size)
        self._rows = config.global_batch // config.lanes  # of a lane in an update
        self._lanes = [
            Lane(config.shards, self.index, lane, config.lanes, seed, self._bad)
            for lane in range(ranks.rank, config.lanes, ranks.world_size)
        ]
        self._score = self._scorer()

    def _scorer(self) -> Masker | CausalScorer:
        config, index = self._config, self.index
        if index.task == "clm":
            if config.whole_word:
                raise ConfigError(
                    f"data.whole_word is true, but {config.shards} was built for clm, where nothing is masked. Drop it."
                )
            return CausalScorer(index.special_tokens.pad)
        continues = self._word_continuations() if config.whole_word else None
        return Masker(config.mask_probability, index.vocab_size, index.special_tokens, continues)

    def _word_continuations(self) -> NDArray[np.bool_]:
        return continuation_pieces(self._config.shards / self.index.tokenizer_name, self.index.vocab_size)

    @property
    def updates_per_epoch(self) -> int:
        """Global batches in one pass; what remains of a lane, less than an update's rows, is dropped each epoch."""
        return self.index.sequences("train") // self._config.lanes // self._rows

    def updates(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """(n + 1, this rank's rows of that global batch) for n = start .. stop - 1; all of a rank's rows differ.

        A worker thread keeps `prefetch` updates ready, in pinned memory where there is a GPU; its errors are raised
        on all ranks, here, before anyone computes on that update. Closing the iterator, or leaving its loop, ends
        the worker. Collective.
        """
        ready: deque[Future[Batch]] = deque()
        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stream", initializer=self._use_device)
        try:
            for update in range(start, stop):
                while len(ready) <= self._config.prefetch and update + len(ready) < stop:
                    ready.append(worker.submit(self._batch, update + len(ready)))
                done = ready.popleft()
                self._agree(done.exception())
                yield update + 1, done.result()
        finally:
            worker.shutdown(wait=True, cancel_futures=True)

    @property
    def maskings(self) -> int | None:
        """Of each sequence; None: new ones in every epoch. For causal models, which see all of the text, one."""
        return self._config.maskings or (1 if self.index.task == "clm" else None)

    @property
    def bad_shards(self) -> list[str]:
        """Names of the shards found bad and replaced so far, by any rank."""
        return self._bad.agreed

    def _agree(self, error: BaseException | None) -> None:
        """All ranks know of each one's bad shards, and stop together if any cannot go on. Collective."""
        if error is not None and not isinstance(error, DataError):
            raise error
        if not self._ranks.any(error is not None or self._bad.has_news):
            return
        everyone = self._ranks.gather((str(error) if error else "", self._bad.found))
        faults = dict.fromkeys(words for words, _ in everyone if words)
        if faults:
            raise ShardError("\n".join(faults))
        news = {name: fault for _, found in everyone for name, fault in found.items()}
        for name in news.keys() - set(self._bad.agreed) if self._ranks.is_first else ():
            logger.warning("bad shard replaced by the one read before it: %s", news[name])
        self._bad.agree(news)

    def _use_device(self) -> None:
        """A thread's pinned memory belongs to its current GPU, which starts as the first one."""
        if self._ranks.device.type == "cuda":
            torch.cuda.set_device(self._ranks.device)

    def _batch(self, update: int) -> Batch:
        """This rank's rows of the global batch after `update` completed updates."""
        epoch, position = divmod(update, self.updates_per_epoch)
        shares = [lane.rows(epoch, position * self._rows, self._rows) for lane in self._lanes]
        sequences, samples = (np.concatenate(parts) for parts in zip(*shares, strict=True))
        masking = epoch % self.maskings if self.maskings else epoch
        batch = self._attach(self._masked(sequences, samples, masking))
        return batch.pin_memory() if self._ranks.device.type == "cuda" else batch

    def _masked(self, sequences: Sequences, samples: Numbers, masking: int) -> Batch:
        key = VALIDATION_MASKS if masking == VALIDATION else training_masks(self._mask_seed, masking)
        return replace(self._score(sequences, samples, *key), masking=masking)

    def validation(self, sequences: int, micro_batch: int) -> list[Batch]:
        """This rank's share of the first held-out sequences (all, if there are fewer), with masks that never change.

        Every rank gets equally many batches of equal sizes, since a sharded model's forwards are collective: a short
        share is filled up with rows of weight 0. Sums over ranks of weighted scores are those of one rank. Collective
        where something is attached.
        """
        held_out = self._held_out()[:sequences]
        rank, world_size = self._ranks.rank, self._ranks.world_size
        numbers = rank + world_size * np.arange(-(-len(held_out) // world_size))
        numbers_here = numbers % len(held_out)
        rows = self._masked(held_out[numbers_here], numbers_here, VALIDATION)
        batch = attached(rows, self._attach, self._ranks)
        batch.weights[torch.from_numpy(numbers >= len(held_out))] = 0
        return list(batch.micro_batches(micro_batch))

    def _held_out(self) -> Sequences:
        entries = self.index.splits["validation"]
        return np.concatenate([read_shard(self._config.shards, self.index, entry) for entry in entries])

    def pieces(self, maskings: int, held_out: int) -> list[Piece]:
        """What there is to say of the corpus under so many maskings, and of the first `held_out` sequences."""
        size = self.index.splits["train"][0].sequences
        shards = range(len(self.index.splits["train"]))
        count = min(held_out, self.index.sequences("validation"))
        training = [Piece(m, s, s * size, (s + 1) * size) for m in range(maskings) for s in shards]
        return [Piece(VALIDATION, 0, 0, count), *training]

    def examples(self, piece: Piece, micro_batch: int) -> Iterator[Batch]:
        """A piece's sequences in order of their numbers. Raises `DataError`."""
        if piece.masking == VALIDATION:
            sequences = self._held_out()[: piece.stop]
        else:
            sequences = read_shard(self._config.shards, self.index, self.index.splits["train"][piece.number])
        yield from self._masked(sequences, np.arange(piece.start, piece.stop), piece.masking).micro_batches(micro_batch)


def attached(batch: Batch, attach: Attach, ranks: Ranks) -> Batch:
    """`attach(batch)`, with all ranks stopping at what one of them cannot read. Collective, if anything is attached."""
    return batch if attach is unchanged else ranks.together(lambda: attach(batch))


class Lane:
    """One of K fixed shares of the corpus: which sequences it supplies at a position of an epoch."""

    def __init__(self, folder: Path, index: ShardIndex, lane: int, lanes: int, seed: int, bad: BadShards):
        self._folder, self._index = folder, index
        self._entries = index.splits["train"]
        self._lane, self._lanes, self._seed, self._bad = lane, lanes, seed, bad
        self._open: tuple[tuple[int, int], Sequences, Numbers] | None = None

    def rows(self, epoch: int, start: int, count: int) -> tuple[Sequences, Numbers]:
        """The lane's sequences [start, start + count) of an epoch, (count, T), and their numbers in the corpus."""
        size = self._entries[0].sequences
        pieces = []
        while count:
            ordinal, offset = divmod(start, size)
            sequences, samples = self._shard(epoch, ordinal)
            taken = slice(offset, min(offset + count, size))
            pieces.append((sequences[taken], samples[taken]))
            start, count = start + len(samples[taken]), count - len(samples[taken])
        sequences, samples = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return sequences, samples

    def _shard(self, epoch: int, ordinal: int) -> tuple[Sequences, Numbers]:
        """The lane's `ordinal`-th shard of an epoch in that epoch's order; the last one asked for stays open."""
        if self._open is None or self._open[0] != (epoch, ordinal):
            shard, sequences = self._readable(epoch, ordinal)
            order = permutation(len(sequences), Purpose.SEQUENCE_ORDER, self._seed, epoch, shard)
            self._open = (epoch, ordinal), sequences[order], shard * len(sequences) + order
        return self._open[1], self._open[2]

    def _readable(self, epoch: int, ordinal: int) -> tuple[int, Sequences]:
        """Number and contents of the `ordinal`-th shard; of the nearest good one before it, or else after it, if bad
        shards are replaced. Depends on the epoch and on which shards are bad alone."""
        shards = permutation(len(self._entries), Purpose.SHARD_ORDER, self._seed, epoch)[self._lane :: self._lanes]
        for candidate in (*range(ordinal, -1, -1), *range(ordinal + 1, len(shards))):
            entry = self._entries[shards[candidate]]
            if entry.name not in self._bad:
                try:
                    return int(shards[candidate]), read_shard(self._folder, self._index, entry)
                except DataError as error:
                    self._bad.add(entry.name, error)
        raise DataError(f"{self._folder}: none of the {len(shards)} shards of lane {self._lane} can be read.")


class BadShards:
    """Shards that could not be read: found by this rank's worker thread, then agreed by all ranks."""

    def __init__(self, replaced: bool, agreed: Iterable[str]):
        self._replaced, self.agreed = replaced, sorted(agreed)
        self.found: dict[str, str] = {}
        """Name -> what is wrong."""

    def __contains__(self, name: str) -> bool:
        return name in self.found or name in self.agreed

    def add(self, name: str, error: DataError) -> None:
        """Remember a bad shard. Raises `error` if the run is to stop at one."""
        if not self._replaced:
            raise DataError(f"{error}\nTo go on without such shards: --data.on_bad_shard replace.") from error
        self.found = {**self.found, name: str(error)}  # a new dict: the main thread may be reading the old one

    @property
    def has_news(self) -> bool:
        """Whether this rank knows of a bad shard that not all do."""
        return bool(self.found.keys() - set(self.agreed))

    def agree(self, names: Iterable[str]) -> None:
        """From now on all ranks leave these out."""
        self.agreed = sorted({*self.agreed, *names})


def check_divisions(config: DataConfig, index: ShardIndex, world_size: int) -> None:
    """K divides b, W divides K, K divides S, all shards have n sequences, and a lane has rows for an update."""
    batch, lanes, entries = config.global_batch, config.lanes, index.splits["train"]
    candidates = range(world_size, min(batch, len(entries)) + 1, world_size)
    workable = [k for k in candidates if batch % k == 0 and len(entries) % k == 0]
    instead = f"Lanes that would work here: {', '.join(map(str, workable)) or 'none'}."
    if batch % lanes:
        below, above = batch // lanes * lanes, (batch // lanes + 1) * lanes
        nearest = " or ".join(str(size) for size in (below, above) if size)
        raise ConfigError(
            f"data.lanes = {lanes} does not divide data.global_batch = {batch}. "
            f"Set data.global_batch to {nearest}, or change data.lanes. {instead}"
        )
    if lanes % world_size:
        raise ConfigError(
            f"data.lanes = {lanes} cannot be shared equally by {world_size} ranks. "
            f"Change data.lanes, or start a number of ranks that divides it. {instead}"
        )
    if len(entries) % lanes:
        raise ConfigError(
            f"data.lanes = {lanes} does not divide the {len(entries)} training shards of {config.shards}. "
            f"Change data.lanes, or rebuild with --shards {-(-len(entries) // lanes) * lanes}. {instead}"
        )
    if len({entry.sequences for entry in entries}) > 1:
        raise DataError(f"{config.shards}/index.json: training shards differ in size, expected equal. Rebuild them.")
    if index.sequences("train") < batch:
        raise DataError(
            f"{config.shards}: {index.sequences('train')} training sequences cannot fill one update of "
            f"data.global_batch = {batch}. Lower it, or build shards from more text."
        )
