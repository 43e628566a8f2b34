"""Fragments seen as rows: the flat range a rank owns of a parameter, padded to whole rows of its first axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

# n elements of the fragment, R rows that it touches, C elements per row


def row_span(shape: torch.Size, start: int, count: int) -> tuple[int, int, int]:
    """(first row, end row, elements per row) of flat elements [start, start + count), count > 0."""
    length = math.prod(shape[1:])
    return start // length, -(-(start + count) // length), length


def whole_rows(values: Tensor, shape: torch.Size, start: int) -> tuple[int, Tensor]:
    """The first row's index, and the fragment (n,) as (R, *shape[1:]), zero where the rank owns nothing."""
    first, end, length = row_span(shape, start, len(values))
    before, after = start - first * length, end * length - start - len(values)
    padded = functional.pad(values, (before, after)) if before or after else values  # a pad by nothing copies
    return first, padded.view(end - first, *shape[1:])
