"""Masking: equal to a plain Python twin, with BERT's shares, and independent of everything but its key."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from homodistil.data.masking import Masker, training_masks
from homodistil.data.shards import SpecialTokens

VOCABULARY, LENGTH, PROBABILITY = 997, 40, 0.15
PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL = SpecialTokens(pad=PAD, unk=UNK, cls=CLS, sep=SEP, mask=MASK)
CONTINUES = np.arange(VOCABULARY) >= 600
SEED, EPOCH = 11, 3
KEY = training_masks(SEED, EPOCH)


def masker(*, whole_word: bool = False) -> Masker:
    return Masker(PROBABILITY, VOCABULARY, SPECIAL, CONTINUES if whole_word else None)


def sequences(count: int, *, padded: bool = False) -> np.ndarray:
    """[CLS] words [SEP], some [SEP] and [UNK] inside; with `padded`, of any length from 2 tokens on."""
    draw = np.random.default_rng(5)
    ids = draw.integers(5, VOCABULARY, (count, LENGTH)).astype(np.uint16)
    ids[draw.random(ids.shape) < 0.03] = SEP
    ids[draw.random(ids.shape) < 0.03] = UNK
    ids[:, 0], ids[:, -1] = CLS, SEP
    if padded:
        for row, end in enumerate(draw.integers(2, LENGTH, count)):
            ids[row, end - 1], ids[row, end:] = SEP, PAD
    return ids


def splitmix(*keys: int) -> int:
    """The documented hash, in Python's integers."""
    state = 0
    for key in keys:
        state = _finalise(((state ^ (key % 2**64)) + 0x9E3779B97F4A7C15) % 2**64)
    return state


def _finalise(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def twin(ids: list[int], sample: int, whole_word: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """One sequence the plain way: draw words in the order of their hashes until one no longer fits."""
    hashes = [splitmix(*KEY, sample, position) for position in range(len(ids))]
    words: list[list[int]] = []
    for position, token in enumerate(ids):
        if token <= MASK:
            words.append([])  # whatever comes next starts a word
        elif whole_word and token >= 600 and words and words[-1]:
            words[-1].append(position)
        else:
            words.append([position])
    quota = round(PROBABILITY * sum(token != PAD for token in ids))
    chosen: list[int] = []
    for word in sorted(filter(None, words), key=lambda word: hashes[word[0]]):
        if len(chosen) + len(word) > quota:
            break
        chosen += word
    masked, ordinary = list(ids), [token for token in range(VOCABULARY) if token > MASK]
    for position in chosen:
        share = (_finalise(hashes[position] ^ 1) >> 32) / 2**32
        if share < 0.8:
            masked[position] = MASK
        elif share < 0.9:
            masked[position] = ordinary[_finalise(hashes[position] ^ 2) % len(ordinary)]
    return masked, [(position, ids[position]) for position in sorted(chosen)]


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_equal_those_of_a_plain_twin(padded: bool, whole_word: bool) -> None:
    ids, samples = sequences(64, padded=padded), np.arange(900, 964)
    batch = masker(whole_word=whole_word)(ids, samples, *KEY)
    for row, sample in enumerate(samples):
        masked, targets = twin(ids[row].tolist(), int(sample), whole_word)
        found = batch.scored_positions[row].tolist(), batch.labels[row].tolist(), batch.weights[row].tolist()
        assert batch.input_ids[row].tolist() == masked
        assert [(p, label) for p, label, weight in zip(*found, strict=True) if weight] == targets


def test_a_mask_does_not_depend_on_the_batch_it_comes_in() -> None:
    ids, samples = sequences(32, padded=True), np.arange(32)
    together = masker()(ids, samples, *KEY)
    shuffled = np.random.default_rng(0).permutation(32)
    apart = masker()(ids[shuffled], samples[shuffled], *KEY)
    assert torch.equal(together.input_ids[shuffled], apart.input_ids)
    assert torch.equal(together.scored_positions[shuffled], apart.scored_positions)


@pytest.mark.parametrize("other", [training_masks(SEED + 1, EPOCH), training_masks(SEED, EPOCH + 1)])
def test_another_seed_or_epoch_masks_other_positions(other: tuple[int, ...]) -> None:
    ids, samples = sequences(64), np.arange(64)
    one, two = masker()(ids, samples, *KEY), masker()(ids, samples, *other)
    assert (one.scored_positions != two.scored_positions).any(dim=1).float().mean() > 0.9


def test_of_the_targets_80_percent_are_masked_10_random_and_10_kept() -> None:
    ids = sequences(20_000)
    batch = masker()(ids, np.arange(20_000), *KEY)
    seen = torch.gather(batch.input_ids, 1, batch.scored_positions)[batch.weights > 0]
    labels = batch.labels[batch.weights > 0]
    random = seen[(seen != MASK) & (seen != labels)]
    assert len(seen) == 20_000 * 6
    assert (seen == MASK).float().mean().item() == pytest.approx(0.8, abs=0.005)
    assert (seen == labels).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert len(random) / len(seen) == pytest.approx(0.1, abs=0.005)
    assert random.min() > MASK
    assert random.max() == VOCABULARY - 1
    assert random.double().mean().item() == pytest.approx((MASK + VOCABULARY) / 2, rel=0.02)


def test_every_ordinary_position_is_equally_likely_to_be_scored() -> None:
    ids = np.full((20_000, LENGTH), 7, dtype=np.uint16)
    ids[:, 0], ids[:, -1] = CLS, SEP
    batch = masker()(ids, np.arange(20_000), *KEY)
    counts = torch.bincount(batch.scored_positions.flatten(), minlength=LENGTH)
    assert counts[0] == counts[-1] == 0
    expected = 20_000 * 6 / (LENGTH - 2)
    assert ((counts[1:-1] - expected).abs() < 5 * expected**0.5).all()


@pytest.mark.parametrize("whole_word", [False, True])
def test_special_tokens_are_never_scored_and_nothing_else_changes(whole_word: bool) -> None:
    ids = sequences(500, padded=True)
    batch = masker(whole_word=whole_word)(ids, np.arange(500), *KEY)
    scored = torch.zeros(ids.shape, dtype=torch.bool)
    row, slot = torch.nonzero(batch.weights, as_tuple=True)
    scored[row, batch.scored_positions[row, slot]] = True
    original = torch.from_numpy(ids.astype(np.int64))
    assert (original[scored] > MASK).all()
    assert torch.equal(batch.input_ids[~scored], original[~scored])
    assert torch.equal(batch.attention_mask, (original != PAD).long())
    assert int(scored.sum()) == int(batch.weights.sum())  # no position is scored twice


def test_whole_words_are_masked_together_or_not_at_all() -> None:
    ids = sequences(500)
    batch = masker(whole_word=True)(ids, np.arange(500), *KEY)
    scored = np.zeros(ids.shape, dtype=bool)
    row, slot = torch.nonzero(batch.weights, as_tuple=True)
    scored[row, batch.scored_positions[row, slot]] = True
    joined = CONTINUES[ids[:, 1:]] & (ids[:, :-1] > MASK)
    assert (scored[:, 1:] == scored[:, :-1])[joined].all()
    assert scored.any(axis=1).mean() > 0.9
    assert (batch.weights.sum(dim=1) <= 6).all()


def test_text_without_ordinary_tokens_has_only_empty_slots() -> None:
    ids = np.array([[CLS, SEP, *[PAD] * (LENGTH - 2)]], dtype=np.uint16)
    batch = masker()(ids, np.arange(1), *KEY)
    assert batch.weights.sum() == 0
    assert torch.equal(batch.input_ids, torch.from_numpy(ids.astype(np.int64)))
