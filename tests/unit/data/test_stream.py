"""The stream's batches: the same for any number of ranks, from any start, each sequence once an epoch."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from homodistil.batch import Batch
from homodistil.data.shards import ShardIndex, read_shard
from homodistil.errors import ConfigError, DataError
from tests.unit.data.corpora import SEQUENCE_LENGTH, stream


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def rows_of(batch: Batch) -> list[tuple[bytes, ...]]:
    """Every row as a hashable value, all its tensors included."""
    return [tuple(tensor[row].numpy().tobytes() for tensor in tensors(batch).values()) for row in range(len(batch))]


def assert_equal(one: Batch, other: Batch) -> None:
    for name, tensor in tensors(one).items():
        assert torch.equal(tensor, getattr(other, name)), name
    assert one.padded == other.padded


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_batches_together_are_the_same_set_for_any_world_size(shards: Path, world_size: int) -> None:
    stop = 2 * stream(shards).updates_per_epoch + 3
    alone = [sorted(rows_of(batch)) for _, batch in stream(shards).updates(0, stop)]
    shared: list[list[tuple[bytes, ...]]] = [[] for _ in range(stop)]
    for rank in range(world_size):
        for update, batch in stream(shards, rank, world_size).updates(0, stop):
            assert len(batch) == 24 // world_size
            shared[update - 1] += rows_of(batch)
    assert [sorted(rows) for rows in shared] == alone


def test_no_shard_is_read_by_two_ranks_in_an_epoch(shards: Path) -> None:
    per_epoch = stream(shards).updates_per_epoch
    size = ShardIndex.load(shards).splits["train"][0].sequences
    for epoch in range(3):
        seen = [
            {
                sample // size
                for _, batch in stream(shards, rank, 2).updates(epoch * per_epoch, (epoch + 1) * per_epoch)
                for sample in batch.samples.tolist()
            }
            for rank in range(2)
        ]
        assert not seen[0] & seen[1]


@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize("epochs", [0.1, 0.5, 1.0, 2.2])
def test_resuming_at_any_update_continues_the_uninterrupted_run(shards: Path, epochs: float, lanes: int) -> None:
    start = int(epochs * stream(shards, lanes=lanes).updates_per_epoch)
    whole = list(stream(shards, 1, 2, lanes=lanes).updates(0, start + 5))
    resumed = list(stream(shards, 1, 2, lanes=lanes).updates(start, start + 5))
    assert [update for update, _ in resumed] == list(range(start + 1, start + 6))
    for (_, expected), (_, found) in zip(whole[start:], resumed, strict=True):
        assert_equal(expected, found)


def test_resuming_opens_only_the_shards_it_continues_in(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def counting(folder: Path, index: ShardIndex, entry: object) -> np.ndarray:
        opened.append(entry.name)  # type: ignore[attr-defined]
        return read_shard(folder, index, entry)  # type: ignore[arg-type]

    monkeypatch.setattr("homodistil.data.stream.read_shard", counting)
    list(stream(shards).updates(10**9, 10**9 + 1))
    assert len(opened) <= 2 * 4  # one shard a lane, or two where a batch straddles


def test_each_sequence_comes_at_most_once_an_epoch_and_less_than_a_batch_is_left_out(shards: Path) -> None:
    one = stream(shards)
    total = one.index.sequences("train")
    for epoch in range(2):
        updates = one.updates(epoch * one.updates_per_epoch, (epoch + 1) * one.updates_per_epoch)
        samples = torch.cat([batch.samples for _, batch in updates]).tolist()
        assert len(set(samples)) == len(samples)
        assert set(samples) <= set(range(total))
        assert total - len(samples) < 24


def test_a_batch_holds_the_text_of_the_samples_it_names(shards: Path) -> None:
    index = ShardIndex.load(shards)
    corpus = np.concatenate([read_shard(shards, index, entry) for entry in index.splits["train"]])
    for _, batch in stream(shards).updates(0, 5):
        unmasked = batch.input_ids.clone()
        scored = batch.weights > 0
        rows = torch.arange(len(batch))[:, None].expand_as(scored)
        unmasked[rows[scored], batch.scored_positions[scored]] = batch.labels[scored]
        assert (unmasked.numpy() == corpus[batch.samples]).all()


def test_a_sequences_mask_in_an_epoch_does_not_depend_on_the_batch_size(shards: Path) -> None:
    def rows(global_batch: int) -> dict[int, tuple[bytes, ...]]:
        one = stream(shards, global_batch=global_batch)
        updates = one.updates(0, one.updates_per_epoch)
        return {int(b.samples[i]): row for _, b in updates for i, row in enumerate(rows_of(b))}

    small, large = rows(24), rows(72)
    assert len(small.keys() & large.keys()) > 0.7 * len(small)
    assert all(small[sample] == large[sample] for sample in small.keys() & large.keys())


def test_epochs_and_seeds_differ_in_order_and_in_masks(shards: Path) -> None:
    def first_epoch(seed: int, epoch: int) -> tuple[list[int], dict[int, bytes]]:
        one = stream(shards, seed=seed)
        batches = [b for _, b in one.updates(epoch * one.updates_per_epoch, (epoch + 1) * one.updates_per_epoch)]
        masks = {
            int(sample): positions.numpy().tobytes()
            for b in batches
            for sample, positions in zip(b.samples, b.scored_positions, strict=True)
        }
        return [int(sample) for b in batches for sample in b.samples], masks

    order, masks = first_epoch(0, 0)
    for other_order, other_masks in (first_epoch(0, 1), first_epoch(1, 0)):
        assert order != other_order
        common = masks.keys() & other_masks.keys()
        assert sum(masks[sample] == other_masks[sample] for sample in common) < len(common) / 4


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_validation_sums_are_equal_for_any_world_size(shards: Path, world_size: int) -> None:
    def score(batches: list[Batch]) -> float:
        """Any function of scored slots, in integers so that sums are exact."""
        return sum(float((b.weights * b.labels * (b.samples[:, None] + b.scored_positions)).sum()) for b in batches)

    alone = stream(shards).validation(21, 4)
    validating = [stream(shards, rank, world_size, lanes=8).validation(21, 4) for rank in range(world_size)]
    assert sum(map(score, validating)) == score(alone) > 0
    assert len({tuple(map(len, batches)) for batches in validating}) == 1
    assert sum(float(b.weights.sum()) for batches in validating for b in batches) == sum(
        float(b.weights.sum()) for b in alone
    )


def test_validation_is_the_same_whatever_the_seed(shards: Path) -> None:
    for one, other in zip(
        stream(shards, seed=1).validation(10, 4), stream(shards, seed=2).validation(10, 4), strict=True
    ):
        assert_equal(one, other)


def test_validation_has_no_more_sequences_than_there_are(shards: Path) -> None:
    batches = stream(shards).validation(10**6, 8)
    assert sum(map(len, batches)) == ShardIndex.load(shards).sequences("validation")


def test_leaving_the_loop_ends_the_worker(shards: Path) -> None:
    def workers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("stream")]

    updates = stream(shards).updates(0, 10**6)
    assert len(list(islice(updates, 3))) == 3
    assert workers()
    updates.close()
    assert not workers()


def test_an_error_of_the_worker_is_raised_at_the_consumer(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object) -> None:
        raise DataError("train-00003.tar: cannot be read")

    monkeypatch.setattr("homodistil.data.stream.read_shard", damaged)
    with pytest.raises(DataError, match="train-00003"):
        next(stream(shards).updates(0, 5))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"global_batch": 26}, ["data.lanes = 4", "data.global_batch = 26", "24 or 28", "would work here: 1, 2"]),
        ({"lanes": 3}, ["data.lanes = 3", "8 training shards", "--shards 9", "would work here: 1, 2, 4, 8"]),
        ({"global_batch": 4 * 10**6}, ["training sequences", "data.global_batch = 4000000"]),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(
    shards: Path, options: dict[str, int], named: list[str]
) -> None:
    with pytest.raises((ConfigError, DataError)) as refused:
        stream(shards, **options)
    assert all(text in str(refused.value) for text in named), refused.value


def test_more_ranks_than_lanes_are_refused(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be shared equally by 8 ranks.*would work here: 8\."):
        stream(shards, 3, 8)


def test_batches_have_the_shapes_that_the_models_expect(shards: Path) -> None:
    _, batch = next(stream(shards).updates(0, 1))
    slots = round(0.15 * SEQUENCE_LENGTH)
    assert batch.input_ids.shape == batch.attention_mask.shape == (24, SEQUENCE_LENGTH)
    assert batch.scored_positions.shape == batch.labels.shape == batch.weights.shape == (24, slots)
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.samples.dtype} == {torch.int64}
    assert batch.weights.dtype == torch.float32
