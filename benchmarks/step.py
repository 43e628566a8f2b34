"""One update of this project against R and R+ (reference.py): python -m benchmarks.step

All four terms, bf16, the same batch, aligner, scored positions and start in every arm; losses of the first update are
compared before anything is timed. `ours` is the real thing: a ZeRO-2 student engine beside a replicated teacher.
Two more arms are other objectives: `indexed` is ours without learned projections, `no attention` without that loss,
which is how its share is measured. Each arm has a process of its own, and they take turns (turns.py). On CPUs ours
keeps freed memory (hardware.keep_freed_memory), one of its forms; with --kept R and R+ do so as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.arena import BASE, RATE, WEIGHTS, bert, cut, engines, planner, random_batch, run_config, share_of
from benchmarks.interleaved import interleave, leave
from benchmarks.reference import Reference
from benchmarks.turns import Step, Turns
from homodistil.batch import Batch
from homodistil.config import AttentionTerm, HiddenTerm
from homodistil.engine import started_ranks
from homodistil.hardware import keep_freed_memory, matrix_product_flops
from homodistil.knowledge.aligners import ProjectionAligner
from homodistil.models.shape import HIDDEN, StudentShape, heads
from homodistil.pruning.ladder import Ladder

TOLERANCE = 0.02
"""Relative, of losses in bf16: ours rounds the weights as well, the references activations only."""
REFERENCES = ("R", "R+")
VARIANTS: dict[str, dict[str, Any]] = {
    "indexed": {"hidden": HiddenTerm(weight=1, aligner="indexed")},
    "no attention": {"attention": AttentionTerm(weight=0)},
}
"""Arm -> what its objective has in place of ours."""
SHARES = {"indexed": "projections", "no attention": "attention loss"}
"""Arm -> what of our step it does without."""


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12 if gpu else 4)
    parser.add_argument("--tokens", type=int, default=128 * (64 if gpu else 8), help="of a micro-batch")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], help="tokens of a sequence")
    parser.add_argument("--widths", type=float, nargs="+", default=[1, 0.5, 0.25], help="share of the units kept")
    parser.add_argument("--rounds", type=int, default=10, help="times each arm is measured")
    parser.add_argument("--without", nargs="*", default=[], choices=[*REFERENCES, *VARIANTS], help="arms to leave out")
    parser.add_argument("--kept", action="store_true", help="freed memory is kept in R and R+ as well")
    parser.add_argument("--compile", action="store_true", help="ours with performance.compile")
    options = parser.parse_args()
    rows = [measure(options, length, width) for length in options.lengths for width in options.widths]
    show(rows)
    name = "-".join(["step", *(form for form in ("kept", "compile") if getattr(options, form))])
    print(f"written to {leave(name, rows)}")


def measure(options: argparse.Namespace, length: int, width: float) -> dict[str, Any]:
    """Agreement, then time, of all arms at one length and one width."""
    names = [name for name in (*REFERENCES, "ours", *VARIANTS) if name not in options.without]
    with ExitStack() as exits:
        arms = {
            n: exits.enter_context(Turns(reference if n in REFERENCES else ours, options, n, length, width))
            for n in names
        }
        first = {name: arm() for name, arm in arms.items()}
        for name in set(REFERENCES) & set(arms):
            # Under a mask LayerNorm still averages over the lost units: below width 1, R is another function.
            if name != "R" or width == 1:
                assert_close(name, first[name], first["ours"])
        timings = interleave(arms, options.rounds)
    keep_freed_memory()  # for the looks at this machine below
    sequences, device = options.tokens // length, this_device()
    run = run_config(sequences, performance={"compile": options.compile})
    forecast = planner(run, options.layers, length, Ladder(()), device).update(share_of(width))
    peak = matrix_product_flops(torch.bfloat16, device)
    flops = useful_flops(options.layers, width, random_batch(sequences, length))
    seconds = {name: timings.median(name) for name in arms}
    return {
        "length": length,
        "sequences": sequences,
        "width": width,
        "seconds": seconds,
        "ratios": {name: timings.ratio(name, "ours") for name in seconds if name != "ours"},
        "useful FLOP": flops,
        "matrix product FLOP/s": peak,
        "utilisation": flops / seconds["ours"] / peak,
        "forecast": forecast.seconds,
        "forecast parts": vars(forecast),
    }


@contextmanager
def reference(options: argparse.Namespace, name: str, length: int, width: float) -> Iterator[Step]:
    """R or R+, as a script of its own would run it."""
    if options.kept:
        keep_freed_memory()
    teacher, other, shape = models(options.layers, width, this_device())
    layers = range(options.layers)
    if name == "R":
        masks = {} if width == 1 else {name: torch.ones_like(p) for name, p in other.named_parameters()}
        student, kept = other, tuple(range(BASE.hidden))
        every = [tuple(range(BASE.heads))] * options.layers
    else:
        masks, student = {}, cut(other, shape)
        every, kept = [shape.kept[heads(layer)] for layer in layers], shape.kept[HIDDEN]
    aligners = projections(options.layers, kept)
    arm = Reference(teacher, student, aligners, every, WEIGHTS, RATE, plus=name == "R+", masks=masks)
    batch = random_batch(options.tokens // length, length)
    yield lambda: arm.step(batch)


@contextmanager
def ours(options: argparse.Namespace, name: str, length: int, width: float) -> Iterator[Step]:
    """An update of real engines."""
    with started_ranks() as ranks:
        teacher, other, shape = models(options.layers, width, ranks.device)
        batch = random_batch(options.tokens // length, length)
        run = run_config(len(batch), performance={"compile": options.compile})
        run.objective = run.objective.model_copy(update=VARIANTS.get(name, {}))
        student, frozen = engines(run, teacher, cut(other, shape), shape, ranks)

        def step() -> list[float]:
            losses = student.accumulate(batch, frozen)
            student.update(RATE)
            return [losses[term].item() for term in WEIGHTS if term in losses]

        yield step


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def models(layers: int, width: float, device: torch.device) -> tuple[Any, Any, StudentShape]:
    """Teacher, a student that has moved far from it, still whole, and the shape it is cut to."""
    teacher, other = (bert(layers, seed, device) for seed in (0, 1))
    return teacher, other, StudentShape.full(layers, BASE).first(share_of(width))


def projections(layers: int, kept: range | tuple[int, ...]) -> list[torch.nn.Linear]:
    return [ProjectionAligner(kept, BASE.hidden, "identity").projection for _ in range(layers + 1)]


def assert_close(arm: str, losses: list[float], expected: list[float]) -> None:
    for term, found, wanted in zip(WEIGHTS, losses, expected, strict=True):
        assert abs(found - wanted) <= TOLERANCE * abs(wanted), f"{arm}: {term} is {found}, ours {wanted}"


def useful_flops(layers: int, width: float, batch: Batch) -> float:
    """Arithmetic that the update cannot do without: forward of the teacher; forward and backward of the student, of
    the projections, and of the vocabulary at scored positions."""
    length, slots = batch.input_ids.shape[1], batch.scored_positions.shape[1]

    def per_token(share: float) -> float:
        hidden, ffn = BASE.hidden * share, BASE.ffn * share
        layer = 4 * hidden * hidden + 2 * hidden * ffn + 2 * length * hidden
        return 2 * (layers * layer + slots / length * (30522 + hidden) * hidden)

    projected = 2 * (layers + 1) * BASE.hidden * BASE.hidden * width
    return len(batch) * length * (per_token(1) + 3 * (per_token(width) + projected))


def show(rows: list[dict[str, Any]]) -> None:
    """Seconds of an update, how many times as long as ours the references take, and what ours is made of."""
    present = rows[0]["seconds"]
    references = [arm for arm in REFERENCES if arm in present]
    shares = {arm: title for arm, title in SHARES.items() if arm in present}
    ratios = [f"{arm} / ours" for arm in references]
    times = [f"{arm}, s" for arm in (*references, "ours")]
    table = Table("batch", "width", *times, *ratios, *shares.values(), "utilisation", "forecast, s")
    for row in rows:
        seconds = [f"{row['seconds'][arm]:.3f}" for arm in (*references, "ours")]
        slower = [f"{row['ratios'][arm]:.2f}" for arm in references]
        saved = [f"{1 - row['ratios'][arm]:.1%}" for arm in shares]
        batch = f"{row['sequences']} x {row['length']}"
        table.add_row(
            batch, f"{row['width']:g}", *seconds, *slower, *saved, f"{row['utilisation']:.0%}", f"{row['forecast']:.3f}"
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
