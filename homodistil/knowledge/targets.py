"""Codecs of a teacher's predictions: logits to the few ids and masses that are kept of them, and back.

The temperature is part of a codec: what is kept of a softened distribution cannot be softened again. Arrays are
row-aligned, as those of values.py. How far a student is from such targets is objective/'s and kernels/'.
"""

# N scored slots, V vocabulary, k ids that are kept of each, D draws

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from homodistil.data.hashing import Hashes, counter_hash
from homodistil.errors import ModelError
from homodistil.kernels.precision import at_least_fp32
from homodistil.kernels.vocabulary import few_at_a_time, warm
from homodistil.knowledge.values import Arrays
from homodistil.sparse_targets import SparseTargets, negative_entropy


class TargetCodec(Protocol):
    """(N, V) logits to arrays of N rows, and to `SparseTargets`. Rows do not influence each other."""

    def encode(self, logits_NV: Tensor, keys_N: Hashes) -> Arrays:
        """`keys_N`: a hash of each slot, from which random choices follow and from nothing else. Raises ModelError for
        logits that are no distribution's."""
        ...

    def decode(self, arrays: Mapping[str, Tensor]) -> SparseTargets:
        """Of the arrays of any rows, on the device that they are on, without waiting for it."""
        ...

    def bytes_per_row(self, vocabulary: int) -> int: ...


@dataclass(frozen=True)
class TopK:
    """The k most probable ids, most probable first, ties to the lowest id, and one bucket for the mass of all others.

    The KL of such targets is that of two distributions over k + 1 things: never more than the KL of all V, and the same
    from k = V on. Logarithms of masses are stored in fp16, and masses made to sum to 1 again. Each is then off by at
    most 2^-11 |log mass| of itself, and the target at most 2^-23 E[log^2 mass] nats from the teacher's: some 1e-6.
    """

    k: int
    temperature: float = 1.0

    def targets(self, logits_NV: Tensor) -> SparseTargets:
        """Of logits, (N, V), before they are rounded to be stored."""
        parts = [_most_probable(logits_NV[rows], self.k, self.temperature) for rows in few_at_a_time(logits_NV)]
        ids_Nk, log_mass_Nk, tail_N = map(torch.cat, zip(*parts, strict=True))
        return SparseTargets(ids_Nk, log_mass_Nk, tail_N, negative_entropy(log_mass_Nk, tail_N))

    def encode(self, logits_NV: Tensor, keys_N: Hashes) -> Arrays:
        found = self.targets(logits_NV)
        _refuse_nan(found.entropy)
        return {
            "ids": _ids(found.ids, logits_NV.shape[-1]),
            "log_mass": found.log_mass.half().cpu().numpy(),
            "tail": found.tail.half().cpu().numpy(),
        }

    def decode(self, arrays: Mapping[str, Tensor]) -> SparseTargets:
        buckets = torch.cat([arrays["log_mass"], arrays["tail"].unsqueeze(-1)], dim=-1).float().log_softmax(dim=-1)
        log_mass, tail = buckets[..., :-1], buckets[..., -1]
        return SparseTargets(arrays["ids"].to(torch.int64), log_mass, tail, negative_entropy(log_mass, tail))

    def bytes_per_row(self, vocabulary: int) -> int:
        k = min(self.k, vocabulary)
        return k * (_id_dtype(vocabulary).itemsize + 2) + 2


@dataclass(frozen=True)
class Draws:
    """Ids drawn from softmax(logits / temperature), each with its share of the draws as its mass.

    The j-th of D draws is made from the j-th D-th of the distribution (stratified sampling): an id of probability q
    still gets D q draws on average, so the KL and its gradient are right on average, but never fewer than D q - 2 or
    more than D q + 2. Draws are stored one by one, in ascending order: in rows of one width that takes less than
    different ids and their counts.
    """

    draws: int
    temperature: float = 1.0

    def encode(self, logits_NV: Tensor, keys_N: Hashes) -> Arrays:
        uniform_ND = torch.from_numpy(_stratified(keys_N, self.draws)).to(logits_NV.device)
        parts = [_drawn(logits_NV[rows], uniform_ND[rows], self.temperature) for rows in few_at_a_time(logits_NV)]
        ids_ND, entropy_N = map(torch.cat, zip(*parts, strict=True))
        _refuse_nan(entropy_N)
        return {"ids": _ids(ids_ND, logits_NV.shape[-1]), "entropy": entropy_N.float().cpu().numpy()}

    def decode(self, arrays: Mapping[str, Tensor]) -> SparseTargets:
        """Runs of one id become one slot, in order; the slots that are left over come last."""
        ids = arrays["ids"].to(torch.int64)
        begins = torch.ones_like(ids)
        begins[..., 1:] = ids[..., 1:] != ids[..., :-1]
        slots = begins.cumsum(dim=-1) - 1
        counts = torch.zeros_like(ids).scatter_add(-1, slots, torch.ones_like(ids))
        log_mass = counts.float().log() - torch.tensor(float(self.draws)).log()
        tail = torch.full_like(arrays["entropy"], -torch.inf)
        return SparseTargets(torch.zeros_like(ids).scatter(-1, slots, ids), log_mass, tail, arrays["entropy"])

    def bytes_per_row(self, vocabulary: int) -> int:
        return self.draws * _id_dtype(vocabulary).itemsize + 4


def _most_probable(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, their log masses, and the log mass of all others, which is added up, not what is left of 1."""
    ids = _first(logits, min(k, logits.shape[-1]))
    log_q = warm(at_least_fp32(logits), temperature).log_softmax(dim=-1)
    rest_q = log_q.exp().scatter_(-1, ids, 0)
    return ids, log_q.gather(-1, ids), rest_q.sum(dim=-1).log()


def _first(logits: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits, as fp32 orders them, the lowest id first where they are equal.

    topk alone orders equals as it likes, and in bf16 many are equal. So it is given whole numbers that differ: above,
    the bits of fp32, turned round where they are negative; below, how many ids come after this one.
    """
    bits = (logits.float() + 0.0).view(torch.int32)  # -0 + 0 is 0
    last = logits.shape[-1] - 1
    ranks = (bits ^ ((bits >> 31) & (2**31 - 1))).to(torch.int64).bitwise_left_shift_(32)
    ranks += last - torch.arange(last + 1, device=logits.device)
    return last - ranks.topk(k, dim=-1).values.bitwise_and(2**32 - 1)


def _drawn(logits: Tensor, uniform_ND: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids by the inverse of the cumulative distribution, which is added up in fp64; and minus the teacher's entropy."""
    log_q = warm(at_least_fp32(logits), temperature).log_softmax(dim=-1)
    cumulative = log_q.exp().cumsum(dim=-1, dtype=torch.float64)
    ids = torch.searchsorted(cumulative, uniform_ND * cumulative[:, -1:], right=True)
    return ids, negative_entropy(log_q, log_q.new_tensor(-torch.inf))


def _stratified(keys_N: Hashes, draws: int) -> NDArray[np.float64]:
    """(N, D) in [0, 1), the j-th in [j, j + 1) / D."""
    draw_D = np.arange(draws)
    uniform_ND = (counter_hash(keys_N[:, None], draw_D) >> np.uint64(11)) * 2.0**-53
    return np.minimum((draw_D + uniform_ND) / draws, np.nextafter(1, 0))


def _refuse_nan(made_of_logits_N: Tensor) -> None:
    strange = made_of_logits_N.isnan()
    if strange.any():
        raise ModelError(
            f"the teacher's logits: {int(strange.sum())} of {len(strange)} slots have one that is not a number or "
            f"infinite, the first is slot {int(strange.nonzero()[0])} of this batch. A cache can only keep a "
            f"distribution: run the teacher in fp32 or bf16, or mend its weights."
        )


def _ids(ids: Tensor, vocabulary: int) -> NDArray[Any]:
    return ids.cpu().numpy().astype(_id_dtype(vocabulary))


def _id_dtype(vocabulary: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
