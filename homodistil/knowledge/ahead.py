"""Ahead: a teacher that begins the next micro-batch while the student is still busy with this one."""

from __future__ import annotations

from typing import Any

import torch

from homodistil.batch import Batch
from homodistil.knowledge.teacher import Teacher
from homodistil.signals import Knowledge


class Ahead:
    """Knowledge of one micro-batch after another, each begun when it is asked for or earlier.

    `begin` belongs between a student's forward and backward pass: on a stream of its own, the teacher then fills the
    gaps that the backward pass and the reduction of gradients leave. A device without streams does it in turn.
    """

    def __init__(self, teacher: Teacher | None, device: torch.device, stream: Any) -> None:
        """stream: of `device`, one for the life of an engine, since freed memory stays with its stream; None: nothing
        is begun early."""
        self._teacher, self._device, self._stream = teacher, device, stream
        self._streams = torch.get_device_module(device)
        self._begun: tuple[Batch, Knowledge] | None = None

    def begin(self, micro_batch: Batch) -> None:
        """Start on the next micro-batch, behind all that the student was given so far: its stream is then done with
        what an earlier one's knowledge was kept in."""
        if self._stream is not None and self._teacher is not None:
            rows = micro_batch.to(self._device)
            self._stream.wait_stream(self._streams.current_stream())
            with self._streams.stream(self._stream):
                self._begun = rows, self._teacher.knowledge(rows)  # the teacher may still have to read the rows

    def knowledge(self, rows: Batch) -> Knowledge | None:
        """Of `rows`, the micro-batch that was begun, if one was; the student's stream waits for it."""
        if self._begun is None:
            return self._teacher.knowledge(rows) if self._teacher else None
        self._streams.current_stream().wait_stream(self._stream)
        (_, knowledge), self._begun = self._begun, None
        return knowledge
