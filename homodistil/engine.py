"""StudentEngine and TeacherEngine: side by side in every rank, in DeepSpeed where they are sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn
from transformers import PreTrainedModel

from homodistil.batch import Batch
from homodistil.errors import Stopped
from homodistil.hardware import keep_freed_memory
from homodistil.kernels.compiling import compile_encoder
from homodistil.knowledge.ahead import Ahead
from homodistil.knowledge.selection import Selection
from homodistil.knowledge.teacher import FrozenModel, Teacher
from homodistil.learner import FilterLearner
from homodistil.models.base import ModelFamily
from homodistil.models.groups import kept_positions
from homodistil.models.shape import StudentShape
from homodistil.objective.measures import Measures
from homodistil.pruning.coordinator import PrunePlan
from homodistil.pruning.surgery import sliced
from homodistil.ranks import Ranks, rendezvous, share_cores
from homodistil.signals import Compared, Knowledge, Signals
from homodistil.state import MASTER, Fragment, Movable, Range, StudentState
from homodistil.student import Blueprint, Student, as_tuple
from homodistil.zero import ZeroStudent, collect, release

Trained = Student | FilterLearner
PATIENCE = timedelta(days=1)
"""Of ranks that wait for rank 0, as for shards or a benchmark's metrics; while a run trains, the watchdog has less."""


@contextmanager
def started_ranks() -> Iterator[Ranks]:
    """Join the process group, alone without a launcher; leave it at the end. Collective.

    A ZeRO-3 process that does not leave can abort at exit; one that fails leaves without waiting for the others.
    """
    deepspeed_logger.setLevel("WARNING")
    # Its build takes a compiler and a lock that a killed process leaves behind; it serves only inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rendezvous()
    share_cores()
    deepspeed.init_distributed(verbose=False, timeout=PATIENCE)
    ranks = Ranks.current()
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)  # collectives of objects use the current one
    else:
        keep_freed_memory()
    try:
        yield ranks
    except Stopped:
        _farewell(ranks)
        raise
    _farewell(ranks)


def _farewell(ranks: Ranks) -> None:
    ranks.barrier()
    torch.distributed.destroy_process_group()


class StudentEngine:
    """A student of one shape, or what else is trained, in a ZeRO engine. A prune ends it and returns the next one."""

    def __init__(self, student: Trained, blueprint: Blueprint, settings: dict[str, Any], ranks: Ranks) -> None:
        """Collective. `settings`: the DeepSpeed JSON, every "auto" filled."""
        self.shape, self.groups, self.loss_weights = student.shape, list(student.groups), student.loss_weights
        self._exported = student.exported
        self.parameters = sum(p.numel() for p in student.model.parameters())
        self.trained_parameters = sum(p.numel() for p in student.parameters() if p.requires_grad)  # aligners as well
        self._blueprint, self._settings, self._ranks = blueprint, settings, ranks
        self._engine, *_ = deepspeed.initialize(
            model=student, model_parameters=parameter_groups(student), config=settings, dist_init_required=False
        )
        self._zero = ZeroStudent(self._engine)
        self._terms: tuple[str, ...] | None = None
        ahead = blueprint.run.performance.teacher_ahead
        self._stream = torch.get_device_module(ranks.device).Stream() if ahead else None
        if blueprint.run.performance.compile:
            compile_encoder(student.model)

    @classmethod
    def build(
        cls,
        blueprint: Blueprint,
        settings: dict[str, Any],
        ranks: Ranks,
        *,
        model: PreTrainedModel | None = None,
        shape: StudentShape,
        state: Movable | None = None,
    ) -> StudentEngine:
        """An engine over `model`'s weights, over a `state` for the given shape, or over both. Collective."""
        engine = cls(_trained(blueprint, shape, model), blueprint, settings, ranks)
        if state is not None:
            engine._zero.load(state)
        return engine

    def accumulate(
        self, batch: Batch, teacher: Teacher | None, terms: tuple[str, ...] | None = None
    ) -> dict[str, Tensor]:
        """Forward and backward over this rank's share of an update, in micro-batches; no step yet. terms: those that
        count now, by default all that have a weight. Collective.

        Returns this rank's share of each loss term, detached: summed over ranks they are the update's losses.
        """
        if terms != self._terms:
            self._zero.forget_gradients()
            self._terms = terms
        compared = self._blueprint.selection.count(batch)
        counts = self._ranks.sum(batch.counts(compared).vector.to(self._ranks.device))
        sums: dict[str, Tensor] = {}
        micro_batches = list(batch.micro_batches(self._settings["train_micro_batch_size_per_gpu"]))
        source = Ahead(teacher, self._ranks.device, self._stream)
        for index, micro_batch in enumerate(micro_batches, start=1):
            rows = micro_batch.to(self._ranks.device)
            total, parts = self._engine(as_tuple(rows), as_tuple(source.knowledge(rows)), counts, terms)
            if index < len(micro_batches):
                source.begin(micro_batches[index])
            # The losses are shares of the global sum already, but ZeRO averages over ranks: undo that.
            self._engine.backward(total * self._ranks.world_size, scale_wrt_gas=False)
            if index < len(micro_batches):
                self._engine.step()  # counts the micro-batch; the update is `update`'s
            for name, part in parts.items():
                sums[name] = sums[name] + part.detach() if name in sums else part.detach()
        return sums

    def update(self, learning_rate: float) -> None:
        """Clip and step at this rate. Collective."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    @torch.no_grad()
    def measure(self, batch: Batch, teacher: Teacher | None) -> Tensor:
        """Sums over this rank's rows, for `Measures`. Collective with ZeRO-3."""
        self._engine.eval()
        rows = batch.to(self._ranks.device)
        sums = self._engine(as_tuple(rows), as_tuple(teacher.knowledge(rows) if teacher else None), None)
        self._engine.train()
        return sums

    def validate(self, batches: list[Batch], teacher: Teacher | None) -> Measures:
        """Measures over all ranks' batches; every rank brings equally many. Collective."""
        sums = torch.stack([self.measure(batch, teacher) for batch in batches]).sum(dim=0)
        return Measures.of(self._ranks.sum(sums))

    def fragments(self, gradients: bool = True) -> Iterator[Fragment]:
        """This rank's shards: masters and, between `accumulate` and `update`, averaged unclipped gradients."""
        return self._zero.fragments(gradients)

    @property
    def zero_stage(self) -> int:
        return int(self._settings["zero_optimization"]["stage"])

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self._zero.step

    @property
    def gradient_norm(self) -> Tensor | float | None:
        """Global norm before clipping, of the last update; None before the first."""
        return self._engine.get_global_grad_norm()

    def fingerprints(self) -> tuple[list[str], Tensor]:
        """Names, and (P,) int64, of the weights that every rank should hold alike."""
        return self._zero.fingerprints()

    def export(self, on_cpu: bool = False) -> StudentState:
        """This rank's share of the whole training state, copied."""
        return self._zero.export(device=torch.device("cpu") if on_cpu else None)

    def replica(self) -> Student:
        """A whole fp32 student in every rank, outside the engine. Collective."""
        student = Student.unfilled(self._blueprint, self.shape).to(self._ranks.device)
        everything = {name: Range(0, shape.numel()) for name, shape in self._zero.shapes.items()}
        parameters = dict(student.named_parameters())
        for name, piece in self._zero.export((MASTER,)).moved(everything, self._ranks.device):
            parameters[name].data.copy_(piece.values[MASTER].view(piece.shape))
        return student

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The fp32 masters of what the run leaves behind, a model by its Hugging Face names, whole, on rank 0 alone.
        Collective: every rank must exhaust it."""
        layout = {name: Range(0, shape.numel()) for name, shape in self._zero.shapes.items()}
        for name, piece in self._zero.export((MASTER,)).moved(
            layout if self._ranks.is_first else {}, self._ranks.device
        ):
            if name.startswith(f"{self._exported}."):
                yield name.removeprefix(f"{self._exported}."), piece.values[MASTER].view(piece.shape).cpu()

    def shrunk(self, plan: PrunePlan) -> StudentEngine:
        """The next engine: weights, masters, moments, buffers, aligners and step narrowed by one plan. This one is
        closed. Collective."""
        positions = kept_positions(self.groups, plan.kept)
        state = sliced(self.export(), positions)
        shape = self.shape.narrowed(plan.kept)
        blueprint, settings, ranks = self._blueprint, self._settings, self._ranks
        self.close()
        return StudentEngine.build(blueprint, settings, ranks, shape=shape, state=state)

    def close(self) -> None:
        """Free the engine and all that it holds. Collective."""
        release(self._engine)
        del self._engine, self._zero
        collect()


class TeacherEngine:
    """A frozen model behind `knowledge`: sharded by ZeRO-3 without an optimizer, or a whole copy in each rank."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: ModelFamily,
        ranks: Ranks,
        settings: dict[str, Any] | None,
        compiled: bool = False,
        compared: Compared | None = None,
        filters: Path | None = None,
        selection: Selection | None = None,
        recorded: bool = False,
    ) -> None:
        """Collective. `settings`: DeepSpeed JSON of a ZeRO-3 engine, or None for a replica, which can be compiled.
        compared, filters, selection, recorded: what it hands over, as FrozenModel has it."""
        self.parameters = sum(p.numel() for p in model.parameters())
        module = FrozenModel(model, family, compared, filters, selection, recorded)
        if compiled:
            compile_encoder(model)
        self._engine = None
        if settings is not None:
            self._engine, *_ = deepspeed.initialize(model=module, config=settings, dist_init_required=False)
        self._module = self._engine or module.to(ranks.device)

    def knowledge(self, batch: Batch) -> Knowledge:
        """Collective if sharded."""
        with torch.no_grad():
            return Signals(*self._module(*as_tuple(batch)))  # type: ignore[misc]

    def close(self) -> None:
        """Collective."""
        if self._engine is not None:
            release(self._engine)
        del self._engine, self._module
        collect()


def _trained(blueprint: Blueprint, shape: StudentShape, model: PreTrainedModel | None) -> Trained:
    if blueprint.run.filters.of is not None:
        assert model is not None, "a frozen model is in no state"
        return FilterLearner(model, blueprint, shape)
    return Student(model, blueprint, shape) if model else Student.unfilled(blueprint, shape)


def parameter_groups(student: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay; biases and LayerNorm gains, the vectors, do not."""
    trained = [p for p in student.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
