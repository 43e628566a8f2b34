"""Watchdog: a rank that waits for another one that hangs or died ends in bounded time, with words.

A collective on which one rank does not arrive (a stopped process, a stuck disk, on GPUs even a dead one) blocks all the
others until the process group's own timeout, and then says nothing of who it was. So every training rank tells the
rendezvous store that it lives; whoever makes no progress for too long looks up who does not, says so and exits.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import Any, NamedTuple

from torch.distributed.distributed_c10d import _get_default_store

from homodistil.errors import RankLostError
from homodistil.ranks import Ranks

BEAT_SECONDS = 1.0
"""Between two signs of life."""
SILENCE_SECONDS = 5.0
"""A rank silent this long counts as lost."""
LOOKUP_SECONDS = 20.0
"""Bound on asking the store, which a lost rank may have held."""


class Heartbeat(NamedTuple):
    """A rank's latest sign of life."""

    beat: int
    update: int
    host: str


class Watchdog:
    """While entered, watches over this process. `progress` is the main thread's proof of life."""

    def __init__(self, ranks: Ranks, timeout_seconds: float) -> None:
        """timeout_seconds: an update, with its prune, validation and checkpoint, must fit inside it."""
        self._ranks, self._timeout = ranks, timeout_seconds
        self._update, self._since = 0, time.monotonic()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]

    def __enter__(self) -> Watchdog:
        self._since = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, trace: Any) -> None:
        """Raises `RankLostError` in place of a failed collective, if another rank is gone."""
        if isinstance(raised, RuntimeError):
            lost = self._bounded_lookup()
            self._over.set()
            if lost:
                raise RankLostError(f"{lost} This rank cannot go on without it: {raised}") from raised
        self._over.set()

    def progress(self, update: int) -> None:
        """Called by the main thread after every update."""
        self._update, self._since = update, time.monotonic()

    def _beat(self) -> None:
        store = _own_store()
        beat, host = 0, socket.gethostname()
        while not self._over.wait(BEAT_SECONDS):
            beat += 1
            try:
                store.set(_key(self._ranks.rank), json.dumps(Heartbeat(beat, self._update, host)))
            except RuntimeError as error:  # without it no collective group can end in order: do not train on, orphaned
                self._give_up(f"the rendezvous store is gone, and with it the launcher or rank 0 ({error}).")

    def _watch(self) -> None:
        interval = min(1.0, self._timeout / 4)
        while not self._over.wait(interval):
            if time.monotonic() - self._since > self._timeout:
                who = self._bounded_lookup() or "All ranks answer, but one of them is stuck."
                self._give_up(
                    f"no progress for {self._timeout:.0f} s after update {self._update}. {who} "
                    "(health.hang_timeout_seconds is how long to wait.)"
                )

    def _give_up(self, words: str) -> None:
        """End this process at once: its main thread may wait for ever."""
        if self._over.is_set():
            return
        end = "The run ends here; the same command resumes from its last checkpoint."
        try:
            print(f"error on rank {self._ranks.rank}: {words} {end}", file=sys.stderr, flush=True)
        finally:  # a launcher that died took stderr with it
            os._exit(RankLostError.exit_code)

    def _bounded_lookup(self) -> str:
        """Who is lost, in words; empty if nobody is."""
        where = os.environ.get("MASTER_ADDR", "another host")
        found = [f"The rendezvous store on {where} does not answer: rank 0 or the launcher is lost there, or cut off."]

        def look() -> None:
            try:
                found[0] = self._lookup()
            except Exception as error:  # a store whose host is gone may raise anything
                found[0] = f"{found[0]} ({error})"

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        thread.join(LOOKUP_SECONDS)
        return found[0]

    def _lookup(self) -> str:
        store = _own_store()
        before = self._heartbeats(store)
        time.sleep(SILENCE_SECONDS)
        after = self._heartbeats(store)
        others = [rank for rank in range(self._ranks.world_size) if rank != self._ranks.rank]
        silent = [rank for rank in others if after[rank].beat == before[rank].beat]
        behind = [rank for rank in others if rank not in silent and after[rank].update < self._update]
        lost = [(f"Rank {rank} on {after[rank].host}", after[rank].update) for rank in silent]
        words = [f"{who} is stopped or dead, or cut off; it had done {done} updates." for who, done in lost]
        words += [f"Rank {rank} lives, but has done only {after[rank].update} updates." for rank in behind]
        return " ".join(words)

    def _heartbeats(self, store: Any) -> list[Heartbeat]:
        """Every rank's latest; zeros, from nowhere, for one that never gave any."""
        keys = [_key(rank) for rank in range(self._ranks.world_size)]
        return [Heartbeat(*json.loads(store.get(key))) if store.check([key]) else Heartbeat(0, 0, "?") for key in keys]


def _own_store() -> Any:
    """The rendezvous store, over a connection of its own: the main thread may be waiting on the other."""
    store: Any = _get_default_store()
    return store.clone()


def _key(rank: int) -> str:
    return f"homodistil/alive/{rank}"
