"""Arms of a benchmark, interleaved in one process: medians of ratios, a table, a JSON file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from deepspeed import __version__ as deepspeed_version

from homodistil.progress import progress_bar

RESULTS = Path(__file__).parent / "results"


@dataclass
class Timings:
    """Seconds of every round of every arm."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, arm: str) -> float:
        return median(self.seconds[arm])

    def ratio(self, arm: str, base: str) -> float:
        """How many times as long `arm` takes as `base`: the median over rounds, each of which had both."""
        return median(a / b for a, b in zip(self.seconds[arm], self.seconds[base], strict=True))


def interleave(arms: Mapping[str, Callable[[], Any]], rounds: int, what: str = "measuring") -> Timings:
    """Time every arm once a round, in an order that turns, after one round that doesn't count.

    Each arm's turn begins with a call that isn't timed: the caches are then its own.
    """
    timings, names = Timings({name: [] for name in arms}), list(arms)
    with progress_bar(what, 1 + rounds, "round") as bar:
        for turn in range(1 + rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                arms[name]()
                _wait()
                started = time.perf_counter()
                arms[name]()
                _wait()
                if turn:
                    timings.seconds[name].append(time.perf_counter() - started)
            bar.update()
    return timings


def leave(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write the rows, with commit, hardware and versions, to benchmarks/results/NAME-DEVICE.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{'gpu' if torch.cuda.is_available() else 'cpu'}.json"
    path.write_text(json.dumps({**circumstances(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return path


def circumstances() -> dict[str, Any]:
    """What a figure depends on besides the code's arguments."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deepspeed": deepspeed_version,
    }


def hardware() -> str:
    """Of this rank."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
