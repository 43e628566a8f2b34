"""A short shrinking run against the same run never shrunk: python -m benchmarks.schedule

Both runs go side by side in one process, update by update, prunes and scoring included in the shrinking one's time; the
ratio of whole runs is set beside the one that `homodistil plan`'s model foretells from what this machine can do.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.arena import BASE, RATE, bert, engines, planner, random_batch, run_config, share_of
from benchmarks.interleaved import leave
from homodistil.engine import started_ranks
from homodistil.progress import progress_bar
from homodistil.pruning.coordinator import PruningCoordinator
from homodistil.pruning.ladder import Ladder
from homodistil.ranks import Ranks


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12 if gpu else 4)
    parser.add_argument("--sequences", type=int, default=256 if gpu else 8, help="of a micro-batch, one an update")
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--events", type=int, default=8, help="prunes on the way to --width")
    parser.add_argument("--width", type=float, default=0.5, help="share of the units kept at the end")
    options = parser.parse_args()
    with started_ranks() as ranks:
        row = measure(options, ranks)
    table = Table("run", "seconds", "foretold", "off by")
    for name in ("never shrunk", "shrinking"):
        seconds, foretold = row["seconds"][name], row["forecast"][name]
        table.add_row(name, f"{seconds:.1f}", f"{foretold:.1f}", f"{foretold / seconds - 1:+.0%}")
    Console().print(table)
    print(f"of the shrinking run's seconds, prunes are {row['prunes']:.1f}, which no forecast counts")
    print(f"shrinking takes {row['ratio']:.2f} of the time; written to {leave('schedule', [row])}")


def measure(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    narrow = share_of(options.width)
    target = {"hidden": narrow.hidden, "ffn": narrow.ffn, "heads": narrow.heads}
    pruning = {"target": target, "events": options.events}
    run = run_config(options.sequences, pruning=pruning, run={"updates": options.updates})
    ladder = Ladder.plan(run.pruning, options.updates, BASE)
    model = bert(options.layers, 0, ranks.device)
    shrinking, teacher = engines(run, model, model, None, ranks)
    whole, _ = engines(run, model, model, None, ranks)
    pruner = PruningCoordinator(run.pruning, ladder, shrinking.groups, ranks, seed=0)
    seconds = {"never shrunk": 0.0, "shrinking": 0.0}
    prunes = 0.0
    warm = random_batch(options.sequences, 128)
    for engine in (shrinking, whole):  # the first update makes the libraries load
        engine.accumulate(warm, teacher)
        engine.update(0.0)
    with progress_bar("schedule", options.updates, "update") as bar:
        for update in range(1, options.updates + 1):
            batch = random_batch(options.sequences, 128, seed=update)
            started = time.perf_counter()
            whole.accumulate(batch, teacher)
            whole.update(RATE)
            seconds["never shrunk"] += _since(started)
            started = time.perf_counter()
            shrinking.accumulate(batch, teacher)
            pruner.observe(shrinking.fragments())
            shrinking.update(RATE)
            if plan := pruner.plan(update):
                pruning_started = time.perf_counter()
                shrinking = shrinking.shrunk(plan)
                pruner.rebase(shrinking.groups)
                prunes += _since(pruning_started)
            seconds["shrinking"] += _since(started)
            bar.update()
    foretold = planner(run, options.layers, 128, ladder, ranks.device)
    steady = replace(foretold, ladder=Ladder(()))
    outlooks = {"never shrunk": steady.outlook(ranks.world_size), "shrinking": foretold.outlook(ranks.world_size)}
    return {
        "updates": options.updates,
        "rungs": len(ladder.rungs),
        "width": options.width,
        "seconds": seconds,
        "ratio": seconds["shrinking"] / seconds["never shrunk"],
        "prunes": prunes,
        "forecast": {name: 3600 * outlook.hours for name, outlook in outlooks.items()},
    }


def _since(started: float) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
