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

    def __init__(self, config: HealthConfig, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self._skipped_in_a_row = 0

    def check(self, update: int, losses: Mapping[str, Tensor], student: StudentEngine) -> NonFiniteError | None:
        """After an update's step: the reason to stop, if there is one; all ranks get the same. Raises
        `DivergenceError` when the ranks hold different weights. Collective.

        losses: this rank's share of each term.
        """
        norm = student.gradient_norm
        if norm is not None and not math.isfinite(float(norm)):
            return self._skipped(update, losses)
        self._skipped_in_a_row = 0
        if update % self._config.compare_every == 0:
            self._compare(update, student)
        return None

    def _skipped(self, update: int, losses: Mapping[str, Tensor]) -> NonFiniteError | None:
        self._skipped_in_a_row += 1
        mine = [name for name, loss in losses.items() if not math.isfinite(float(loss))]
        terms = [f"{', '.join(names)} on rank {rank}" for rank, names in enumerate(self._ranks.gather(mine)) if names]
        where = f"not finite: {'; '.join(terms)}" if terms else "all losses are finite, the gradient is not"
        if self._ranks.is_first:
            logger.warning(
                "update %d left out (%s): %d in a row, more than %d stop the run",
                *(update, where, self._skipped_in_a_row, self._config.max_skipped),
            )
        if self._skipped_in_a_row <= self._config.max_skipped:
            return None
        return NonFiniteError(
            f"update {update}: {where}; {self._skipped_in_a_row} updates in a row had to be left out "
            f"(health.max_skipped is {self._config.max_skipped}). The weights are those before the first of them, and "
            "saved in the last checkpoint. Lower optimizer.learning_rate, or the weight of a term that is not finite."
        )

    def _compare(self, update: int, student: StudentEngine) -> None:
        names, sums = student.fingerprints()
        everyone = self._ranks.gather(sums.tolist())
        for rank, theirs in enumerate(everyone):
            different = [name for name, a, b in zip(names, everyone[0], theirs, strict=True) if a != b]
            if different:
                raise DivergenceError(
                    f"after update {update} rank {rank} holds other weights than rank 0, first in {different[0]} "
                    f"({len(different)} of {len(names)} parameters). A device or its memory is at fault; run the same "
                    "command without that node to go on from the last checkpoint."
                )
