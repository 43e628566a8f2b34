"""Share of an update that ranks spend in communication, on 1, 2 and 4 ranks over gloo: python -m benchmarks.ranks

The same global batch whatever the ranks. What a rank waits for a slower one counts as communication, so that on a
machine with fewer cores than ranks the share is mostly waiting for a core.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.arena import DS_CONFIGS, RATE, bert, engines, random_batch, run_config
from benchmarks.interleaved import leave
from benchmarks.launched import on_ranks
from homodistil.engine import started_ranks
from homodistil.progress import progress_bar

COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4], help="ranks")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], help="of ZeRO")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=16, help="of an update, over all ranks")
    parser.add_argument("--updates", type=int, default=8, help="measured")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    rows = []
    with progress_bar("ranks", len(options.stages) * len(options.counts), "run") as bar:
        for stage in options.stages:
            for count in options.counts:
                values = {"layers": options.layers, "sequences": options.sequences, "updates": options.updates}
                flags = [f"--{name}={value}" for name, value in {**values, "stage": stage}.items()]
                rows.append({"stage": stage, "ranks": count, **on_ranks("benchmarks.ranks", count, *flags)})
                bar.update()
    table = Table("ZeRO stage", "ranks", "update, s", "in communication, s", "share")
    for row in rows:
        seconds, waiting = row["seconds"], row["communication"]
        cells = f"{seconds:.3f}", f"{waiting:.3f}", f"{waiting / seconds:.0%}"
        table.add_row(str(row["stage"]), str(row["ranks"]), *cells)
    Console().print(table)
    print(f"written to {leave('ranks', rows)}")


def work(options: argparse.Namespace) -> None:
    """One rank's part."""
    with timed_collectives() as spent, started_ranks() as ranks:  # in this order: DeepSpeed keeps what it finds
        share = options.sequences // ranks.world_size
        run = run_config(options.sequences)
        run.data.micro_batch = min(4, share)
        model = bert(options.layers, 0, ranks.device)
        student, teacher = engines(run, model, model, None, ranks, DS_CONFIGS / f"zero{options.stage}.json")
        batch = random_batch(share, 128, seed=ranks.rank)
        seconds, waited = [], []
        for update in range(options.updates + 2):
            started, before = time.perf_counter(), spent[0]
            student.accumulate(batch, teacher)
            student.update(RATE)
            if update >= 2:
                seconds.append(time.perf_counter() - started)
                waited.append(spent[0] - before)
        student.close()
        if ranks.is_first:
            print(json.dumps({"seconds": median(seconds), "communication": median(waited)}))


@contextmanager
def timed_collectives() -> Iterator[list[float]]:
    """Seconds that this rank stands in collectives or waits for them, as the one element of a list."""
    spent = [0.0]

    def timed(collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def call(*arguments: Any, **settings: Any) -> Any:
            started = time.perf_counter()
            try:
                return collective(*arguments, **settings)
            finally:
                spent[0] += time.perf_counter() - started

        return call

    work = torch.distributed.Work
    together: dict[str, Any] = {name: timed(getattr(torch.distributed, name)) for name in COLLECTIVES}
    with (
        patch.multiple(torch.distributed, spec=None, create=False, spec_set=None, autospec=None, **together),
        patch.object(work, "wait", timed(work.wait)),
    ):
        yield spent


if __name__ == "__main__":
    main()
