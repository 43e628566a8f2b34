"""Ahead: a teacher that begins the next micro-batch while the student is still busy with this one."""

from __future__ import annotations

import torch

from homodistil.batch import Batch
from homodistil.knowledge.teacher import Teacher
from homodistil.signals import Knowledge


class Ahead:
    """Knowledge of one micro-batch after another, each begun when it is asked for or, if `enabled`, earlier.

    `begin` belongs between a student's forward and backward pass: on a stream of its own, the teacher then fills the
    gaps that the backward pass and the reduction of gradients leave. A device without streams does it in turn.
    """

    def __init__(self, teacher: Teacher | None, device: torch.device, enabled: bool) -> None:
        self._teacher, self._device, self._enabled = teacher, device, enabled and teacher is not None
        self._streams = torch.get_device_module(device)
        self._stream = self._streams.Stream()
        self._begun: Knowledge | None = None

    def begin(self, micro_batch: Batch) -> None:
        """Start on the next micro-batch, behind all that the student was given so far: its stream is then done with
        what an earlier one's knowledge was kept in."""
        if self._enabled and self._teacher is not None:
            rows = micro_batch.to(self._device)
            self._stream.wait_stream(self._streams.current_stream())
            with self._streams.stream(self._stream):
                self._begun = self._teacher.knowledge(rows)

    def knowledge(self, rows: Batch) -> Knowledge | None:
        """Of `rows`, the micro-batch that was begun, if one was; the student's stream waits for it."""
        if self._begun is None:
            return self._teacher.knowledge(rows) if self._teacher else None
        self._streams.current_stream().wait_stream(self._stream)
        begun, self._begun = self._begun, None
        return begun
