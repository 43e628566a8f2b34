"""Docker's HEALTHCHECK: exits with 1, and says why, if the GPUs no longer answer or the run here stands still.

The run here is the one whose lock a process of this container holds (homodistil/claim.py). It stands still when it has
logged nothing for `health.hang_timeout_seconds` of its run.yaml. A container without GPUs, or one that does not hold a
run (its first rank is elsewhere, or it prepares data), has only the other half to fail in. Kubernetes does not look
here: the ranks' own watchdog ends a run that hangs, and the job's policy starts it again.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import yaml


def gpus_answer() -> bool:
    """Whether the driver counts at least one GPU, where this container was given any."""
    if not Path("/dev/nvidiactl").exists():
        return True
    driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def runs_here(processes: Path) -> set[Path]:
    """Folders of the runs that a process of this container writes."""
    files = set()
    for descriptor in processes.glob("[0-9]*/fd/*"):
        try:
            files.add(descriptor.readlink())
        except OSError:  # it ended, or is another user's
            continue
    return {path.parents[1] for path in files if path.parts[-2:] == ("checkpoints", "lock")}


def stands_still(run: Path, now: float) -> str:
    """In words, that nothing was logged for too long; empty if all is well, or the run has only begun."""
    settings, log = run / "run.yaml", run / "metrics.jsonl"
    if not settings.is_file() or not log.is_file():
        return ""
    limit = yaml.safe_load(settings.read_text(encoding="utf-8"))["health"]["hang_timeout_seconds"]
    since = now - max(settings.stat().st_mtime, log.stat().st_mtime)
    return f"{log}: nothing logged for {since:.0f} s, health.hang_timeout_seconds is {limit}" if since > limit else ""


def main(processes: Path = Path("/proc")) -> None:
    faults = [fault for run in runs_here(processes) if (fault := stands_still(run, time.time()))]
    if not gpus_answer():
        faults.append("the NVIDIA driver no longer answers, or counts no GPU")
    if faults:
        sys.exit("; ".join(faults))


if __name__ == "__main__":
    main()
