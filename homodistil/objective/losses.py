"""The objective's terms as pure functions, each a sum over its elements: the caller divides by a count.

Low-precision inputs are added up in fp32, fp64 stays fp64. Nothing here knows a weight, a shape or a configuration.
"""

# B sequences, S scored slots, V vocabulary, k ids kept of it, T tokens, D compared dimensions, A heads

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from homodistil.kernels.gram_attention import QueriesKeys, ScoreDifference
from homodistil.kernels.precision import at_least_fp32, without_autocast
from homodistil.kernels.squares import squared_error
from homodistil.sparse_targets import SparseTargets
from homodistil.tasks import Kind


def cross_entropy(logits_BSV: Tensor, labels_BS: Tensor, weights_BS: Tensor) -> Tensor:
    """Sum over slots of weight * -log p(label), in nats: of masked words (Devlin et al. 2019), next ones, classes."""
    losses = F.cross_entropy(at_least_fp32(logits_BSV).flatten(0, 1), labels_BS.flatten(), reduction="none")
    return (losses * weights_BS.flatten()).sum()


def squared_differences(predicted_BS1: Tensor, wanted_BS: Tensor, weights_BS: Tensor) -> Tensor:
    """Sum over slots of weight * (prediction - wanted)^2: a regression's loss, and its distance from its teacher."""
    return (weights_BS * (at_least_fp32(predicted_BS1).squeeze(-1) - wanted_BS).square()).sum()


def task_loss(kind: Kind, logits_BSV: Tensor, labels_BS: Tensor, weights_BS: Tensor) -> Tensor:
    """Sum over slots of the loss that a kind of task is trained with."""
    loss = squared_differences if kind == "regression" else cross_entropy
    return loss(logits_BSV, labels_BS, weights_BS)


def task_divergence(
    kind: Kind, student_BSV: Tensor, teacher_BSV: Tensor, weights_BS: Tensor, temperature: float = 1.0
) -> Tensor:
    """Sum over slots of how far the student's predictions are from its teacher's: KL(teacher || student) in nats at
    `temperature`; for a regression, which has no distribution, the squared difference."""
    if kind == "regression":
        return squared_differences(student_BSV, at_least_fp32(teacher_BSV).squeeze(-1), weights_BS)
    student_log_p, teacher_log_p = (log_probabilities(logits, temperature) for logits in (student_BSV, teacher_BSV))
    return divergence(student_log_p, teacher_log_p, weights_BS)


def log_probabilities(logits_BSV: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(z / T) over the vocabulary."""
    return torch.log_softmax(at_least_fp32(logits_BSV) / temperature, dim=-1)


def divergence(student_log_p_BSV: Tensor, teacher_log_p_BSV: Tensor, weights_BS: Tensor) -> Tensor:
    """Sum over slots of weight * KL(teacher || student), in nats (Hinton et al. 2015).

    At a temperature T, give `log_probabilities` at T and multiply by T^2, which keeps the gradient's size.
    """
    kl_BSV = F.kl_div(student_log_p_BSV, teacher_log_p_BSV, log_target=True, reduction="none")
    return (weights_BS * kl_BSV.sum(dim=-1)).sum()


def sparse_divergence(student_log_p_BSV: Tensor, targets: SparseTargets, weights_BS: Tensor) -> Tensor:
    """Sum over slots of weight * KL(target || student), in nats, where targets keep a few ids of each slot.

    All ids that are not kept count as one, with the sum of their probabilities, which can only lower a KL. Of random
    targets it is right on average, and may be negative.
    """
    used_BSk = targets.log_mass > -torch.inf
    ids_BSk = targets.ids.where(used_BSk, targets.ids[..., :1])
    log_p_BSk = student_log_p_BSV.gather(-1, ids_BSk).masked_fill(~used_BSk, 0)
    nothing = torch.finfo(student_log_p_BSV.dtype).min
    log_rest_BS = student_log_p_BSV.scatter(-1, ids_BSk, nothing).logsumexp(dim=-1)
    cross_BS = (targets.log_mass.exp() * log_p_BSk).sum(dim=-1) + targets.tail.exp() * log_rest_BS
    return (weights_BS * (targets.entropy - cross_BS)).sum()


def hidden_difference(student_BTD: Tensor, teacher_BTD: Tensor, valid_BT: Tensor, variance: float = 1.0) -> Tensor:
    """Sum over tokens, padding left out, of the squared difference averaged over dimensions, divided by `variance`."""
    return squared_error(student_BTD, teacher_BTD, valid_BT) / (student_BTD.shape[-1] * variance)


def score_difference(
    student: QueriesKeys, teacher: QueriesKeys, valid_BT: Tensor, scale: float, form: ScoreDifference
) -> Tensor:
    """Sum over valid pairs and heads of the squared difference of pre-softmax scores (Jiao et al. 2020, TinyBERT).

    `form` is one of kernels.gram_attention's; `scale` is 1 / sqrt(head width of the original model), for both.
    """
    return scale**2 * form(student, teacher, valid_BT)


def centred(queries_keys: QueriesKeys, valid_BT: Tensor) -> QueriesKeys:
    """The same queries, and keys less their sequence's mean valid key.

    A query's scores lose their mean over the keys, a constant that softmax ignores; what is left is what it sees.
    """
    query, key = queries_keys[0], at_least_fp32(queries_keys[1])
    valid_B1T1 = valid_BT[:, None, :, None].to(key.dtype)
    mean = (key * valid_B1T1).sum(dim=2, keepdim=True) / valid_B1T1.sum(dim=2, keepdim=True).clamp(min=1)
    return query, key - mean


def causally_centred(queries_keys: QueriesKeys, valid_BT: Tensor) -> QueriesKeys:
    """`centred` where a query sees no later keys: its scores lose their mean over the valid keys up to its own.

    That mean key is another for each query, so it becomes one more dimension, the first: the query's product with it,
    negated, which meets a 1 in every key. (B, A, T, d) -> (B, A, T, 1 + d) each.
    """
    query, key = map(at_least_fp32, queries_keys)
    valid_B1T1 = valid_BT[:, None, :, None].to(key.dtype)
    mean = (key * valid_B1T1).cumsum(dim=2) / valid_B1T1.cumsum(dim=2).clamp(min=1)
    lost = -(query * mean).sum(dim=-1, keepdim=True)
    return torch.cat([lost, query], dim=-1), torch.cat([torch.ones_like(lost), key], dim=-1)


def probability_difference(
    student: QueriesKeys, teacher: QueriesKeys, valid_BT: Tensor, scale: float, causal: bool = False
) -> Tensor:
    """Sum over valid pairs and heads of the squared difference of attention probabilities."""
    hidden = valid_BT[:, None, None, :] == 0
    if causal:
        tokens = valid_BT.shape[1]
        hidden = hidden | torch.ones((tokens, tokens), dtype=torch.bool, device=hidden.device).triu(1)
    difference = _probabilities(student, hidden, scale) - _probabilities(teacher, hidden, scale)
    return (difference.square().sum(dim=-1) * valid_BT[:, None, :]).sum()  # at hidden keys both are 0


def _probabilities(queries_keys: QueriesKeys, hidden: Tensor, scale: float) -> Tensor:
    query, key = map(at_least_fp32, queries_keys)
    with without_autocast(query):
        scores = query @ key.mT * scale
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(dim=-1)
