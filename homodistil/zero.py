"""A rank's fragments of weights, gradients and moments in a live ZeRO engine: DeepSpeed's private parts, all here.

Two layouts stand behind one small surface: `_FlatPartition` (stages 1 and 2: one flat tensor per parameter group,
cut into equal parts) and `_ParameterPartition` (stage 3: every parameter cut into equal parts). Written against
deepspeed 0.19.8; tests/distributed/test_zero_contract.py holds it to that.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad, safe_get_local_optimizer_state
from torch import Tensor, nn

from homodistil.errors import CheckpointError
from homodistil.hardware import trim_heap
from homodistil.state import EXP_AVG, EXP_AVG_SQ, MASTER, Fragment, Layout, Movable, Piece, Range, StudentState

PIECE = 1 << 16
"""Elements, of which fp32 adds up the squares to five digits."""
Buffers = dict[str, dict[str, Tensor]]
"""Parameter name -> buffer name -> (n,) fp32: what readers keep beside each owned weight."""


class ZeroStudent:
    """The fragments that this rank owns of an engine's trainable parameters.

    Made from a fresh engine, whose optimizer state DeepSpeed would create only at the first step: it is seeded
    here, so that moments can always be read and written.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._partition = _partition_of(engine)
        self._seed_moments()
        self._parameters = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        self._owned = {n: r for n, p in self._parameters.items() if (r := self._partition.owned(p)).numel}
        self.buffers: Buffers = {}

    @property
    def layout(self) -> Layout:
        """What this rank owns of each parameter."""
        return self._owned

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Whole shapes of all trainable parameters, in the model's order."""
        return {name: self._partition.shape(p) for name, p in self._parameters.items()}

    def fragments(self, gradients: bool = True) -> Iterator[Fragment]:
        """Views of this rank's masters, with the averaged unclipped gradient: valid between the last backward of
        an update and its step (without `gradients`: at any time)."""
        for name, owned in self._owned.items():
            parameter = self._parameters[name]
            weight = self._partition.view(parameter, MASTER)
            gradient = self._partition.gradient(parameter) if gradients else None
            shape = self._partition.shape(parameter)
            yield Fragment(name, shape, owned.start, weight, gradient, self.buffers.setdefault(name, {}))

    def export(
        self, kinds: tuple[str, ...] = (MASTER, EXP_AVG, EXP_AVG_SQ), device: torch.device | None = None
    ) -> StudentState:
        """Copies, on `device` or where they are, of what this rank owns: masters, moments and all buffers; with fewer
        `kinds`, only those."""
        pieces = {}
        for name, owned in self._owned.items():
            parameter = self._parameters[name]
            kept = {kind: self._partition.view(parameter, kind) for kind in kinds}
            kept |= self.buffers.get(name, {}) if EXP_AVG in kinds else {}
            values = {kind: tensor.to(device or tensor.device, copy=True) for kind, tensor in kept.items()}
            pieces[name] = Piece(self._partition.shape(parameter), owned.start, values)
        return StudentState(pieces, self.shapes, self.step)

    def load(self, state: Movable) -> None:
        """Take over a state, from whichever ranks or files hold it now. Only into a fresh engine. Collective."""
        device = torch.device(self._engine.device)
        if different := sorted(set(self.shapes.items()) ^ set(state.shapes.items())):
            raise CheckpointError(f"the state and this student differ in {different}: they are not of one objective.")
        for name, piece in state.moved(self._owned, device):
            values = dict(piece.values)
            for kind in (MASTER, EXP_AVG, EXP_AVG_SQ):
                self._partition.view(self._parameters[name], kind).copy_(values.pop(kind))
            if values:
                self.buffers[name] = values
        self._partition.publish(list(self._parameters.values()))
        self.step = state.step

    def forget_gradients(self) -> None:
        """Before other terms than before decide which parameters get gradients: ZeRO-3 would go on with those of the
        last update that gave one."""
        self._partition.forget_gradients()

    def fingerprints(self) -> tuple[list[str], Tensor]:
        """Names of the parameters that every rank holds whole, and (P,) int64 that ranks of equal weights share: the
        sum of each one's bits. With stage 3 these are the small ones that stay resident."""
        whole = {n: p.data for n, p in self._parameters.items() if p.numel() == self._partition.shape(p).numel()}
        sums = [_bits(weights).sum(dtype=torch.int64) for weights in whole.values()]
        return list(whole), torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(next(iter(self._states()))["step"])

    @step.setter
    def step(self, value: int) -> None:
        for state in self._states():
            state["step"].fill_(value)

    def _states(self) -> list[dict[str, Tensor]]:
        optimizer = self._engine.optimizer.optimizer
        return [optimizer.state[flat] for flat in self._partition.flats()]

    def _seed_moments(self) -> None:
        optimizer = self._engine.optimizer.optimizer
        for flat in self._partition.flats():
            optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                EXP_AVG: torch.zeros_like(flat),
                EXP_AVG_SQ: torch.zeros_like(flat),
            }
        self._partition.link()


class _Partition(Protocol):
    """How one family of ZeRO stages cuts parameters into owned ranges."""

    def flats(self) -> list[Tensor]:
        """The fp32 tensors that the wrapped torch optimizer steps."""
        ...

    def link(self) -> None:
        """Called once the optimizer's state exists."""
        ...

    def shape(self, parameter: nn.Parameter) -> torch.Size: ...

    def owned(self, parameter: nn.Parameter) -> Range: ...

    def view(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """(n,) fp32 view of the owned range of the master or a moment."""
        ...

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """(n,) fp32 averaged gradient of the owned range."""
        ...

    def forget_gradients(self) -> None:
        """Let a parameter that gets no gradient have one of zeros, whatever an earlier update gave it."""
        ...

    def publish(self, parameters: list[nn.Parameter]) -> None:
        """Make the working weights follow the masters. Collective."""
        ...


class _FlatPartition:
    """Stages 1 and 2."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        _spare_passes(optimizer)

    def flats(self) -> list[Tensor]:
        return list(self._optimizer.single_partition_of_fp32_groups)

    def link(self) -> None:
        self._optimizer._lazy_init_hp_params_optimizer_state()

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape

    def owned(self, parameter: nn.Parameter) -> Range:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return Range(0, 0)
        return Range(mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)

    def view(self, parameter: nn.Parameter, kind: str) -> Tensor:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        return (mapping.hp_fragment if kind == MASTER else mapping.get_optim_state_fragment(kind)).detach()

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        index = parameter._index_in_param_group  # type: ignore[attr-defined]
        return parameter._hp_mapping.get_lp_grad_fragment(index).flatten().float()  # type: ignore[attr-defined]

    def forget_gradients(self) -> None:
        """DeepSpeed starts each update from none."""

    def publish(self, parameters: list[nn.Parameter]) -> None:
        self._optimizer.update_lp_params()


class _ParameterPartition:
    """Stage 3. Each rank's part is padded to the same length; views leave the padding out."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def flats(self) -> list[Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def link(self) -> None:
        pass

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.ds_shape  # type: ignore[attr-defined]

    def owned(self, parameter: nn.Parameter) -> Range:
        length = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        start = length * self._optimizer._get_param_partition_rank(parameter)
        return Range(start, max(0, min(length, parameter.ds_numel - start)))  # type: ignore[attr-defined]

    def view(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if kind == MASTER:
            part = safe_get_local_fp32_param(parameter)
        else:
            part = safe_get_local_optimizer_state(parameter, kind)
        return part.detach()[: self.owned(parameter).numel]

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        return safe_get_local_grad(parameter).flatten()[: self.owned(parameter).numel].float()

    def forget_gradients(self) -> None:
        self._optimizer.grad_partitions_flat_buffer.zero_()

    def publish(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            owned = self.owned(parameter).numel
            working: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            working.data[:owned].copy_(self.view(parameter, MASTER))


def _bits(weights: Tensor) -> Tensor:
    return weights.contiguous().view({2: torch.int16, 4: torch.int32}[weights.element_size()])


def _partition_of(engine: DeepSpeedEngine) -> _Partition:
    if engine.zero_optimization_stage() == 3:
        return _ParameterPartition(engine.optimizer)
    return _FlatPartition(engine.optimizer)


def _spare_passes(optimizer: Any) -> None:
    """Two things that a stage 1 or 2 step does to all gradients, more cheaply.

    The look for values that are not finite says nothing that the norm does not say, which `step` looks at too. And
    the norm is taken piece by piece in fp32, where DeepSpeed converts everything to fp64.
    """
    group = optimizer.dp_process_group

    def norm(gradients: Iterable[Tensor], *_: Any, **__: Any) -> Tensor:
        flat = getattr(gradients, "flat_partition", None)  # DeepSpeed's own, where it has them in one piece
        norms = [n for g in ([flat] if flat is not None else gradients) for n in _norms(g.detach().flatten())]
        square = torch.linalg.vector_norm(torch.cat(norms)).square()
        torch.distributed.all_reduce(square, group=group)
        return square.sqrt()

    optimizer.check_overflow = lambda *_, **__: None
    optimizer.get_grad_norm_direct = norm


def _norms(flat: Tensor) -> tuple[Tensor, ...]:
    """Of each piece, and of what is left."""
    whole = flat.numel() // PIECE * PIECE
    body, rest = flat[:whole].view(-1, PIECE), flat[whole:].unsqueeze(0)
    return tuple(torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in (body, rest))


def release(engine: DeepSpeedEngine) -> None:
    """Destroy an engine and cut the references by which DeepSpeed would keep it alive.

    Its forward hooks stay on the module, ZeRO-3 keeps the root module on a global stack, and a cache on a method
    of the parameter coordinator holds every coordinator that ever ran (deepspeed issue 7204). A parameter that is read
    outside the module that owns it, as DeBERTa's relative positions are, outlives it, and knows its optimizer.
    """
    parameters = list(engine.module.parameters())
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]
    _coordinator_cache().cache_clear()
    for parameter in parameters:
        parameter.__dict__.clear()


def collect() -> None:
    """Free what was released: engines are full of reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        trim_heap()  # else every rebuild would look like a leak


def _coordinator_cache() -> Any:
    wrapper = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    return inspect.getclosurevars(wrapper).nonlocals["func"]
