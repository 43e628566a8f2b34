"""Cross-entropy and KL of targets of a few ids, against autograd of their definitions and the kernel of all ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from homodistil.kernels import vocabulary
from homodistil.kernels.sparse_vocabulary import cross_entropy_and_sparse_divergence
from homodistil.kernels.vocabulary import cross_entropy_and_divergence
from homodistil.objective.losses import sparse_divergence
from homodistil.sparse_targets import SparseTargets, negative_entropy

SLOTS, WORDS = 11, 23
WEIGHTS = torch.tensor([1.0, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1])
IDS = [0, 1, 4, WORDS]
of_temperature = pytest.mark.parametrize("temperature", [1.0, 2.5])


def _logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(SLOTS, WORDS, generator=random, dtype=torch.float64)).to(dtype)


def _labels(targets: SparseTargets) -> Tensor:
    """Every other one is an id that the target has kept."""
    labels = torch.randint(WORDS, (SLOTS,), generator=torch.Generator().manual_seed(5))
    labels[::2] = targets.ids[::2, 0]
    return labels


def _kept(teacher: Tensor, kept: int, temperature: float = 1.0) -> SparseTargets:
    """The most probable ids and a tail."""
    q, ids = (teacher / temperature).softmax(-1).sort(-1, descending=True)
    log_mass, tail = q[:, :kept].log(), q[:, kept:].sum(-1).log()
    return SparseTargets(ids[:, :kept], log_mass, tail, negative_entropy(log_mass, tail))


def _drawn(teacher: Tensor, temperature: float = 1.0) -> SparseTargets:
    """Three ids by their counts of eight, two slots unused, no tail, and the teacher's entropy."""
    q = (teacher / temperature).softmax(-1)
    ids = q.topk(5).indices
    ids[:, 3:] = torch.tensor([ids[0, 2], 0])
    mass = torch.tensor([4.0, 3, 1, 0, 0], dtype=teacher.dtype).expand(SLOTS, -1) / 8
    none = torch.full((SLOTS,), -torch.inf, dtype=teacher.dtype)
    return SparseTargets(ids, mass.log(), none, (q * q.log()).sum(-1))


def _targets(kept: int, temperature: float = 1.0) -> SparseTargets:
    """The most probable; one of them beside two unused slots; none: drawn ones."""
    if not kept:
        return _drawn(_logits(1), temperature)
    targets = _kept(_logits(1), kept, temperature)
    return _with_unused(targets) if kept == 1 else targets


def _with_unused(targets: SparseTargets) -> SparseTargets:
    """What such a slot says does not matter."""
    ids = torch.cat([targets.ids, torch.tensor([[0, 5]]).expand(SLOTS, -1)], dim=-1)
    return targets._replace(ids=ids, log_mass=F.pad(targets.log_mass, (0, 2), value=-torch.inf))


def _twin(student: Tensor, targets: SparseTargets, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """As they are defined, slot by slot, in fp64."""
    ce, kl = [], []
    for n, z in enumerate(student.double()):
        p = (z / temperature).softmax(-1)
        used = targets.log_mass[n] > -torch.inf
        ids, mass = targets.ids[n, used], targets.log_mass[n, used].double().exp()
        value = targets.entropy[n] - (mass * p[ids].log()).sum()
        if targets.tail[n] > -torch.inf:
            others = [v for v in range(WORDS) if v not in ids]
            value = value - targets.tail[n].double().exp() * p[others].sum().log()
        ce.append(-z.softmax(-1)[labels[n]].log() * WEIGHTS[n])
        kl.append(value * WEIGHTS[n])
    return torch.stack(ce).sum(), torch.stack(kl).sum()


def _rounded(targets: SparseTargets, dtype: torch.dtype) -> SparseTargets:
    ids, *others = targets
    return SparseTargets(ids, *(x.to(dtype) for x in others))


@of_temperature
@pytest.mark.parametrize("kept", IDS)
@pytest.mark.parametrize("rows", [1, 4, 100], ids=lambda rows: f"{rows}_rows_at_a_time")
def test_sums_and_their_separate_gradients_are_those_of_the_definitions(
    monkeypatch: pytest.MonkeyPatch, rows: int, kept: int, temperature: float
) -> None:
    monkeypatch.setattr(vocabulary, "CPU_BYTES", 4 * WORDS * rows)
    student, targets = _logits(0).requires_grad_(), _targets(kept, temperature)
    found = cross_entropy_and_sparse_divergence(student, targets, _labels(targets), WEIGHTS, temperature)
    expected = _twin(student, targets, _labels(targets), temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, twin in zip(found, expected, strict=True):  # each alone, so that neither hides in the other
        ours, theirs = (torch.autograd.grad(2.5 * value, student, retain_graph=True)[0] for value in (one, twin))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


@of_temperature
@pytest.mark.parametrize("kept", IDS)
def test_gradients_are_what_the_values_say(kept: int, temperature: float) -> None:
    targets = _targets(kept, temperature)

    def sums(student: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy_and_sparse_divergence(student, targets, _labels(targets), WEIGHTS, temperature)

    assert torch.autograd.gradcheck(sums, _logits(0).requires_grad_())


@of_temperature
@pytest.mark.parametrize("kept", IDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_plain_form_says_the_same(kept: int, temperature: float, dtype: torch.dtype, tolerance: float) -> None:
    student, targets = _logits(0, dtype).requires_grad_(), _rounded(_targets(kept, temperature), dtype)
    _, kl = cross_entropy_and_sparse_divergence(student, targets, _labels(targets), WEIGHTS, temperature)
    by_slot = SparseTargets(*(x.unsqueeze(0) for x in targets))
    plain = sparse_divergence((student / temperature).log_softmax(-1).unsqueeze(0), by_slot, WEIGHTS.unsqueeze(0))
    torch.testing.assert_close(kl, plain, rtol=tolerance, atol=0)
    ours, theirs = (torch.autograd.grad(value, student)[0] for value in (kl, plain))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@of_temperature
def test_with_all_ids_it_is_the_kl_of_all_ids(temperature: float) -> None:
    student, teacher = _logits(0, torch.float32).requires_grad_(), _logits(1, torch.float32)
    targets = _kept(teacher, WORDS, temperature)
    found = cross_entropy_and_sparse_divergence(student, targets, _labels(targets), WEIGHTS, temperature)
    expected = cross_entropy_and_divergence(student, teacher, _labels(targets), WEIGHTS, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for one, dense in zip(found, expected, strict=True):
        ours, theirs = (torch.autograd.grad(value, student, retain_graph=True)[0] for value in (one, dense))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gap", [30.0, 80.0, 300.0])
def test_a_student_that_gives_nearly_everything_to_the_ids_is_still_told_what_it_owes_the_others(gap: float) -> None:
    """In fp32, 1 - sum of p is 0 from a gap of 17 on, and P itself from 104 on."""
    student, targets = _logits(0, torch.float32), _rounded(_targets(4), torch.float32)
    student.scatter_add_(1, targets.ids, torch.full(targets.ids.shape, gap)).requires_grad_()
    _, kl = cross_entropy_and_sparse_divergence(student, targets, _labels(targets), WEIGHTS, 1.0)
    exact = student.detach().double().requires_grad_()
    _, expected = _twin(exact, targets, _labels(targets), 1.0)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=0)
    (ours,), (theirs,) = torch.autograd.grad(kl, student), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    assert ours.abs().sum() > 0.1


def test_logits_far_from_zero_lose_no_digits() -> None:
    targets = _rounded(_targets(4), torch.float32)
    near = (16 * _logits(0, torch.float32)).round() / 16  # so that moving them is exact
    sums, gradients = [], []
    for student in (near, near - 512):
        student.requires_grad_()
        found = cross_entropy_and_sparse_divergence(student, targets, _labels(targets), WEIGHTS, 1.0)
        sums.append(torch.stack(found))
        gradients.append(torch.autograd.grad(sum(found), student)[0])
    assert torch.equal(*sums)
    assert torch.equal(*gradients)


def test_words_that_are_ruled_out_by_both_change_nothing() -> None:
    """Logits of -inf, all of them outside of what is kept."""
    targets = _rounded(_targets(4), torch.float32)
    none = torch.full((SLOTS,), -torch.inf)
    log_mass = targets.log_mass.log_softmax(-1)
    alone = SparseTargets(targets.ids, log_mass, none, negative_entropy(log_mass, none))
    within = _logits(2, torch.float32)[:, :4]
    student = torch.full((SLOTS, WORDS), -torch.inf).scatter_(1, alone.ids, within).requires_grad_()
    _, kl = cross_entropy_and_sparse_divergence(student, alone, alone.ids[:, 1], WEIGHTS, 1.0)
    expected = (WEIGHTS[:, None] * log_mass.exp() * (log_mass - within.log_softmax(-1))).sum()
    torch.testing.assert_close(kl, expected, rtol=1e-6, atol=0)
    (found,) = torch.autograd.grad(kl, student)
    wanted = WEIGHTS[:, None] * (within.softmax(-1) - log_mass.exp())
    torch.testing.assert_close(found, torch.zeros_like(found).scatter(1, alone.ids, wanted), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kept", IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_logits_are_computed_in_fp32(dtype: torch.dtype, kept: int) -> None:
    student, targets = _logits(0, dtype).requires_grad_(), _rounded(_targets(kept, 2.0), torch.float32)
    found = cross_entropy_and_sparse_divergence(student, targets, _labels(targets), WEIGHTS, 2.0)
    expected = _twin(student, targets, _labels(targets), 2.0)
    for one, twin in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), twin, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(sum(values), student)[0] for values in (found, expected))
    assert ours.dtype == dtype
    assert (ours - theirs).norm() < (5e-3 if dtype == torch.bfloat16 else 1e-6) * theirs.norm()


def test_a_student_that_says_what_its_targets_say_has_no_divergence_and_no_gradient() -> None:
    student = _logits(0, torch.float32).requires_grad_()
    targets = _kept(student.detach(), 4)
    _, kl = cross_entropy_and_sparse_divergence(student, targets, _labels(targets), WEIGHTS, 1.0)
    assert abs(kl.item()) < 1e-6
    assert torch.autograd.grad(kl, student)[0].abs().max() < 1e-6
