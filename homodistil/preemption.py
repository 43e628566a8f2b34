"""Preemption: a machine that is about to go, or Ctrl-C, asks by a signal, and the run leaves in order, saved."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from homodistil.errors import Preempted
from homodistil.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Kubernetes', `kill`'s and the launchers'; Slurm's, asked for with `--signal=USR1@120`; a terminal's. None counts
twice: torchrun hands on what the terminal gave its ranks already. A launcher kills who takes too long."""


class Preemption:
    """While entered, the signals only set a flag, so that an update in flight, or a run's ending, is finished first.
    Entered around all of a command's runs, so that the next one does not begin."""

    def __init__(self) -> None:
        self.requested = False
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        self._earlier = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def check(self, update: int | None, ranks: Ranks) -> Preempted | None:
        """The reason to stop after this update, or between two runs, if any rank was asked to. Collective."""
        return Preempted(update) if ranks.any(self.requested) else None

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
