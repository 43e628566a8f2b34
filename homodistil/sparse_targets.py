"""Sparse targets: what is kept of a distribution over a vocabulary, as a KL divergence looks at it.

A value, like `Signals`: knowledge/targets.py makes it, objective/losses.py and kernels/sparse_vocabulary.py compare
with it, and those three know only it of each other.
"""

# ... scored slots, k ids that are kept of each, V vocabulary

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SparseTargets(NamedTuple):
    """KL(target || student) = entropy - sum over ids of mass * log p(id) - tail mass * log p(all other ids).

    Masses and tail sum to 1. A slot of no mass is unused and its id is ignored; the first is used, and used ids differ.
    """

    ids: Tensor
    """(..., k), int64."""
    log_mass: Tensor
    """(..., k): log of the target's mass at each id; -inf in unused slots."""
    tail: Tensor
    """(...): log of the mass of all other ids together; -inf: there is none, and nothing is asked of the others."""
    entropy: Tensor
    """(...): minus an entropy, in nats, constant to the student: the target's own (`negative_entropy`), or for a random
    target its teacher's, so that the expected KL is the teacher's."""


def negative_entropy(log_mass: Tensor, tail: Tensor) -> Tensor:
    """Sum of mass * log mass over the ids and the tail, (..., k) and (...) -> (...), in nats; no mass adds nothing."""
    return _mass_times_log(log_mass).sum(dim=-1) + _mass_times_log(tail)


def _mass_times_log(log_mass: Tensor) -> Tensor:
    return log_mass.exp() * log_mass.clamp(min=torch.finfo(log_mass.dtype).min)  # 0 * -inf is not a number
