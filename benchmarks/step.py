"""One update of this project against R and R+ (reference.py): python -m benchmarks.step

All four terms, bf16, the same batch, aligner, scored positions and start in every arm; losses of the first update are
compared before anything is timed. `ours` is the real thing: a ZeRO-2 student engine beside a replicated teacher.
"""

from __future__ import annotations

import argparse
import copy
import gc
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from benchmarks.interleaved import interleave, leave
from benchmarks.reference import Reference
from homodistil.batch import Batch
from homodistil.config import RunConfig
from homodistil.ds_config import DeepSpeedConfig
from homodistil.engine import StudentEngine, TeacherEngine, started_ranks
from homodistil.hardware import matrix_product_flops
from homodistil.knowledge.aligners import ProjectionAligner
from homodistil.models import family_of
from homodistil.models.attention import attention_implementation
from homodistil.models.groups import kept_positions
from homodistil.models.loading import new_model
from homodistil.models.shape import StudentShape, Widths, heads
from homodistil.pruning.surgery import narrow
from homodistil.ranks import Ranks
from homodistil.student import Blueprint

ZERO2 = Path(__file__).parents[1] / "ds_configs" / "zero2.json"
WEIGHTS = {"mlm": 1.0, "kl": 1.0, "hidden": 1.0, "attention": 1.0}
TOLERANCE = 0.02
"""Of bf16: weights are rounded in `ours`, activations in all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12 if torch.cuda.is_available() else 4)
    parser.add_argument("--sequences", type=int, default=64 if torch.cuda.is_available() else 8, help="micro-batch")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], help="tokens of a sequence")
    parser.add_argument("--widths", type=float, nargs="+", default=[1, 0.5, 0.25], help="share of the units kept")
    parser.add_argument("--rounds", type=int, default=10, help="times each arm is measured")
    parser.add_argument("--without", nargs="*", default=[], help="arms to leave out: R, R+, indexed")
    options = parser.parse_args()
    with started_ranks() as ranks:
        rows = [measure(options, length, width, ranks) for length in options.lengths for width in options.widths]
    show(rows)
    print(f"written to {leave('step', rows)}")


def measure(options: argparse.Namespace, length: int, width: float, ranks: Ranks) -> dict[str, Any]:
    """Agreement, then time, of all arms at one length and one width."""
    batch = random_batch(options.sequences * 128 // length, length)
    arms = build(options, length, width, ranks)
    first = {name: arm(batch) for name, arm in arms.items()}
    for name, losses in first.items():
        # Under a mask LayerNorm still averages over the lost units: R is another function below width 1.
        if name != "indexed" and (name != "R" or width == 1):
            assert_close(name, losses, first["ours"])
    timings = interleave({name: lambda arm=arm: arm(batch) for name, arm in arms.items()}, options.rounds)
    peak = matrix_product_flops(torch.bfloat16, ranks.device)
    flops = useful_flops(options.layers, width, batch, length)
    seconds = {name: timings.median(name) for name in arms}
    arms.clear()
    gc.collect()
    return {
        "length": length,
        "sequences": len(batch),
        "width": width,
        "seconds": seconds,
        **{f"{name} / ours": timings.ratio(name, "ours") for name in seconds if name != "ours"},
        "useful FLOP": flops,
        "matrix product FLOP/s": peak,
        "utilisation": flops / seconds["ours"] / peak,
    }


def build(options: argparse.Namespace, length: int, width: float, ranks: Ranks) -> dict[str, Any]:
    """Arm -> a function that takes a batch through one update and returns its four losses."""
    config = BertConfig(num_hidden_layers=options.layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    teacher = new_model(config, attention_implementation("sdpa")).to(ranks.device)
    torch.manual_seed(1)
    other = new_model(config, attention_implementation("sdpa")).to(ranks.device)  # a student that has moved
    full = blueprint(config, "projection", options.sequences * 128 // length, length).full_shape
    shape = full.first(scaled(full.widths, width))
    narrowed = cut(other, config, shape)
    aligners = [ProjectionAligner(shape.kept["hidden"], 768, "identity").projection for _ in range(options.layers + 1)]
    kept = [list(shape.kept[heads(layer)]) for layer in range(options.layers)]
    arms: dict[str, Any] = {}
    if "R" not in options.without:
        wide = [ProjectionAligner(range(768), 768, "identity").projection for _ in range(options.layers + 1)]
        everything = [list(range(12))] * options.layers
        masks = None if width == 1 else {name: torch.ones_like(p) for name, p in other.named_parameters()}
        arms["R"] = Reference(teacher, other, wide, everything, WEIGHTS, 1e-5, plus=False, masks=masks).step
    if "R+" not in options.without:
        arms["R+"] = Reference(teacher, narrowed, aligners, kept, WEIGHTS, 1e-5, plus=True).step
    for name, aligner in (("ours", "projection"), ("indexed", "indexed")):
        if name not in options.without:
            plan = blueprint(config, aligner, options.sequences * 128 // length, length)
            arms[name] = ours(plan, teacher, narrowed, shape, ranks)
    return arms


def blueprint(config: BertConfig, aligner: str, sequences: int, length: int) -> Blueprint:
    run = RunConfig.model_validate(
        {
            "teacher": {"path": "in memory"},
            "objective": {name: {"weight": weight} for name, weight in WEIGHTS.items()},
            "data": {"global_batch": sequences, "micro_batch": sequences},
        }
    )
    run.objective.hidden.aligner = aligner  # type: ignore[assignment]
    return Blueprint(family_of(config), config, run, attention_implementation(run.performance.attention))


def scaled(widths: Widths, width: float) -> Widths:
    """Heads stay: their width shrinks with the hidden one, so that stock transformers can hold the student."""
    return Widths(int(widths.hidden * width), int(widths.ffn * width), widths.heads, int(widths.head_width * width))


def cut(model: BertForMaskedLM, config: BertConfig, shape: StudentShape) -> BertForMaskedLM:
    """A copy of `model`, narrowed to `shape`, with the original's attention scale."""
    model, family = copy.deepcopy(model), family_of(config)
    full = StudentShape.full(family.layers(config), family.widths(config))
    narrow(model, kept_positions(family.groups(full), shape.kept))
    family.configure(model, shape)
    return model


def ours(plan: Blueprint, teacher: BertForMaskedLM, student: BertForMaskedLM, shape: StudentShape, ranks: Ranks) -> Any:
    settings = DeepSpeedConfig.load(ZERO2).resolved(plan.run, ranks.world_size)
    settings["bf16"] = {"enabled": True}
    engine = StudentEngine.build(plan, settings, ranks, model=copy.deepcopy(student).train(), shape=shape)
    frozen = TeacherEngine(copy.deepcopy(teacher).bfloat16(), plan.family, ranks, settings=None)

    def step(batch: Batch) -> list[float]:
        losses = engine.accumulate(batch, frozen)
        engine.update(1e-5)
        return [losses[name].item() for name in WEIGHTS]

    return step


def random_batch(sequences: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (sequences, length), generator=generator)
    slots = round(0.15 * length)
    positions = torch.stack([torch.randperm(length, generator=generator)[:slots].sort()[0] for _ in range(sequences)])
    labels = ids.gather(1, positions)
    ids.scatter_(1, positions, 103)
    weights: Tensor = torch.ones(sequences, slots)
    return Batch(ids, torch.ones_like(ids), positions, labels, weights, torch.arange(sequences))


def assert_close(name: str, losses: list[float], expected: list[float]) -> None:
    for term, a, b in zip(WEIGHTS, losses, expected, strict=True):
        assert abs(a - b) <= TOLERANCE * abs(b), f"{name}: {term} is {a}, ours {b}"


def useful_flops(layers: int, width: float, batch: Batch, length: int) -> float:
    """Multiplications and additions that the update cannot do without: forward of the teacher; forward and backward
    of the student, of the projections (whose inputs need gradients) and of the vocabulary at scored positions."""

    def per_token(share: float) -> float:
        hidden, ffn = 768 * share, 3072 * share
        layer = 4 * hidden * hidden + 2 * hidden * ffn + 2 * length * hidden
        scored = batch.scored_positions.shape[1] / length
        return 2 * (layers * layer + scored * (30522 + hidden) * hidden)

    projections = 2 * (layers + 1) * 768 * 768 * width
    return len(batch) * length * (per_token(1) + 3 * (per_token(width) + projections))


def show(rows: list[dict[str, Any]]) -> None:
    arms = list(rows[0]["seconds"])
    headings = [*(f"{arm}, s" for arm in arms), *(f"{arm} / ours" for arm in arms if arm != "ours"), "utilisation"]
    table = Table("tokens", "width", *headings)
    for row in rows:
        seconds = [f"{row['seconds'][arm]:.3f}" for arm in arms]
        ratios = [f"{row[f'{arm} / ours']:.2f}" for arm in arms if arm != "ours"]
        table.add_row(
            f"{row['sequences']} x {row['length']}", f"{row['width']:g}", *seconds, *ratios, f"{row['utilisation']:.0%}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
