"""Steps of a study: commands that need each other's results, several at a time, none twice.

A step whose result lies there already is not run again, so that a study that was interrupted goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from homodistil.progress import progress_bar


@dataclass(frozen=True)
class Step:
    """One process, and the file that it leaves when it succeeded."""

    name: str
    script: str
    flags: list[str]
    result: Path
    needs: tuple[str, ...] = ()


def carry_out(steps: list[Step], logs: Path, parallel: int, title: str) -> None:
    """Run what has no result yet, each step when all that it needs are done; stops after the first that fails."""
    logs.mkdir(parents=True, exist_ok=True)
    done = {step.name for step in steps if is_done(step.result)}
    running: dict[Future[None], Step] = {}
    with (
        ThreadPoolExecutor(max_workers=parallel) as pool,
        progress_bar(title, len(steps), "step", start=len(done)) as bar,
    ):
        while len(done) < len(steps):
            started = done | {step.name for step in running.values()}
            for step in steps:
                if step.name not in started and set(step.needs) <= done and len(running) < parallel:
                    running[pool.submit(_run, step, logs, parallel)] = step
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                step = running.pop(future)
                future.result()
                done.add(step.name)
                bar.update()


def kept_rows(file: Path) -> dict[str, Any]:
    """A study's rows, name -> figures, as an earlier process left them; says so, since they are not run again."""
    rows: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if rows:
        commits = ", ".join(sorted({str(row["commit"]) for row in rows.values()}))
        print(f"{file} has {len(rows)} rows, of commit {commits}: what is complete there is shown, not run again.")
        print("Another --rows, or --results, starts afresh.")
    return rows


def is_done(result: Path) -> bool:
    """Whether a step left its result, and was not stopped before its end."""
    if not result.exists() or result.name != "summary.json":
        return result.exists()
    return json.loads(result.read_text(encoding="utf-8"))["exit_status"] == 0


def circumstances() -> dict[str, Any]:
    """When, from which commit and on what."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {"date": date.today().isoformat(), "commit": found.stdout.strip() or None, "device": device}


def _run(step: Step, logs: Path, parallel: int) -> None:
    log = logs / f"{step.name.replace('/', '_')}.log"
    cores = max(1, (os.cpu_count() or 1) // parallel)
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, f"launchers/{step.script}.py", *step.flags]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code or not is_done(step.result):
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise SystemExit(f"{step.name} failed with exit code {code}; {log} ends with:\n{tail}")
