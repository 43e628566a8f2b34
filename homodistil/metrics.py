"""Metrics: what a run says while it runs, as a progress bar, TensorBoard scalars and one JSON line per point.

Owns averaging over updates and ranks, the clock behind tokens/s, and the warning about a term that has no say.
Values are computed elsewhere; the figures of a finished run are summary.py's.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from homodistil.config import RunConfig
from homodistil.files import write_durably
from homodistil.progress import progress_bar
from homodistil.ranks import Ranks

logger = logging.getLogger(__name__)

SMALLEST_SHARE = 0.01
"""A term below this share of the total is as good as switched off."""

SPIKE_FACTOR, SPIKE_POINTS = 2.0, 16
"""A total loss above so many times the median of the last logged points is reported."""

Scalars = Mapping[str, float]


@dataclass(frozen=True)
class Work:
    """What an update takes, over all ranks; only useful arithmetic counts."""

    tokens: int
    flops: float

    def __add__(self, more: Work) -> Work:
        return Work(self.tokens + more.tokens, self.flops + more.flops)


class Progress(BaseModel):
    """What the log counts, through all interruptions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    prunes: int = 0
    skipped_in_a_row: int = 0


class Metrics:
    """One run's log, as a context manager. All ranks keep one; only rank 0's shows and writes.

    Nothing waits for the device between two logged points.
    """

    def __init__(
        self,
        run: RunConfig,
        ranks: Ranks,
        peak_flops: float,
        start: int = 0,
        progress: Progress | None = None,
        loss_weights: Scalars | None = None,
    ) -> None:
        """peak_flops: FLOP/s of one rank's plain matrix product. start: updates done by earlier processes, of which
        `progress` is what they had counted. loss_weights: of the terms in the total; the objective's by default."""
        terms = type(run.objective).model_fields
        self._loss_weights = loss_weights or {name: getattr(run.objective, name).weight for name in terms}
        progress = progress or Progress()
        self._run, self._ranks, self._peak_flops, self.start = run, ranks, peak_flops, start
        self._clock = _Clock(progress.seconds)
        self._window = _Window()
        self.work = Work(progress.tokens, progress.flops)
        self._faint_terms: set[str] = set()
        self._terms: set[str] = set()
        self._totals: deque[float] = deque(maxlen=SPIKE_POINTS)
        self._exits = ExitStack()
        self.prunes = progress.prunes

    def __enter__(self) -> Metrics:
        config = self._run.run
        self._bar = self._exits.enter_context(
            progress_bar(config.name, config.updates, "update", shown=self._ranks.is_first, start=self.start)
        )
        self._ranks.once(lambda: _forget_beyond(self.start, _log_path(self._run)))
        if self._ranks.is_first:
            self._log = self._exits.enter_context(_Log(self._run, self.start))
            self._exits.enter_context(logging_redirect_tqdm())
        self._clock.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._clock.stop()
        self._exits.__exit__(*raised)

    def record(
        self,
        update: int,
        losses: Mapping[str, Tensor],
        work: Work,
        learning_rate: float,
        gradient_norm: Tensor | float | None,
        bad_shards: int = 0,
    ) -> None:
        """Count one update; log it if it is due. Collective when due, that is every `run.log_every` updates.

        losses: this rank's share of each unweighted term, scalars on any device; summed over ranks they are the
        update's. gradient_norm: before clipping. bad_shards: replaced so far.
        """
        self._window.add(losses, work)
        self.work += work
        self._bar.update()
        if update % self._run.run.log_every and update != self._run.run.updates:
            return
        seconds = self._clock.lap()
        means = self._window.means(self._ranks)
        if means.keys() != self._terms:  # the total of other terms is no measure of this one
            self._totals.clear()
            self._terms = set(means)
        scalars = {
            **loss_scalars(self._loss_weights, means),
            "speed/tokens_per_second": self._window.work.tokens / seconds,
            "speed/utilisation": self._window.work.flops / seconds / (self._peak_flops * self._ranks.world_size),
            "work/tokens": float(self.work.tokens),
            "work/flops": self.work.flops,
            "memory/peak_bytes": float(peak_memory_bytes()),
            "optimizer/learning_rate": learning_rate,
            "data/bad_shards": float(bad_shards),
        }
        if gradient_norm is not None:
            scalars["optimizer/gradient_norm"] = float(gradient_norm)
        self._window = _Window()
        self._write(update, scalars)
        self._show(scalars)
        if self._ranks.is_first:
            self._warn_of_a_spike(update, scalars["loss/total"])
            if self.prunes:
                self._warn_of_faint_terms(scalars)

    def validation(self, update: int, measures: Mapping[str, float | None]) -> None:
        """Log held-out figures; what is None, for want of a teacher, is left out."""
        self._write(update, {f"validation/{name}": value for name, value in measures.items() if value is not None})

    def knowledge(self, update: int, variances: Sequence[float]) -> None:
        """Log the variance of each of the teacher's states that the student's are compared with, the first first."""
        if variances:
            self._write(update, {f"knowledge/variance_{k:02d}": value for k, value in enumerate(variances)})

    def shared_units(self, update: int, share: float) -> None:
        """Log which share of the teacher's kept units the student still has, in held-out text."""
        self._write(update, {"knowledge/shared_units": share})

    def shape(self, update: int, widths: Mapping[str, int], parameters: int) -> None:
        """Log the student's widths (hidden, ffn, heads, head_width) and its size."""
        self._write(update, {f"shape/{name}": float(n) for name, n in {**widths, "parameters": parameters}.items()})
        self._bar.set_description(f"{self._run.run.name} {widths['hidden']}/{widths['ffn']}", refresh=False)

    def pruned(
        self, update: int, widths: Mapping[str, int], parameters: int, kl_before: float, kl_after: float, seconds: float
    ) -> None:
        """Log a prune: the student's new shape, and KL on one batch just before and just after (nats a position)."""
        self.prunes += 1
        jump = {"kl_before": kl_before, "kl_after": kl_after, "prune_jump": kl_after - kl_before, "seconds": seconds}
        self._write(update, {f"pruning/{name}": value for name, value in jump.items()})
        self.shape(update, widths, parameters)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside, as on validation, does not count against the throughput."""
        self._clock.stop()
        try:
            yield
        finally:
            self._clock.start()

    @property
    def progress(self) -> Progress:
        """What a later process goes on counting from."""
        return Progress(seconds=self.seconds, tokens=self.work.tokens, flops=self.work.flops, prunes=self.prunes)

    def checkpointed(self, update: int, held_seconds: float) -> None:
        """Log how long a checkpoint held up the training."""
        self._write(update, {"checkpoint/held_seconds": held_seconds})

    @property
    def seconds(self) -> float:
        """Spent training so far, pauses left out."""
        return self._clock.seconds

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run so far, pauses left out."""
        return self.work.tokens / max(self._clock.seconds, 1e-9)

    def _write(self, update: int, scalars: Scalars) -> None:
        if self._ranks.is_first:
            self._log.write(update, scalars)

    def _show(self, scalars: Scalars) -> None:
        losses = {name: f"{loss:.3g}" for name, loss in _group(scalars, "loss").items()}
        self._bar.set_postfix({**losses, "tokens/s": f"{scalars['speed/tokens_per_second']:,.0f}"}, refresh=False)

    def _warn_of_a_spike(self, update: int, total: float) -> None:
        usual = median(self._totals) if len(self._totals) == SPIKE_POINTS else math.inf
        if total > SPIKE_FACTOR * usual:
            message = (
                "update %d: the total loss is %.3g, %.1f times the median of the last %d points (%.3g). Unless a prune "
                "explains it, lower optimizer.learning_rate, or go back with --checkpoint.resume."
            )
            logger.warning(message, update, total, total / usual, SPIKE_POINTS, usual)
        if math.isfinite(total):
            self._totals.append(total)

    def _warn_of_faint_terms(self, scalars: Scalars) -> None:
        shares = _group(scalars, "share")
        for name in shares.keys() - self._faint_terms:
            if shares[name] < SMALLEST_SHARE and self._loss_weights[name] > 0:
                self._faint_terms.add(name)
                message = (
                    "objective.%s is %.2g of the total loss, less than %g: it hardly steers the student. "
                    "Raise objective.%s.weight, or set it to 0 to save its cost."
                )
                logger.warning(message, name, shares[name], SMALLEST_SHARE, name)


def loss_scalars(weights: Scalars, losses: Scalars) -> dict[str, float]:
    """`loss/*`: the total and each unweighted term; `share/*`: each term's weighted part of the total."""
    weighted = {name: weights[name] * loss for name, loss in losses.items()}
    total = sum(weighted.values())
    scalars = {"loss/total": total} | {f"loss/{name}": loss for name, loss in losses.items()}
    return scalars | {f"share/{name}": value / total if total else 0.0 for name, value in weighted.items()}


def _group(scalars: Scalars, group: str) -> dict[str, float]:
    """name -> value of the tags `group/name`."""
    return {tag.partition("/")[2]: value for tag, value in scalars.items() if tag.startswith(f"{group}/")}


def peak_memory_bytes() -> int:
    """Most memory this process ever held: on its GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _log_path(run: RunConfig) -> Path:
    return run.run.path / "metrics.jsonl"


def _forget_beyond(start: int, path: Path) -> None:
    """Keep a log's points up to update `start`. Lines that do not parse, such as one that a killed process had begun,
    go as well."""
    lines = path.read_bytes().splitlines(keepends=True) if start and path.is_file() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, lambda partial: partial.write_bytes(b"".join(line for line in lines if _up_to(start, line))))


def _up_to(start: int, line: bytes) -> bool:
    try:
        return bool(json.loads(line)["update"] <= start)
    except (ValueError, KeyError, TypeError):
        return False


class _Window:
    """Sums over the updates since the last logged point; they stay on the device until `means`."""

    def __init__(self) -> None:
        self.work = Work(0, 0.0)
        self._updates: Counter[str] = Counter()
        self._sums: dict[str, Tensor] = {}

    def add(self, losses: Mapping[str, Tensor], work: Work) -> None:
        self.work += work
        self._updates.update(losses.keys())
        for name, loss in losses.items():
            loss = loss.detach().float()
            self._sums[name] = self._sums[name] + loss if name in self._sums else loss

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Each term's mean over those of the window's updates in which it counted. Collective."""
        totals = ranks.sum(torch.stack(list(self._sums.values()))).tolist()
        return {name: total / self._updates[name] for name, total in zip(self._sums, totals, strict=True)}


class _Clock:
    """A stopwatch: total seconds while running, and those since the last lap."""

    def __init__(self, seconds: float) -> None:
        self._total = self._lap = seconds
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        self._total, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        return self._total + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def lap(self) -> float:
        seconds = self.seconds
        previous, self._lap = self._lap, seconds
        return max(seconds - previous, 1e-9)


class _Log:
    """tensorboard/ and metrics.jsonl of a run's directory; TensorBoard forgets what an interrupted process had
    written beyond update `start`. A log that cannot be written warns once; it does not end the run."""

    def __init__(self, run: RunConfig, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # 2 s that only rank 0 needs to wait

        directory = run.run.path
        directory.mkdir(parents=True, exist_ok=True)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1 if start else 0)
        self._lines = _log_path(run).open("a", encoding="utf-8")
        self._update, self._failed = start, False

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *raised: Any) -> None:
        for part in (self._board, self._lines):  # each says once more what it could not write
            with self._warning():
                part.close()

    def write(self, update: int, scalars: Scalars) -> None:
        """One point. JSON knows no NaN or infinity: there they become null."""
        self._update = update
        point = {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}
        with self._warning():
            self._lines.write(json.dumps({"update": update, **point}) + "\n")
            self._lines.flush()
            for tag, value in scalars.items():
                self._board.add_scalar(tag, value, update)

    @contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._failed:
                logger.warning("the log cannot be written from update %d on: %s", self._update, error)
            self._failed = True
