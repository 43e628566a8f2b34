"""Whole launches of launchers/pretrain.py, as a user starts them, to be signalled and killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from homodistil.ranks import free_port
from tests import runs

ROOT = Path(__file__).parents[1]
PRETRAIN = str(ROOT / "launchers" / "pretrain.py")
PATIENCE_SECONDS = 240.0
"""Bound on anything that is waited for."""


class Launch:
    """A launcher with two ranks below it, in a process group of its own; `changes` are the run's."""

    def __init__(self, folder: Path, launcher: str | list[str], name: str, **changes: Any) -> None:
        """launcher: one of LAUNCHERS, or the words before the script."""
        self.run = folder / "runs" / name
        self._marker = f"marker-{name}-{os.getpid()}"  # on every command line below, to find orphans by
        recipe = folder / f"{self._marker}.yaml"
        values = runs.configuration(folder, name, **changes)
        recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
        self.log = folder / f"{name}.log"
        flags = ["--ds_config", str(folder / "zero2.json"), "--teacher_ds_config", str(folder / "teacher.json")]
        words = LAUNCHERS[launcher]() if isinstance(launcher, str) else launcher
        command = [*words, PRETRAIN, *flags, "--recipe", str(recipe)]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True
            )

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, first rank first."""
        found = [p for p in self.alive() if PRETRAIN in _command_line(p)[1:3]]  # `python -u PRETRAIN`, or without -u
        return sorted(found, key=lambda process: process.environ().get("RANK", process.environ().get(MPI_RANK, "")))

    def alive(self) -> list[psutil.Process]:
        """Everything that this launch started and that still runs."""
        return [p for p in psutil.process_iter() if self._marker in " ".join(_command_line(p))]

    def updates(self) -> int:
        """Updates that the run has logged."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return max((json.loads(line)["update"] for line in lines if line.endswith("\n")), default=0)

    def checkpoints(self) -> list[str]:
        """Names of the complete ones, oldest first."""
        return sorted(path.parent.name for path in self.run.glob("checkpoints/step_*/manifest.json"))

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait, in bounded time, and not for a dead launch."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.kill()
                raise TimeoutError(f"{what} did not come about:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)

    def ended(self) -> int:
        """The launcher's exit code; nothing of it runs any more."""
        code = self.process.wait(PATIENCE_SECONDS)
        deadline = time.monotonic() + 40
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not self.alive(), f"orphans: {[p.cmdline() for p in self.alive()]}"
        return code

    def signal(self, number: signal.Signals) -> None:
        """To the launcher alone."""
        self.process.send_signal(number)

    def signal_group(self, number: signal.Signals) -> None:
        """To the launcher's process group, as a terminal does."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL to everything, as a machine that loses power."""
        for process in self.alive():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()


def mpirun() -> str | None:
    """The virtual environment's own, or the system's."""
    return shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def _torchrun() -> list[str]:
    port = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *port]


def _deepspeed() -> list[str]:
    program = str(Path(sys.executable).with_name("deepspeed"))
    return [sys.executable, program, "--num_accelerators", "2", "--master_port", str(free_port())]


def _mpirun() -> list[str]:
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [
        str(ROOT / "launchers" / "mpirun.sh"),
        *root,
        "--oversubscribe",
        "--bind-to",
        "none",
        "-np",
        "2",
        sys.executable,
    ]


LAUNCHERS: dict[str, Callable[[], list[str]]] = {"torchrun": _torchrun, "deepspeed": _deepspeed, "mpirun": _mpirun}
MPI_RANK = "OMPI_COMM_WORLD_RANK"


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return [] if process.status() == psutil.STATUS_ZOMBIE else process.cmdline()
    except psutil.Error:
        return []
