"""Physical narrowing of modules and of flat fragments by kept positions. Which positions is the plan's business."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from homodistil.models.groups import Positions
from homodistil.pruning.rows import row_span
from homodistil.state import Piece, StudentState


def narrow(model: nn.Module, positions: Positions) -> None:
    """Replace every parameter that `positions` names by its kept part, in place; any device, meta included.

    Tied parameters stay one; `requires_grad` stays; module attributes that repeat a tensor's shape follow.
    """
    by_parameter = _by_parameter(positions)
    named = dict(model.named_parameters(remove_duplicate=False))
    if unknown := sorted(set(by_parameter) - set(named)):
        raise KeyError(f"positions for parameters that the model does not have: {unknown}")
    narrowed = {id(named[name]): _narrowed_parameter(named[name], axes) for name, axes in by_parameter.items()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in narrowed:
                setattr(module, name, narrowed[id(parameter)])
        _follow_shapes(module)


def slice_flat(
    values: Tensor, shape: torch.Size, start: int, positions_by_axis: Mapping[int, Tensor]
) -> tuple[Tensor, int]:
    """Narrow the flat fragment [start, start + n) of a row-major parameter of `shape`.

    values: (..., n). Because kept positions ascend, what remains is again one contiguous range of the narrowed
    parameter. Returns the kept values (..., m), a contiguous copy, and where they start in it.
    """
    if not positions_by_axis:
        return values.clone(), start
    count = values.shape[-1]
    first, end, length = row_span(shape, start, count)
    masks = [_axis_mask(size, positions_by_axis.get(axis)) for axis, size in enumerate(shape)]
    kept = masks[0][first:end]
    for mask in masks[1:]:
        kept = kept.unsqueeze(-1) & mask
    skip = start - first * length
    kept_per_row = math.prod(int(mask.sum()) for mask in masks[1:])
    new_start = int(masks[0][:first].sum()) * kept_per_row + int(kept.flatten()[:skip].sum())
    return values[..., kept.flatten()[skip : skip + count].to(values.device)], new_start


def sliced(state: StudentState, positions: Positions) -> StudentState:
    """A rank's share of the narrowed parameters: masters, moments and buffers, cut by the same positions."""
    by_parameter = _by_parameter(positions)
    pieces = {name: _sliced_piece(piece, by_parameter.get(name, {})) for name, piece in state.pieces.items()}
    shapes = {name: _narrowed_shape(shape, by_parameter.get(name, {})) for name, shape in state.shapes.items()}
    return replace(state, pieces={n: p for n, p in pieces.items() if p.range.numel}, shapes=shapes)


def _sliced_piece(piece: Piece, axes: Mapping[int, Tensor]) -> Piece:
    cut = {kind: slice_flat(values, piece.shape, piece.start, axes) for kind, values in piece.values.items()}
    start = next(iter(cut.values()))[1]
    return Piece(_narrowed_shape(piece.shape, axes), start, {kind: values for kind, (values, _) in cut.items()})


def _narrowed_shape(shape: torch.Size, axes: Mapping[int, Tensor]) -> torch.Size:
    return torch.Size(len(axes[axis]) if axis in axes else size for axis, size in enumerate(shape))


def _narrowed_parameter(parameter: nn.Parameter, axes: Mapping[int, Tensor]) -> nn.Parameter:
    values = parameter.detach()
    for axis, kept in axes.items():
        values = values.index_select(axis, kept.to(values.device))
    return nn.Parameter(values.contiguous(), parameter.requires_grad)


def _by_parameter(positions: Positions) -> dict[str, dict[int, Tensor]]:
    axes: dict[str, dict[int, Tensor]] = {}
    for (name, axis), kept in positions.items():
        axes.setdefault(name, {})[axis] = kept
    return axes


def _axis_mask(size: int, kept: Tensor | None) -> Tensor:
    if kept is None:
        return torch.ones(size, dtype=torch.bool)
    return torch.zeros(size, dtype=torch.bool).index_fill(0, kept.cpu(), True)


def _follow_linear(module: nn.Linear) -> None:
    module.out_features, module.in_features = module.weight.shape


def _follow_conv1d(module: Conv1D) -> None:
    module.nx, module.nf = module.weight.shape


def _follow_convolution(module: nn.Conv1d) -> None:
    assert module.groups == 1, "each output sees all inputs"
    module.out_channels, module.in_channels = module.weight.shape[:2]


def _follow_embedding(module: nn.Embedding) -> None:
    module.embedding_dim = module.weight.shape[1]


def _follow_norm(module: nn.LayerNorm) -> None:
    module.normalized_shape = tuple(module.weight.shape)


_FOLLOWERS: dict[type[nn.Module], Callable[..., None]] = {
    nn.Linear: _follow_linear,
    Conv1D: _follow_conv1d,
    nn.Conv1d: _follow_convolution,
    nn.Embedding: _follow_embedding,
    nn.LayerNorm: _follow_norm,
}
"""Module types that repeat a tensor's shape in attributes."""


def _follow_shapes(module: nn.Module) -> None:
    for kind, follow in _FOLLOWERS.items():
        if isinstance(module, kind):
            follow(module)
