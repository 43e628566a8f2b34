"""Time and peak memory of each loss, forward and backward, against its plain twin: python -m benchmarks.losses

BERT-base's shapes, student at `--width`, inputs in bf16. Values and gradients of the two forms are compared before
anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.arena import BASE, share_of
from benchmarks.interleaved import interleave, leave
from homodistil.kernels.gram_attention import direct, gram
from homodistil.kernels.vocabulary import cross_entropy_and_divergence
from homodistil.objective.losses import cross_entropy, divergence, log_probabilities

VOCABULARY = 30522
MIB = 2**20


@dataclass
class Case:
    """One loss in two or more forms, the plain one first."""

    name: str
    inputs: list[Tensor]
    """Those that want gradients."""
    forms: dict[str, Callable[[], Tensor]]


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128 * (256 if gpu else 8), help="of a micro-batch")
    parser.add_argument("--width", type=float, default=0.5, help="the student's share of the teacher's width")
    parser.add_argument("--rounds", type=int, default=15, help="times each form is measured")
    options = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    cases = [vocabulary(options.tokens, device)]
    cases += [attention(options.tokens, length, options.width, device) for length in (128, 512)]
    rows = [row for case in cases for row in measure(case, options.rounds)]
    table = Table("loss", "form", "ms", "peak MiB", "times as fast as plain")
    for row in rows:
        table.add_row(row["loss"], row["form"], f"{row['ms']:.1f}", f"{row['peak MiB']:.0f}", f"{row['speed-up']:.2f}")
    Console().print(table)
    print(f"written to {leave('losses', rows)}")


def vocabulary(tokens: int, device: torch.device) -> Case:
    """Cross-entropy and KL at 15 % of the positions."""
    slots = round(0.15 * tokens)
    student, teacher = (normal(slots, VOCABULARY, device=device) for _ in range(2))
    labels, weights = torch.randint(VOCABULARY, (slots,), device=device), torch.ones(slots, device=device)

    def plain() -> Tensor:
        student_log_p, teacher_log_p = (log_probabilities(x[None]) for x in (student, teacher))
        kl = divergence(student_log_p, teacher_log_p, weights[None])
        return cross_entropy(student[None], labels[None], weights[None]) + kl

    def fused() -> Tensor:
        return sum(cross_entropy_and_divergence(student, teacher.detach(), labels, weights, 1.0), torch.zeros(()))

    return Case(f"vocabulary, {slots} slots", [student], {"plain": plain, "fused": fused})


def attention(tokens: int, length: int, width: float, device: torch.device) -> Case:
    """Squared differences of all heads' scores in one layer."""
    rows, narrow = tokens // length, share_of(width).head_width
    student = [normal(rows, BASE.heads, length, narrow, device=device) for _ in range(2)]
    teacher = [normal(rows, BASE.heads, length, BASE.head_width, device=device).detach() for _ in range(2)]
    valid = torch.ones(rows, length, device=device)

    def maps() -> Tensor:
        scores = [(query @ key.mT).float() for query, key in (student, teacher)]
        return (scores[0] - scores[1]).square().sum()

    pairs = (student[0], student[1]), (teacher[0], teacher[1])
    forms: dict[str, Callable[[], Tensor]] = {
        "plain": maps,
        "direct": partial(direct, *pairs, valid),
        "gram": partial(gram, *pairs, valid),
    }
    return Case(f"attention, {rows} x {length}, one layer", student, forms)


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    expected, *others = (gradients(form, case.inputs) for form in case.forms.values())
    for found in others:
        for ours, theirs in zip(found, expected, strict=True):
            error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
            assert error < 0.02, f"{case.name}: forms differ by {error:.3f} of the norm"
    arms = {name: partial(gradients, form, case.inputs) for name, form in case.forms.items()}
    timings = interleave(arms, rounds, what=case.name)
    return [
        {
            "loss": case.name,
            "form": name,
            "ms": 1000 * timings.median(name),
            "peak MiB": peak_bytes(arm) / MIB,
            "speed-up": timings.ratio("plain", name),
        }
        for name, arm in arms.items()
    ]


def gradients(form: Callable[[], Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The value, then the gradients."""
    value = form()
    return value.detach(), *torch.autograd.grad(value, inputs)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that were allocated at once, above what was there before."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).bfloat16().requires_grad_()


if __name__ == "__main__":
    main()
