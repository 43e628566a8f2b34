"""Narrowing against plain indexing: modules, flat fragments, whole states."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from homodistil.pruning.surgery import narrow, slice_flat, sliced
from homodistil.state import Piece, StudentState


def some(random: torch.Generator, count: int) -> Tensor:
    """At least one of `count` positions, ascending."""
    kept = int(torch.randint(1, count + 1, (1,), generator=random))
    return torch.randperm(count, generator=random)[:kept].sort().values


def indexed(whole: Tensor, axes: dict[int, Tensor]) -> Tensor:
    for axis, kept in axes.items():
        whole = whole.index_select(axis, kept)
    return whole


@pytest.mark.parametrize("shape", [(72,), (136, 72), (997, 72), (5, 7, 3)], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_fragments_of_a_narrowed_parameter_put_together_are_the_indexed_parameter(
    shape: tuple[int, ...], seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    whole = torch.randn(shape, generator=random)
    chosen = [axis for axis in range(len(shape)) if torch.rand(1, generator=random) < 0.7] or [0]
    axes = {axis: some(random, shape[axis]) for axis in chosen}
    expected = indexed(whole, axes).flatten()
    cuts = torch.randint(0, whole.numel() + 1, (6,), generator=random).tolist()
    bounds = sorted([0, whole.numel(), *cuts, cuts[0]])  # one fragment is empty for sure
    reached = 0
    for start, end in itertools.pairwise(bounds):
        kept, new_start = slice_flat(whole.flatten()[start:end], whole.shape, start, axes)
        assert new_start == reached
        assert torch.equal(kept, expected[new_start : new_start + len(kept)])
        reached += len(kept)
    assert reached == len(expected)


def test_a_fragment_that_loses_everything_is_empty_and_knows_its_place() -> None:
    kept, start = slice_flat(torch.arange(8.0), torch.Size((6, 4)), 8, {0: torch.tensor([0, 1, 5])})
    assert (kept.numel(), start) == (0, 8)


def test_a_fragment_of_an_untouched_parameter_is_copied() -> None:
    values = torch.arange(5.0)
    kept, start = slice_flat(values, torch.Size((9,)), 3, {})
    assert torch.equal(kept, values) and start == 3 and kept.data_ptr() != values.data_ptr()


def test_several_rows_of_values_are_cut_alike() -> None:
    values = torch.arange(20.0).view(2, 10)
    both, start = slice_flat(values, torch.Size((5, 4)), 5, {1: torch.tensor([1, 2])})
    each = [slice_flat(row, torch.Size((5, 4)), 5, {1: torch.tensor([1, 2])}) for row in values]
    assert torch.equal(both, torch.stack([kept for kept, _ in each])) and {start} == {s for _, s in each}


class Tied(nn.Module):
    """An embedding, a norm, a transposed linear, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.mix = Conv1D(4, 6)
        self.back = nn.Linear(4, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight
        self.norm.bias.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.back(self.mix(self.norm(self.embed(ids)))))


KEPT, INNER = torch.tensor([0, 2, 5]), torch.tensor([1, 3])
POSITIONS = {
    ("embed.weight", 1): KEPT,
    ("norm.weight", 0): KEPT,
    ("norm.bias", 0): KEPT,
    ("mix.weight", 0): KEPT,
    ("mix.weight", 1): INNER,
    ("mix.bias", 0): INNER,
    ("back.weight", 0): KEPT,
    ("back.weight", 1): INNER,
    ("back.bias", 0): KEPT,
}


def test_a_narrowed_module_computes_with_the_kept_parts_alone() -> None:
    torch.manual_seed(0)
    model = Tied()
    ids, w = torch.tensor([[1, 4, 9]]), {name: p.detach().clone() for name, p in model.named_parameters()}
    narrow(model, POSITIONS)
    x = torch.nn.functional.layer_norm(
        w["embed.weight"][ids][..., KEPT], (3,), w["norm.weight"][KEPT], w["norm.bias"][KEPT]
    )
    x = x @ w["mix.weight"][KEPT][:, INNER] + w["mix.bias"][INNER]
    x = x @ w["back.weight"][KEPT][:, INNER].T + w["back.bias"][KEPT]
    torch.testing.assert_close(model(ids), x @ w["embed.weight"][:, KEPT].T + w["head.bias"])


def test_tied_parameters_stay_one_and_frozen_ones_frozen() -> None:
    model = Tied()
    narrow(model, POSITIONS)
    assert model.head.weight is model.embed.weight
    assert not model.norm.bias.requires_grad and model.norm.weight.requires_grad
    assert all(p.is_leaf and p.is_contiguous() for p in model.parameters())


def test_module_attributes_follow_the_tensors() -> None:
    model = Tied().to("meta")
    narrow(model, POSITIONS | {("head.weight", 1): KEPT} if model.head.weight is not model.embed.weight else POSITIONS)
    assert model.embed.embedding_dim == 3 and model.norm.normalized_shape == (3,)
    assert (model.mix.nx, model.mix.nf) == (3, 2)
    assert (model.back.in_features, model.back.out_features, model.head.in_features) == (2, 3, 3)
    assert all(p.is_meta for p in model.parameters())


def test_a_position_for_a_parameter_that_is_not_there_is_refused() -> None:
    with pytest.raises(KeyError, match=r"nose\.weight"):
        narrow(Tied(), {("nose.weight", 0): KEPT})


def test_a_sliced_state_is_the_state_of_the_indexed_tensors() -> None:
    torch.manual_seed(0)
    shapes = {"a": torch.Size((7, 5)), "b": torch.Size((7,)), "c": torch.Size((3, 2))}
    positions = {("a", 0): torch.tensor([0, 3, 4]), ("a", 1): torch.tensor([1, 4]), ("b", 0): torch.tensor([6])}
    full = {name: {kind: torch.randn(shape) for kind in ("master", "exp_avg")} for name, shape in shapes.items()}
    owned = {"a": (8, 30), "b": (0, 6), "c": (2, 6)}
    pieces = {
        name: Piece(shapes[name], start, {kind: t.flatten()[start:end] for kind, t in full[name].items()})
        for name, (start, end) in owned.items()
    }
    state = sliced(StudentState(pieces, shapes, 9), positions)
    assert state.shapes == {"a": (3, 2), "b": (1,), "c": (3, 2)} and state.step == 9
    assert set(state.pieces) == {"a", "c"}  # nothing of b is left here
    for name, axes in (("a", {0: positions["a", 0], 1: positions["a", 1]}), ("c", {})):
        piece = state.pieces[name]
        for kind, kept in piece.values.items():
            expected = indexed(full[name][kind], axes).flatten()
            assert torch.equal(kept, expected[piece.start : piece.start + len(kept)])
    assert len(state.pieces["a"].values["master"]) == 4  # rows 3 and 4 lie in the fragment, row 0 does not
