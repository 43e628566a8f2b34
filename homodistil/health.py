"""Health: is what the run computes still sane? Updates left out, ranks that drifted apart."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from torch import Tensor

from homodistil.config import HealthConfig
from homodistil.engine import StudentEngine
from homodistil.errors import DivergenceError, NonFiniteError
from homodistil.ranks import Ranks

logger = logging.getLogger(__name__)


class Health:
    """One run's. An update whose gradient is not finite changes nothing: the engine leaves its step out."""

    def __init__(self, config: HealthConfig, ranks: Ranks, skipped_in_a_row: int = 0) -> None:
        """skipped_in_a_row: by an earlier process, just before its checkpoint."""
        self._config, self._ranks = config, ranks
        self.skipped_in_a_row = skipped_in_a_row

    def check(
        self, update: int, losses: Mapping[str, Tensor], gradient_norm: Tensor | float | None
    ) -> NonFiniteError | None:
        """After an update's step: the reason to stop, if there is one; all ranks get the same. Collective.

        losses: this rank's share of each term. gradient_norm: global, as all ranks see it.
        """
        if gradient_norm is None or math.isfinite(float(gradient_norm)):
            self.skipped_in_a_row = 0
            return None
        return self._skipped(update, losses)

    def compare(self, update: int, student: StudentEngine) -> None:
        """Now and then, before an update's step: raise `DivergenceError` unless all ranks computed it with the same
        weights. Collective."""
        if update % self._config.compare_every:
            return
        names, sums = student.fingerprints()
        everyone = self._ranks.gather(sums.tolist())
        for rank, theirs in enumerate(everyone):
            different = [name for name, a, b in zip(names, everyone[0], theirs, strict=True) if a != b]
            if different:
                raise DivergenceError(
                    f"in update {update} rank {rank} held other weights than rank 0, first in {different[0]} "
                    f"({len(different)} of {len(names)} parameters). A device or its memory is at fault; run the same "
                    "command without that node to resume from the last checkpoint."
                )

    def _skipped(self, update: int, losses: Mapping[str, Tensor]) -> NonFiniteError | None:
        self.skipped_in_a_row += 1
        mine = [name for name, loss in losses.items() if not math.isfinite(float(loss))]
        terms = [f"{', '.join(names)} on rank {rank}" for rank, names in enumerate(self._ranks.gather(mine)) if names]
        where = f"not finite: {'; '.join(terms)}" if terms else "all losses are finite, the gradient is not"
        if self._ranks.is_first:
            logger.warning(
                "update %d left out (%s): %d in a row, more than %d stop the run",
                *(update, where, self.skipped_in_a_row, self._config.max_skipped),
            )
        if self.skipped_in_a_row <= self._config.max_skipped:
            return None
        return NonFiniteError(
            f"update {update}: {where}; {self.skipped_in_a_row} updates in a row had to be left out "
            f"(health.max_skipped is {self._config.max_skipped}). The weights are those before the first of them, and "
            "saved in the last checkpoint. Resume with a lower rate or weight: --optimizer.learning_rate X "
            "--checkpoint.allow_changes optimizer.learning_rate."
        )
