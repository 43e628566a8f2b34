"""What is kept of a teacher's predictions, against distributions written out in fp64."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from homodistil.data.hashing import Hashes, counter_hash
from homodistil.errors import ModelError
from homodistil.knowledge.targets import Draws, TargetCodec, TopK
from homodistil.knowledge.values import Arrays
from homodistil.sparse_targets import SparseTargets

SLOTS, WORDS = 9, 40
CODECS: list[TargetCodec] = [TopK(5), TopK(1, 2.0), TopK(100), Draws(12), Draws(300, 2.0)]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)


def logits(seed: int = 0, slots: int = SLOTS, words: int = WORDS) -> Tensor:
    return 2 * torch.randn(slots, words, generator=torch.Generator().manual_seed(seed))


def keys(count: int = SLOTS, seed: int = 0) -> Hashes:
    return counter_hash(seed, np.arange(count))


def as_tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def there_and_back(codec: TargetCodec, teacher: Tensor) -> SparseTargets:
    return codec.decode(as_tensors(codec.encode(teacher, keys(len(teacher)))))


def kl(targets: SparseTargets, log_p: Tensor) -> Tensor:
    """(N,) of `SparseTargets`' formula, slot by slot, in fp64."""
    found = []
    for n, log_p_V in enumerate(log_p.double()):
        used = (targets.log_mass[n] > -math.inf).tolist()
        ids = [i for i, u in zip(targets.ids[n].tolist(), used, strict=True) if u]
        masses = [math.exp(m) for m, u in zip(targets.log_mass[n].tolist(), used, strict=True) if u]
        value = targets.entropy[n].item() - sum(m * log_p_V[i].item() for m, i in zip(masses, ids, strict=True))
        if (tail := targets.tail[n].item()) > -math.inf:
            value -= math.exp(tail) * math.log(sum(p for i, p in enumerate(log_p_V.exp().tolist()) if i not in ids))
        found.append(value)
    return torch.tensor(found, dtype=torch.float64)


def exact_kl(teacher: Tensor, log_p: Tensor, temperature: float = 1.0) -> Tensor:
    q = (teacher.double() / temperature).softmax(-1)
    return (q * (q.log() - log_p.double())).sum(-1)


def student() -> Tensor:
    """Log probabilities."""
    return logits(seed=1).double().log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_most_probable_ids_come_first_and_of_equals_the_lowest(dtype: torch.dtype) -> None:
    teacher = (2 * logits().to(dtype)).round() / 2  # many equals, of both signs, and zeros of both signs
    found = TopK(25).targets(teacher).ids
    for row, ids in zip(teacher.tolist(), found.tolist(), strict=True):
        assert ids == sorted(range(WORDS), key=lambda i: (-row[i], i))[:25]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_is_kept_are_the_teachers_masses_at_the_temperature_and_the_sum_of_the_others(temperature: float) -> None:
    teacher = logits()
    q, found = (teacher.double() / temperature).softmax(-1), TopK(5, temperature).targets(teacher)
    masses = q.sort(-1, descending=True).values
    torch.testing.assert_close(found.log_mass.double(), masses[:, :5].log(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.tail.double(), masses[:, 5:].sum(-1).log(), rtol=1e-6, atol=1e-6)


def test_a_tail_of_almost_nothing_is_what_it_is() -> None:
    teacher = torch.zeros(1, WORDS)
    teacher[0, 3] = 40.0
    assert TopK(1).targets(teacher).tail.item() == pytest.approx(math.log(39) - 40, rel=1e-6)


def test_the_kl_of_few_ids_is_never_more_than_that_of_all_and_grows_with_their_number() -> None:
    teacher, log_p = logits(), student()
    bounds = [kl(TopK(k).targets(teacher), log_p) for k in (1, 2, 5, 20, 39, 40, 1000)]
    for fewer, more in pairwise(bounds):
        assert (fewer <= more + 1e-6).all()
    assert (bounds[0] < 0.9 * bounds[-1]).any()
    torch.testing.assert_close(bounds[-1], exact_kl(teacher, log_p), rtol=1e-6, atol=1e-6)


def test_masses_sum_to_1_after_they_were_rounded_and_are_as_near_as_promised() -> None:
    teacher = torch.cat([logits(s) * 3 ** (s - 2) for s in range(5)])
    exact, stored = TopK(5).targets(teacher.double()), there_and_back(TopK(5), teacher)
    log_q, log_found = (torch.cat([t.log_mass, t.tail[:, None]], dim=-1).double() for t in (exact, stored))
    torch.testing.assert_close(log_found.exp().sum(-1), torch.ones(len(teacher)).double(), rtol=0, atol=1e-6)
    lost = (log_q.exp() * (log_q - log_found)).sum(-1)
    assert (lost <= 2**-23 * (log_q.exp() * log_q**2).sum(-1) + 2e-7).all()
    torch.testing.assert_close(stored.entropy.double(), (log_found.exp() * log_found).sum(-1), rtol=1e-6, atol=1e-6)


def test_from_as_many_ids_as_there_are_the_tail_is_empty() -> None:
    found = there_and_back(TopK(WORDS + 3), logits())
    assert found.ids.shape == (SLOTS, WORDS)
    assert (found.tail == -torch.inf).all() and torch.isfinite(found.entropy).all()


@pytest.mark.parametrize(("words", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
@pytest.mark.parametrize("codec", [TopK(2), Draws(8)], ids=str)
def test_ids_are_as_wide_as_the_vocabulary_needs(codec: TargetCodec, words: int, dtype: type) -> None:
    teacher = torch.zeros(1, words)
    teacher[0, -1] = 60
    assert codec.encode(teacher, keys(1))["ids"].dtype == dtype
    assert there_and_back(codec, teacher).ids[0, 0] == words - 1


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_each_id_gets_its_share_of_the_draws_to_less_than_two(temperature: float) -> None:
    teacher, draws = logits(), 30
    found = there_and_back(Draws(draws, temperature), teacher)
    counts = torch.zeros(SLOTS, WORDS).scatter_add_(1, found.ids, draws * found.log_mass.exp())
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-4)
    assert (counts.sum(-1).round() == draws).all()
    q = (teacher.double() / temperature).softmax(-1)
    assert ((counts - draws * q).abs() < 2).all()
    torch.testing.assert_close(found.entropy.double(), (q * q.log()).sum(-1), rtol=1e-6, atol=0)
    assert (found.tail == -torch.inf).all()


def test_an_id_that_was_drawn_several_times_has_one_slot_and_unused_slots_come_last() -> None:
    found = there_and_back(Draws(30), logits())
    for ids, log_mass in zip(found.ids.tolist(), found.log_mass.tolist(), strict=True):
        used = [m > -math.inf for m in log_mass]
        assert used == sorted(used, reverse=True) and 1 < sum(used) < 30
        assert len(set(ids[: sum(used)])) == sum(used)


def test_each_draw_is_from_its_own_part_of_the_distribution_in_a_large_vocabulary_too() -> None:
    arrays = Draws(1_000).encode(torch.zeros(3, 100_000), keys(3))
    assert (arrays["ids"] // 100 == np.arange(1_000)).all()
    assert len(np.unique(arrays["ids"] % 100)) == 100


def test_what_has_no_probability_is_never_drawn() -> None:
    teacher = logits()
    teacher[:, ::3] = -torch.inf
    teacher[:, -1] = -torch.inf
    found = there_and_back(Draws(200), teacher)
    drawn = found.ids[found.log_mass > -torch.inf]
    assert (drawn % 3 != 0).all() and (drawn != WORDS - 1).all()
    assert torch.isfinite(found.entropy).all()


def test_draws_of_a_slot_follow_from_its_key_and_logits_alone() -> None:
    codec, teacher, some = Draws(12), logits(), [7, 2]
    together, again = codec.encode(teacher, keys()), codec.encode(teacher[some], keys()[some])
    assert np.array_equal(again["ids"], together["ids"][some])
    assert not np.array_equal(codec.encode(teacher, keys(seed=1))["ids"], together["ids"])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("draws", [1, 6])
def test_kl_and_gradient_of_draws_are_on_average_those_of_the_whole_distribution(
    draws: int, temperature: float
) -> None:
    """4 standard errors: 1 in 16,000 for each of 8 numbers, were the seed not fixed."""
    tries, words = 20_000, 7
    teacher, log_p = logits(words=words)[:1], logits(seed=1, words=words)[:1].log_softmax(-1)
    codec = Draws(draws, temperature)
    found = codec.decode(as_tensors(codec.encode(teacher.expand(tries, -1), keys(tries))))
    mass = torch.zeros(tries, words).scatter_add_(1, found.ids, found.log_mass.exp()).double()
    values = found.entropy.double() - (mass * log_p.double()).sum(-1)
    numbers = torch.cat([values[:, None], log_p.double().exp() - mass], dim=-1)  # KL; its gradient by logits over T
    expected = torch.cat(
        [
            exact_kl(teacher, log_p, temperature)[:, None],
            log_p.double().exp() - (teacher.double() / temperature).softmax(-1),
        ],
        dim=-1,
    )
    errors = (numbers.mean(dim=0) - expected[0]).abs() / (numbers.std(dim=0) / math.sqrt(tries))
    assert (errors < 4).all()


def test_draws_scatter_less_than_independent_ones() -> None:
    teacher, tries, draws = logits()[:1], 2_000, 20
    codec = Draws(draws)
    found = codec.decode(as_tensors(codec.encode(teacher.expand(tries, -1), keys(tries))))
    mass = torch.zeros(tries, WORDS).scatter_add_(1, found.ids, found.log_mass.exp())
    q = teacher.softmax(-1)[0]
    assert mass.var(dim=0).sum() < 0.7 * (q * (1 - q) / draws).sum()


@every_codec
def test_any_rows_can_be_read_without_the_others(codec: TargetCodec) -> None:
    arrays, rows = as_tensors(codec.encode(logits(), keys())), torch.tensor([[3, 3, 0], [8, 1, 2]])
    whole, some = codec.decode(arrays), codec.decode({key: array[rows] for key, array in arrays.items()})
    for all_rows, these in zip(whole, some, strict=True):
        assert torch.equal(these, all_rows[rows])


@every_codec
@pytest.mark.parametrize("words", [WORDS, 2**16 + 1])
def test_a_row_takes_the_bytes_that_were_announced(codec: TargetCodec, words: int) -> None:
    arrays = codec.encode(logits(slots=2, words=words), keys(2))
    assert sum(array.nbytes for array in arrays.values()) == 2 * codec.bytes_per_row(words)


@every_codec
@pytest.mark.parametrize("strange", [torch.inf, torch.nan])
def test_logits_that_are_no_distributions_are_refused_by_their_slot(codec: TargetCodec, strange: float) -> None:
    teacher = logits()
    teacher[4, 2] = strange
    with pytest.raises(ModelError, match=r"1 of 9 slots .* the first is slot 4"):
        codec.encode(teacher, keys())
