"""A campaign of SIGKILLs at random moments: one run, restarted until it finishes, must end as if nothing had happened.

python -m tests.faults.campaign --kills 30 --seed 0
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests import processes, runs

UPDATES = 600


@dataclass
class Report:
    """What a campaign came to."""

    kills: int = 0
    resumed_at: list[int] = field(default_factory=list)
    """Update that later lives began from, of those that came so far."""
    differences: list[str] = field(default_factory=list)
    """From the undisturbed run; empty if all is well."""
    seconds: float = 0.0


def conduct(folder: Path, kills: int, seed: int, updates: int = UPDATES) -> Report:
    """Run undisturbed, then again with `kills` SIGKILLs to all processes.

    Every third life ends at a random moment of its start; the others at random updates, ever later ones.
    """
    changes = {"run__updates": updates, "checkpoint__every": 5, "checkpoint__background": True}
    started, report, moments = time.monotonic(), Report(), random.Random(seed)
    whole = processes.Launch(folder, "torchrun", "campaign-whole", **changes)
    whole.until(lambda: whole.updates() >= 1, "a first update")
    ready = time.monotonic() - started
    assert whole.ended() == 0, whole.log.read_text()[-3000:]
    an_update = (time.monotonic() - started - ready) / updates
    for update in sorted(moments.sample(range(1, int(0.8 * updates)), kills)):
        launch = processes.Launch(folder, "torchrun", "campaign", **changes)
        if report.kills % 3 == 2:
            time.sleep(moments.uniform(0, ready))
        else:
            launch.until(partial(_has_reached, launch, update), f"update {update}")
            time.sleep(moments.uniform(0, an_update))
        launch.kill()
        report.kills += 1
    last = processes.Launch(folder, "torchrun", "campaign", **changes)
    if last.ended() != 0:
        report.differences.append(f"the last life failed: {last.log.read_text()[-3000:]}")
    text = last.log.read_text()
    report.resumed_at = [int(number) for number in re.findall(r"resuming from \S+/step_(\d+): ", text)]
    if not report.differences:
        report.differences = _compared(folder)
    report.seconds = time.monotonic() - started
    return report


def _has_reached(launch: processes.Launch, update: int) -> bool:
    return launch.updates() >= update


def _compared(folder: Path) -> list[str]:
    """How the disturbed run differs from the undisturbed one: losses, kept units, final weights."""
    whole, cut = (runs.losses(folder, name) for name in ("campaign-whole", "campaign"))
    found = [f"loss of update {update}" for update in whole if whole[update] != cut.get(update)]
    set_aside = sorted((folder / "runs" / "campaign" / "checkpoints").glob("set_aside_*"))
    found += [f"{path.name}: passed over, or begun anew beside it" for path in set_aside]
    if runs.kept(folder, "campaign-whole") != runs.kept(folder, "campaign"):
        found.append("kept units")
    files = (folder / "runs" / name / "student" / "model.safetensors" for name in ("campaign-whole", "campaign"))
    ours, theirs = (load_file(file) for file in files)
    return found + [f"weights of {name}" for name in ours if not torch.equal(ours[name], theirs[name])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=30, help="how many times everything is killed")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    parser.add_argument("--updates", type=int, default=UPDATES, help="length of the run; more kills need more")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="campaign_") as folder:
        report = conduct(runs.prepare(Path(folder)), options.kills, options.seed, options.updates)
    print(f"{report.kills} kills in {report.seconds:.0f} s; later lives began from updates {report.resumed_at}")
    print(f"differences from the undisturbed run: {', '.join(report.differences) or 'none'}")


if __name__ == "__main__":
    main()
