"""Training on a machine that has something else to do: python -m benchmarks.busy

A small BERT is trained on all cores while other processes compute on some of them, once with libgomp's own patience and
once with the package's (homodistil/__init__.py). Arms take turns, a process each; their losses are equal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from contextlib import ExitStack
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.interleaved import leave
from homodistil.progress import progress_bar

PATIENCE = {"libgomp's": "300000", "ours": "1000"}
"""Arm -> turns that a thread spins before it sleeps. libgomp's own is that many, unless it knows of too few cores."""


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=int, nargs="+", default=[0, 1, 2], help="processes beside the training")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each arm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.seconds)
        return
    rows, table = [], Table("processes beside it", "libgomp's, updates/s", "ours, updates/s", "ratio")
    with progress_bar("busy", len(options.others) * options.rounds * len(PATIENCE), "arm") as bar:
        for others in options.others:
            rates: dict[str, list[float]] = {arm: [] for arm in PATIENCE}
            losses: set[float] = set()
            for _ in range(options.rounds):
                for arm, spins in PATIENCE.items():
                    found = measured(others, spins, options.seconds)
                    rates[arm].append(found["rate"])
                    losses.add(found["loss"])
                    bar.update()
            assert len(losses) == 1, losses
            theirs, ours = (median(rates[arm]) for arm in PATIENCE)
            rows.append({"others": others, "libgomp": theirs, "ours": ours, "ratio": ours / theirs})
            table.add_row(str(others), f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs:.2f}")
    Console().print(table)
    print(f"written to {leave('busy', rows)}")


def measured(others: int, spins: str, seconds: float) -> dict[str, float]:
    """Updates a second, and the first one's loss."""
    cores = len(os.sched_getaffinity(0))
    environment = {**os.environ, "GOMP_SPINCOUNT": spins, "OMP_NUM_THREADS": str(cores)}
    command = [sys.executable, "-m", "benchmarks.busy", "--worker", "--seconds", str(seconds)]
    with ExitStack() as stack:
        for _ in range(others):
            stack.callback(subprocess.Popen([sys.executable, "-c", "while True: pass"]).kill)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def work(seconds: float) -> None:
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512}
    config = BertConfig.from_dict({"vocab_size": 8192, **shape})
    model = BertForMaskedLM(config).eval()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(8192, (16, 128))

    def update() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    first, updates, since = update(), 0, time.monotonic()  # which warms up
    while not updates or time.monotonic() - since < seconds:
        update()
        updates += 1
    print(json.dumps({"rate": updates / (time.monotonic() - since), "loss": first}))


if __name__ == "__main__":
    main()
