"""One update of this project against R and R+ (reference.py): python -m benchmarks.step

All four terms, bf16, the same batch, aligner, scored positions and start in every arm; losses of the first update are
compared before anything is timed. `ours` is the real thing: a ZeRO-2 student engine beside a replicated teacher.
Two more arms are other objectives: `indexed` is ours without learned projections, `no attention` without that loss,
which is how its share is measured. R and R+ run with the C library's own way with freed memory, as in a process of
their own; with --kept they profit from ours (hardware.keep_freed_memory) as well.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.arena import BASE, RATE, WEIGHTS, bert, cut, engines, planner, random_batch, run_config, share_of
from benchmarks.interleaved import interleave, leave
from benchmarks.reference import Reference
from homodistil.batch import Batch
from homodistil.config import AttentionTerm, HiddenTerm
from homodistil.engine import StudentEngine, started_ranks
from homodistil.hardware import give_back_freed_memory, keep_freed_memory, matrix_product_flops
from homodistil.knowledge.aligners import ProjectionAligner
from homodistil.knowledge.teacher import Teacher
from homodistil.models.shape import HIDDEN, StudentShape, heads
from homodistil.pruning.ladder import Ladder
from homodistil.ranks import Ranks

TOLERANCE = 0.02
"""Relative, of losses in bf16: ours rounds the weights as well, the references activations only."""
Step = Callable[[Batch], list[float]]
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
    parser.add_argument("--tokens", type=int, default=128 * (256 if gpu else 8), help="of a micro-batch")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], help="tokens of a sequence")
    parser.add_argument("--widths", type=float, nargs="+", default=[1, 0.5, 0.25], help="share of the units kept")
    parser.add_argument("--rounds", type=int, default=10, help="times each arm is measured")
    parser.add_argument("--without", nargs="*", default=[], choices=[*REFERENCES, *VARIANTS], help="arms to leave out")
    parser.add_argument("--kept", action="store_true", help="freed memory is kept in R and R+ as well")
    parser.add_argument("--compile", action="store_true", help="ours with performance.compile")
    options = parser.parse_args()
    with started_ranks() as ranks:
        rows = [measure(options, length, width, ranks) for length in options.lengths for width in options.widths]
    show(rows)
    print(f"written to {leave('step-kept' if options.kept else 'step', rows)}")


def measure(options: argparse.Namespace, length: int, width: float, ranks: Ranks) -> dict[str, Any]:
    """Agreement, then time, of all arms at one length and one width."""
    batch = random_batch(options.tokens // length, length)
    arms = build(options, len(batch), width, ranks)
    first = {name: step(batch) for name, step in arms.items()}
    for name in set(REFERENCES) & set(arms):
        # Under a mask LayerNorm still averages over the lost units: below width 1, R is another function.
        if name != "R" or width == 1:
            assert_close(name, first[name], first["ours"])
    steps = {name: partial(step, batch) for name, step in arms.items()}
    timings = interleave(steps, options.rounds, enter=partial(keep_or_give_back, options.kept))
    peak, flops = matrix_product_flops(torch.bfloat16, ranks.device), useful_flops(options.layers, width, batch)
    seconds = {name: timings.median(name) for name in arms}
    arms.clear()
    gc.collect()
    run = run_config(len(batch), performance={"compile": options.compile})
    forecast = planner(run, options.layers, length, Ladder(()), ranks).update(share_of(width))
    return {
        "length": length,
        "sequences": len(batch),
        "width": width,
        "seconds": seconds,
        "ratios": {name: timings.ratio(name, "ours") for name in seconds if name != "ours"},
        "useful FLOP": flops,
        "matrix product FLOP/s": peak,
        "utilisation": flops / seconds["ours"] / peak,
        "forecast": forecast.seconds,
        "forecast parts": vars(forecast),
    }


def build(options: argparse.Namespace, sequences: int, width: float, ranks: Ranks) -> dict[str, Step]:
    """Arm -> a function that takes a batch through one update and returns its four losses."""
    layers = options.layers
    teacher, other = (bert(layers, seed, ranks.device) for seed in (0, 1))  # a student that has moved far
    shape = StudentShape.full(layers, BASE).first(share_of(width))
    student = cut(other, shape)
    arms: dict[str, Step] = {}
    if "R" not in options.without:
        masks = {} if width == 1 else {name: torch.ones_like(p) for name, p in other.named_parameters()}
        whole, every_head = projections(layers, range(BASE.hidden)), [range(BASE.heads)] * layers
        arms["R"] = Reference(teacher, other, whole, every_head, WEIGHTS, RATE, plus=False, masks=masks).step
    if "R+" not in options.without:
        kept, narrowed = [shape.kept[heads(layer)] for layer in range(layers)], projections(layers, shape.kept[HIDDEN])
        arms["R+"] = Reference(teacher, student, narrowed, kept, WEIGHTS, RATE, plus=True).step
    for name in ("ours", *VARIANTS):
        if name not in options.without:
            run = run_config(sequences, performance={"compile": options.compile})
            run.objective = run.objective.model_copy(update=VARIANTS.get(name, {}))
            arms[name] = partial(ours, *engines(run, teacher, student, shape, ranks))
    return arms


def projections(layers: int, kept: range | tuple[int, ...]) -> list[torch.nn.Linear]:
    return [ProjectionAligner(kept, BASE.hidden, "identity").projection for _ in range(layers + 1)]


def keep_or_give_back(kept: bool, arm: str) -> None:
    """Each arm with the C library's settings that it has in a process of its own, or all with ours."""
    if arm in REFERENCES and not kept:
        give_back_freed_memory()
    else:
        keep_freed_memory()


def ours(student: StudentEngine, teacher: Teacher, batch: Batch) -> list[float]:
    losses = student.accumulate(batch, teacher)
    student.update(RATE)
    return [losses[name].item() for name in WEIGHTS if name in losses]


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
