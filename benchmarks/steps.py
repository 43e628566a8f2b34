"""Steps of a study: commands that need each other's results, several at a time, none twice.

A step whose result lies there already is not run again, so that a study that was interrupted goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
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


def study_of_tasks(
    doc: str | None,
    tasks: Iterable[str],
    kept: Path,
    logs: Path,
    steps: Callable[[str, Path], list[Step]],
    collected: Callable[[str], dict[str, Any]],
) -> tuple[dict[str, Any], Path]:
    """What a study of several tasks of GLUE does: its flags, a task's steps, and a row of what is collected of a task,
    complete or not, if there is anything. Returns the rows, and where they are kept."""
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="where data/glue and teacher/ are")
    parser.add_argument("--tasks", nargs="+", choices=list(tasks), default=list(tasks))
    parser.add_argument("--parallel", type=int, default=1, help="processes at a time")
    parser.add_argument("--rows", type=Path, default=kept, help="where finished rows are kept, as JSON")
    options = parser.parse_args()
    rows = kept_rows(options.rows)
    missing = [task for task in options.tasks if not rows.get(task, {}).get("complete")]
    planned = {task: steps(task, options.shared) for task in missing}
    try:
        carry_out([step for of_task in planned.values() for step in of_task], logs, options.parallel, logs.parent.name)
    finally:
        for task, of_task in planned.items():
            if found := collected(task):
                complete = all(is_done(step.result) for step in of_task)
                rows[task] = found | circumstances() | {"complete": complete}
        options.rows.parent.mkdir(parents=True, exist_ok=True)
        options.rows.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows, options.rows


def kept_rows(file: Path) -> dict[str, Any]:
    """A study's rows, name -> figures, as an earlier process left them; says so, since they are not run again."""
    rows: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if rows:
        commits = ", ".join(sorted({str(row["commit"]) for row in rows.values()}))
        print(f"{file} has {len(rows)} rows, of commit {commits}: what is complete there is shown, not run again.")
        print(
            "Another --rows, or --results, makes rows of the runs below runs/ again; without these, runs start afresh."
        )
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
