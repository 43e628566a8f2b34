"""What scoring and shrinking cost a run: python -m benchmarks.prune

A run of `--updates` with `--events` prunes from full to half width, every part timed. From its medians follows the
share that pruning takes of the run that is asked about: 2,000 updates, 16 prunes, a global batch of 256 sequences.
`accounted` is the sum of all parts over the wall-clock time of the measured run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.arena import BASE, RATE, bert, engines, random_batch, run_config, share_of
from benchmarks.interleaved import leave
from homodistil.engine import started_ranks
from homodistil.progress import progress_bar
from homodistil.pruning.coordinator import PruningCoordinator
from homodistil.pruning.ladder import Ladder
from homodistil.ranks import Ranks

T = TypeVar("T")
UPDATES, PRUNES, GLOBAL_BATCH = 2000, 16, 256
"""Of the run that is asked about."""
PRUNING = ("scoring", "plan", "shrinking")


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12 if gpu else 4)
    parser.add_argument("--sequences", type=int, default=256 if gpu else 8, help="of a micro-batch")
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--events", type=int, default=PRUNES)
    options = parser.parse_args()
    with started_ranks() as ranks:
        row = measure(options, ranks)
    table = Table("part", "median seconds", "share of the run asked about")
    for part, share in row["shares"].items():
        table.add_row(part, f"{row['median seconds'][part]:.4f}", f"{share:.2%}")
    Console().print(table)
    print(f"scoring and shrinking: {row['scoring and shrinking']:.2%} of {UPDATES} updates with {PRUNES} prunes at")
    print(f"{GLOBAL_BATCH} sequences; accounted {row['accounted']:.1%} of {options.updates} updates measured here")
    print(f"written to {leave('prune', [row])}")


def measure(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """The run, part by part."""
    target = {"hidden": share_of(0.5).hidden, "ffn": share_of(0.5).ffn, "heads": BASE.heads}
    run = run_config(options.sequences, pruning={"target": target, "events": options.events})
    teacher = bert(options.layers, 0, ranks.device)
    student, frozen = engines(run, teacher, teacher, None, ranks)
    ladder = Ladder.plan(run.pruning, options.updates, BASE)
    pruner = PruningCoordinator(run.pruning, ladder, student.groups, ranks, seed=0)
    clock = Clock()
    started = time.perf_counter()
    with progress_bar("prune", options.updates, "update") as bar:
        for update in range(1, options.updates + 1):
            batch = random_batch(options.sequences, 128, seed=update)
            clock("micro-batch", lambda: student.accumulate(batch, frozen))  # noqa: B023 - called at once
            clock("scoring", lambda: pruner.observe(student.fragments()))  # noqa: B023
            clock("step", lambda: student.update(RATE))  # noqa: B023
            if plan := clock("plan", lambda: pruner.plan(update)):  # noqa: B023
                student = clock("shrinking", lambda: student.shrunk(plan))  # noqa: B023
                pruner.rebase(student.groups)
            bar.update()
    wall = time.perf_counter() - started
    times = {part: median(seconds) for part, seconds in clock.seconds.items()}
    times["scoring"] = median(clock.seconds["scoring"][: ladder.rungs[-1].update])  # later on nothing is scored
    counts = {
        "micro-batch": UPDATES * GLOBAL_BATCH / options.sequences / ranks.world_size,
        "scoring": UPDATES * run.pruning.end,
        "step": UPDATES,
        "plan": UPDATES,
        "shrinking": PRUNES,
    }
    total = sum(times[part] * count for part, count in counts.items())
    shares = {part: times[part] * count / total for part, count in counts.items()}
    return {
        "updates": options.updates,
        "rungs": len(ladder.rungs),
        "median seconds": times,
        "first and last shrinking": [clock.seconds["shrinking"][0], clock.seconds["shrinking"][-1]],
        "shares": shares,
        "scoring and shrinking": sum(shares[part] for part in PRUNING),
        "accounted": sum(map(sum, clock.seconds.values())) / wall,
        "pruning in the measured run": sum(sum(clock.seconds[part]) for part in PRUNING) / wall,
    }


class Clock:
    """Calls a part of an update and keeps its seconds, the device's work included."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, part: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.setdefault(part, []).append(time.perf_counter() - started)
        return result


if __name__ == "__main__":
    main()
