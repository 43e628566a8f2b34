"""Peak memory of a rank by ZeRO stage and width, beside what `homodistil plan` foretells: python -m benchmarks.memory

Two ranks. On GPUs torch's peak of allocated bytes; on CPUs the resident memory that three updates take above what the
process had before its engines, with the C library giving back what is freed.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.arena import BASE, DS_CONFIGS, RATE, bert, cut, engines, planner, random_batch, run_config, share_of
from benchmarks.interleaved import leave
from benchmarks.launched import on_ranks
from homodistil.engine import started_ranks
from homodistil.hardware import give_back_freed_memory
from homodistil.models.shape import StudentShape
from homodistil.progress import progress_bar
from homodistil.pruning.ladder import Ladder
from homodistil.ranks import Ranks

MIB = 2**20


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=max(1, torch.cuda.device_count()) if gpu else 2, help="ranks")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], help="of ZeRO")
    parser.add_argument("--widths", type=float, nargs="+", default=[1, 0.5, 0.25], help="share of the units kept")
    parser.add_argument("--layers", type=int, default=12 if gpu else 4)
    parser.add_argument("--sequences", type=int, default=128 if gpu else 8, help="of a rank's micro-batch")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    rows = []
    with progress_bar("memory", len(options.stages) * len(options.widths), "run") as bar:
        for stage in options.stages:
            for width in options.widths:
                values = {"layers": options.layers, "sequences": options.sequences, "stage": stage, "width": width}
                flags = [f"--{name}={value}" for name, value in values.items()]
                rows.append({"stage": stage, "width": width, **on_ranks("benchmarks.memory", options.count, *flags)})
                bar.update()
    table = Table("ZeRO stage", "width", "peak, MiB", "foretold", "off by")
    for row in rows:
        off = row["forecast"] / row["peak"] - 1
        cells = f"{row['peak']:.0f}", f"{row['forecast']:.0f}", f"{off:+.0%}"
        table.add_row(str(row["stage"]), f"{row['width']:g}", *cells)
    Console().print(table)
    print(f"written to {leave('memory', rows)}")


def work(options: argparse.Namespace) -> None:
    """One rank's part."""
    ds_config = DS_CONFIGS / f"zero{options.stage}.json"
    with started_ranks() as ranks:
        give_back_freed_memory()
        share = options.sequences
        run = run_config(share * ranks.world_size)
        run.data.micro_batch, run.teacher.sharding = share, "replicated"
        shape = StudentShape.full(options.layers, BASE).first(share_of(options.width))
        models = [bert(options.layers, 0, torch.device("cpu"))]
        models.append(cut(models[0], shape))
        before = held(ranks)
        student, teacher = engines(run, models[0], models[1], shape, ranks, ds_config)
        batch = random_batch(share, 128, seed=ranks.rank)
        for update in range(4):
            if update == 1:
                forget_peak(ranks)
            student.accumulate(batch, teacher)
            student.update(RATE)
        peak = peak_since(ranks) - before
        student.close()
        forecaster = planner(run, options.layers, 128, Ladder(()), ranks.device, ds_config)
        foretold = forecaster.memory(share_of(options.width), ranks.world_size)
        if ranks.is_first:
            parts = {name: size / MIB for name, size in foretold.items()}
            print(json.dumps({"peak": peak / MIB, "forecast": sum(parts.values()), "parts": parts}))


def held(ranks: Ranks) -> float:
    gc.collect()
    if ranks.device.type == "cuda":
        return float(torch.cuda.memory_allocated())
    return float(psutil.Process().memory_info().rss)


def forget_peak(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_since(ranks: Ranks) -> float:
    if ranks.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    lines: dict[str, Any] = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * float(lines["VmHWM"].split()[0])


if __name__ == "__main__":
    main()
