"""Planning: how long an update and a run take on so many ranks, in which parts, and what each rank must hold.

Work is counted (costs.py), speed is a machine's (machines.py), and what lies between is a sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from math import ceil
from typing import Any

import torch

from homodistil.costs import Cost, micro_batch_cost
from homodistil.ds_config import DeepSpeedConfig, micro_batch_size
from homodistil.machines import Machine
from homodistil.models.attention import is_written_out
from homodistil.models.shape import Widths
from homodistil.pruning.ladder import Ladder
from homodistil.student import Blueprint

GRADIENT_BYTES = 28
"""Read and written per weight when a micro-batch's gradients go to the owned partition: into a bucket and out of it in
bf16, to fp32 and back, added up."""
STEP_BYTES = 50
"""Per owned weight: zeroing, norm, clipping, AdamW in fp32, the copy in bf16."""
SCORING_BYTES = 90
"""Per owned weight and update: |w g|, the look for values that are not finite, fp64 sums over rows and columns."""
DEEPSPEED_BUCKET = 500_000_000
"""Elements of a bucket where the JSON does not say."""


@dataclass(frozen=True)
class Update:
    """Seconds of one update on one rank, part by part."""

    arithmetic: float
    """Matrix products and attention."""
    elementwise: float
    """All other operations of the models and losses."""
    starting: float
    """What the host's starting of operations adds."""
    optimizer: float
    """Gradient buckets, norm, clipping, AdamW."""
    scoring: float
    """|w g| of what is still to be pruned."""
    communication: float
    """What of it is not hidden behind the backward pass."""

    @property
    def seconds(self) -> float:
        return sum(vars(self).values())

    @property
    def longest(self) -> str:
        """The part that takes longest."""
        return max(vars(self), key=lambda part: getattr(self, part))


@dataclass(frozen=True)
class Outlook:
    """A run on so many ranks."""

    ranks: int
    micro_batch: int
    accumulation: int
    update: Update
    """Means over the run."""
    hours: float
    flops: float
    """Matrix products of the whole run, over all ranks."""
    memory: dict[str, float]
    """Part -> bytes on each rank, when the run begins."""


def bound_by_communication(outlooks: Iterable[Outlook]) -> int | None:
    """The fewest ranks on which communication takes longer than all else together."""
    return next((o.ranks for o in outlooks if o.update.communication > o.update.seconds / 2), None)


@dataclass(frozen=True)
class Planner:
    """One run on one kind of machine, for any number of ranks."""

    blueprint: Blueprint
    ladder: Ladder
    start: Widths
    length: int
    machine: Machine
    ds_config: DeepSpeedConfig
    dtype: torch.dtype
    _counted: dict[tuple[Widths, int], Cost] = field(default_factory=dict, repr=False, compare=False)

    def outlook(self, ranks: int) -> Outlook:
        """Raises `ConfigError` if the ranks cannot share the global batch."""
        data, updates = self.blueprint.run.data, self.blueprint.run.run.updates
        size = micro_batch_size(data.global_batch, data.micro_batch, ranks)
        accumulation = data.global_batch // (size * ranks)
        total, flops = dict.fromkeys((part.name for part in fields(Update)), 0.0), 0.0
        for widths, count, scored in self._stretches():
            cost = self._cost(widths, size)
            update = self._update(cost, accumulation, ranks, scored)
            flops += cost.flops * accumulation * ranks * count
            total = {name: seconds + count * getattr(update, name) for name, seconds in total.items()}
        mean = Update(**{name: seconds / updates for name, seconds in total.items()})
        memory = self.memory(self.start, ranks)
        return Outlook(ranks, size, accumulation, mean, mean.seconds * updates / 3600, flops, memory)

    def update(self, widths: Widths, ranks: int = 1) -> Update:
        """Of a student that is not being scored."""
        data = self.blueprint.run.data
        size = micro_batch_size(data.global_batch, data.micro_batch, ranks)
        return self._update(self._cost(widths, size), data.global_batch // (size * ranks), ranks, scored=False)

    def doubling(self, most: int) -> list[Outlook]:
        """On 1, 2, 4 ranks and so on, as long as they can share the global batch."""
        batch = self.blueprint.run.data.global_batch
        counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
        return [self.outlook(ranks) for ranks in counts if batch % ranks == 0]

    def shapes(self) -> list[Widths]:
        """Those that the student has on its way."""
        return [self.start, *(rung.widths for rung in self.ladder.rungs)]

    @property
    def _stage(self) -> int:
        return self.ds_config.zero_stage

    @property
    def _zero(self) -> dict[str, Any]:
        return dict(self.ds_config.values["zero_optimization"])

    @property
    def _bucket(self) -> int:
        """Elements that are reduced at once."""
        return int(self._zero.get("reduce_bucket_size") or DEEPSPEED_BUCKET)

    @property
    def _sent(self) -> int:
        """Bytes of a gradient on its way."""
        kind = self.ds_config.values.get("communication_data_type", "")
        return {"fp32": 4, "bf16": 2, "fp16": 2}.get(kind, self.dtype.itemsize)

    def _stretches(self) -> Iterator[tuple[Widths, int, bool]]:
        """Widths, updates spent there, and whether more pruning is to come."""
        ends = [*(rung.update for rung in self.ladder.rungs), self.blueprint.run.run.updates]
        for index, (widths, end) in enumerate(zip(self.shapes(), ends, strict=True)):
            yield widths, end - (ends[index - 1] if index else 0), index + 1 < len(ends)

    def _cost(self, widths: Widths, size: int) -> Cost:
        """From counts of one and of two sequences: work is a straight line in them, operations stay as they are."""
        one, two = self._count(widths, 1), self._count(widths, 2)

        def at_size(name: str) -> float:
            first, second = getattr(one, name), getattr(two, name)
            return float(first + (size - 1) * (second - first))

        return replace(
            one,
            products=at_size("products"),
            batched=at_size("batched"),
            attention=at_size("attention"),
            backward=at_size("backward"),
            traffic=at_size("traffic"),
        )

    def _count(self, widths: Widths, size: int) -> Cost:
        if (widths, size) not in self._counted:
            kernel = self.blueprint.run.performance.attention
            maps = is_written_out(kernel, "cpu" if self.machine.host_computes else "cuda", self.length)
            cost = micro_batch_cost(self.blueprint, widths, size, self.length, self.dtype, maps)
            self._counted[widths, size] = cost
        return self._counted[widths, size]

    def _update(self, cost: Cost, accumulation: int, ranks: int, scored: bool) -> Update:
        machine, weights, owned = self.machine, cost.parameters, cost.parameters / ranks
        reductions = accumulation if self._stage > 1 else 1  # stage 1 adds up first and reduces once
        micro_batch = machine.seconds(cost)
        passes = weights * GRADIENT_BYTES * reductions + owned * STEP_BYTES
        pieces = ceil(weights / self._bucket)
        reduce = machine.gather if self._stage == 3 else machine.all_reduce
        reducing = reductions * reduce(self._sent * weights, ranks, pieces)
        if self._zero.get("overlap_comm", self._stage == 3):
            backward = cost.backward / cost.flops * sum(micro_batch.values())
            reducing = max(0.0, reducing - reductions * backward)
        # stage 3 keeps the weights that it gathered for the forward pass until the backward one
        gathers = accumulation if self._stage == 3 else 1
        gathering = gathers * machine.gather(self.dtype.itemsize * weights, ranks, pieces)
        teacher = self._sharded_teacher(cost, ranks)
        gathering += accumulation * machine.gather(teacher, ranks, ceil(teacher / self.dtype.itemsize / self._bucket))
        return Update(
            **{part: accumulation * seconds for part, seconds in micro_batch.items()},
            optimizer=passes / machine.bandwidth,
            scoring=owned * SCORING_BYTES / machine.bandwidth if scored else 0.0,
            communication=reducing + gathering,
        )

    def memory(self, widths: Widths, ranks: int) -> dict[str, float]:
        """Part -> bytes that each rank holds while it trains a student of these widths."""
        data = self.blueprint.run.data
        cost = self._count(widths, micro_batch_size(data.global_batch, data.micro_batch, ranks))
        weights, width, share = cost.parameters, self.dtype.itemsize, 1 / ranks
        buffers = 2 if self._zero.get("overlap_comm", self._stage == 3) else 1
        accumulated = 4 if self._stage > 1 else width  # as our JSONs have it: fp32, or at stage 1 the run's precision
        return {
            "student": weights * width,  # stage 3 too holds what it gathered from the forward to the backward pass
            "masters and moments": weights * 12 * share,
            "gradients": weights * accumulated * (share if self._stage > 1 else 1),
            "buckets": buffers * self._bucket * width + self._sent * max(self._bucket, cost.largest),
            "teacher": self._sharded_teacher(cost, ranks) * share or cost.teacher_parameters * width,
            "activations": cost.activations,
        }

    def _sharded_teacher(self, cost: Cost, ranks: int) -> float:
        """Bytes of a teacher that is cut over the ranks; 0 for one that each rank holds whole."""
        sharding = self.blueprint.run.teacher.sharding
        sharded = sharding == "zero3" or (sharding == "auto" and ranks > 1)
        return cost.teacher_parameters * self.dtype.itemsize if sharded else 0.0
