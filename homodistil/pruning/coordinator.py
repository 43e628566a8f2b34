"""PruningCoordinator: observe, all-reduce, plan, agree. It decides which units stay; surgery carries it out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from homodistil.config import PruningConfig
from homodistil.errors import ConfigError
from homodistil.models.groups import PrunableGroup, kept_positions
from homodistil.models.shape import Widths
from homodistil.pruning.importance import Importance
from homodistil.pruning.ladder import Ladder
from homodistil.ranks import Ranks
from homodistil.state import Fragment


@dataclass(frozen=True)
class PrunePlan:
    """Per group, the units that stay, ascending and numbered as before the prune; groups of pruned heads are
    absent. `StudentShape.narrowed(plan.kept)` is the shape that follows."""

    update: int
    widths: Widths
    kept: Mapping[str, tuple[int, ...]]
    scores: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    """Group -> (U,) float64 of all units before the prune, for the record."""

    @property
    def digest(self) -> str:
        """SHA-256 of what is decided."""
        decided = {"update": self.update, "widths": vars(self.widths), "kept": dict(self.kept)}
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


class PruningCoordinator:
    """Lives as long as the run; `rebase` moves it to each narrower student."""

    def __init__(
        self, config: PruningConfig, ladder: Ladder, groups: Sequence[PrunableGroup], ranks: Ranks, seed: int
    ) -> None:
        self._ladder, self._groups, self._ranks = ladder, list(groups), ranks
        self._importance = Importance(config, groups, ranks, seed)
        self._latest: PrunePlan | None = None

    def observe(self, fragments: Iterable[Fragment]) -> None:
        """Score one update, between its last backward and its step. Nothing is read once the target is reached.
        Collective."""
        if not self._finished:
            self._importance.observe(fragments)

    def plan(self, update: int) -> PrunePlan | None:
        """What to keep, if a rung fires after this update. Raises `ConfigError` when nothing was scored yet,
        `DivergenceError` when ranks disagree. Collective."""
        widths = self._ladder.widths_after(update)
        if widths is None:
            return None
        if self._importance.observed == 0:
            raise ConfigError(
                f"pruning.start: a prune is due after update {update}, but no update so far had finite gradients on "
                "all ranks, so there are no scores. Start later, or lower optimizer.learning_rate."
            )
        scores = self._importance.scores()
        chosen = PrunePlan(update, widths, select(self._groups, scores, widths), scores)
        sizes = [f"{group.name}={group.size}" for group in self._groups]
        self._ranks.assert_same(f"prune plan after update {update}", f"{chosen.digest} of {sizes}")
        self._latest = chosen
        return chosen

    def rebase(self, groups: Sequence[PrunableGroup]) -> None:
        """Go on with the student that the latest plan made: `groups` are its own."""
        assert self._latest is not None, "rebase follows a plan"
        self._importance.rebase(groups, kept_positions(self._groups, self._latest.kept))
        self._groups, self._latest = list(groups), None

    @property
    def observed(self) -> int:
        """Updates scored so far."""
        return self._importance.observed

    def shares(self) -> dict[str, Tensor]:
        """This rank's share of the smoothed scores, for a checkpoint: they add up over ranks."""
        return self._importance.shares()

    def load(self, shares: Mapping[str, Tensor], observed: int) -> None:
        """Go on from a checkpoint of a student with these groups; all ranks' shares add up to those saved."""
        self._importance.load(shares, observed)

    @property
    def _finished(self) -> bool:
        rungs = self._ladder.rungs
        return not rungs or all(group.size == _count(group, rungs[-1].widths) for group in self._groups)


def select(groups: Iterable[PrunableGroup], scores: Mapping[str, Tensor], widths: Widths) -> dict[str, tuple[int, ...]]:
    """The best-scored units of each group, ascending; ties go to the lower index. Heads first: a group whose
    parent unit goes is left out."""
    kept: dict[str, tuple[int, ...]] = {}
    for group in sorted(groups, key=lambda group: group.parent is not None):
        if group.parent is None or group.parent[1] in kept[group.parent[0]]:
            kept[group.name] = _best(scores[group.name], _count(group, widths))
    return kept


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    order = torch.sort(scores, descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))


def _count(group: PrunableGroup, widths: Widths) -> int:
    """How many units of a group the widths allow; the last part of its name says what they are."""
    kind = group.name.rsplit(".", 1)[-1]
    return {"hidden": widths.hidden, "ffn": widths.ffn, "heads": widths.heads}.get(kind, widths.head_width)
