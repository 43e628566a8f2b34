"""What a micro-batch costs, counted operation by operation on tensors that hold nothing.

The real modules run once on the meta device: forward of the teacher, forward and backward of the student. So a count
follows the code, whatever the shape, the objective and the switches are, and takes a second or two.
"""

# B sequences, T tokens, S scored slots

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from homodistil.batch import Batch
from homodistil.knowledge.teacher import FrozenModel
from homodistil.models.attention import attention_implementation, register
from homodistil.models.loading import skeleton
from homodistil.models.shape import Widths
from homodistil.student import Blueprint, Student, as_tuple
from homodistil.tasks import Kind

VIEWS = {"_unsafe_view", "_reshape_alias"}
"""Views that the schema does not mark as such."""


@dataclass(frozen=True)
class Cost:
    """Of one micro-batch on one rank."""

    products: float
    """FLOP of matrix products."""
    batched: float
    """FLOP of products per attention head: of maps, and of the attention loss."""
    attention: float
    """FLOP of SDPA kernels."""
    backward: float
    """FLOP of these three that are the student's backward pass."""
    traffic: float
    """Bytes that all other operations read and write."""
    operations: int
    """Kernels that are started."""
    activations: float
    """Bytes alive at once at the peak, besides weights and what the optimizer holds."""
    parameters: int
    """Trained ones, aligners included."""
    largest: int
    """Elements of the largest trainable parameter."""
    teacher_parameters: int

    @property
    def flops(self) -> float:
        return self.products + self.batched + self.attention


def micro_batch_cost(
    blueprint: Blueprint, widths: Widths, sequences: int, length: int, dtype: torch.dtype, maps: bool = False
) -> Cost:
    """Of a student of these widths beside the whole teacher, if the run has one, on full sequences. maps: attention
    is written out."""
    attention = attention_implementation("eager") if maps else register("homodistil_counted", _one_kernel)
    blueprint, family = replace(blueprint, attention=attention), blueprint.family
    student = _on_meta(Student.unfilled(blueprint, blueprint.full_shape.first(widths)), dtype).train()
    rows = _full_batch(sequences, length, _slots(blueprint, length))
    teacher = None
    if blueprint.run.teacher.path is not None:
        whole = skeleton(blueprint.teacher_config, attention, family.kind)
        frozen = FrozenModel(whole, family, blueprint.compared, blueprint.teacher_filters, blueprint.selection)
        teacher = _on_meta(frozen, dtype)
    for parameter in student.parameters():  # ZeRO takes a gradient as soon as it is there
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    is_live = blueprint.run.has_live_teacher
    recorded = teacher(*as_tuple(rows) or ()) if teacher and not is_live else None
    with FlopCounterMode(display=False) as products, _Counter() as counter:
        knowledge = teacher(*as_tuple(rows) or ()) if teacher and is_live else recorded
        total, _ = student(as_tuple(rows), knowledge, torch.ones(4, dtype=torch.float64, device="meta"))
        forward = products.get_total_flops()
        total.backward()
    trained = [p.numel() for p in student.parameters() if p.requires_grad]
    flops: dict[Any, int] = products.get_flop_counts()["Global"]
    batched = flops.get(torch.ops.aten.bmm, 0)
    dense = sum(flops.get(packet, 0) for packet in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return Cost(
        products=dense,
        batched=batched,
        attention=products.get_total_flops() - dense - batched,
        backward=products.get_total_flops() - forward,
        traffic=counter.traffic,
        operations=counter.operations,
        activations=counter.peak,
        parameters=sum(trained),
        largest=max(trained),
        teacher_parameters=sum(p.numel() for p in teacher.parameters()) if teacher and is_live else 0,
    )


class _Counter(TorchDispatchMode):
    """Bytes and kernels of all that is dispatched, and the most bytes that its results held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = self.peak = self._held = 0.0
        self.operations = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in VIEWS or any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return results
        self.operations += 1
        made = _tensors(results)
        if func._overloadpacket not in flop_registry:
            read = made if name == "embedding" else _tensors((args, kwargs))  # of a table, the rows that are asked for
            self.traffic += sum(tensor.nbytes for tensor in (*made, *read))
        for tensor in made:
            self._hold(tensor.untyped_storage())
        return results

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        self._held += storage.nbytes()
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, count: int) -> None:
        self._held -= count


def _one_kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """SDPA in one piece, as on a real device; on the meta device it would fall apart into maps."""
    output = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return output.transpose(1, 2).contiguous(), None


def _on_meta(module: Any, dtype: torch.dtype) -> Any:
    module = module.to("meta").to(dtype)
    module.model.tie_weights()  # moving to the meta device made two of one
    return module


def _slots(blueprint: Blueprint, length: int) -> int:
    """Scored slots of a sequence."""
    masked = round(blueprint.run.data.mask_probability * length)
    slots: dict[Kind, int] = {"masked": masked, "causal": length - 1, "classification": 1, "regression": 1, "span": 2}
    return slots[blueprint.family.kind]


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _full_batch(sequences: int, length: int, slots: int) -> Batch:
    def numbers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens, scored = (sequences, length), (sequences, slots)
    weights = numbers(*scored, dtype=torch.float32)
    ids, mask, segments = (numbers(*tokens) for _ in range(3))
    return Batch(ids, mask, segments, numbers(*scored), numbers(*scored), weights, numbers(sequences), False)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
