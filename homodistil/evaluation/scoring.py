"""How likely a model finds given tokens: what every measure of language modelling here comes down to.

A question is a sequence and some positions of it; the answers are the tokens that the model is to name there. Which
questions are asked, and what is made of their probabilities, is the neighbours'.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from homodistil.progress import progress_bar

# B questions, T tokens, S positions asked about, D hidden width, V vocabulary

Scores = dict[str, float | str]
"""Name -> figure, or words on how it was measured."""


@dataclass(frozen=True)
class Question:
    """`answers[i]` is the token to be named at `positions[i]`, from 0, of `ids`."""

    ids: Sequence[int]
    positions: Sequence[int]
    answers: Sequence[int]


def continuation(ids: Sequence[int], count: int) -> Question:
    """A causal model's: the last `count` of `ids`, each given those before it."""
    return Question(ids[:-1], range(len(ids) - 1 - count, len(ids) - 1), ids[-count:])


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood, in nats; infinite where a number cannot hold it."""
    return math.exp(nll) if nll < 700 else math.inf


@torch.no_grad()
def score(
    model: PreTrainedModel, questions: Iterable[Question], total: int, micro_batch: int, name: str
) -> tuple[Tensor, Tensor]:
    """Of each question, (total,) on the host: the log-probability of its answers together, in nats, float64; and
    whether each of them was the likeliest token.

    questions: best in order of their lengths, since a batch is padded, on the right, to its longest. name: of the
    progress bar.
    """
    waiting, results = iter(questions), []
    with progress_bar(name, total, "row") as bar:
        while batch := list(islice(waiting, micro_batch)):
            results.append(_score(model, batch))
            bar.update(len(batch))
    log_probability, likeliest = (torch.cat(parts) for parts in zip(*results, strict=True))
    return log_probability.cpu(), likeliest.cpu()


def _score(model: PreTrainedModel, batch: Sequence[Question]) -> tuple[Tensor, Tensor]:
    """(B,) and (B,), of one forward pass, on the model's device."""
    fill = batch[0].ids[0]  # any token will do: nothing sees it
    ids_BT, mask_BT = (tensor.to(model.device) for tensor in _padded([one.ids for one in batch], fill))
    positions_BS, asked_BS = (tensor.to(model.device) for tensor in _padded([one.positions for one in batch], 0))
    answers_BS = _padded([one.answers for one in batch], 0)[0].to(model.device)
    logits_BSV = logits_at(model, ids_BT, mask_BT, positions_BS).float()
    log_probability_BS = logits_BSV.gather(2, answers_BS[..., None]).squeeze(2) - logits_BSV.logsumexp(dim=2)
    likeliest_BS = (logits_BSV.argmax(dim=2) == answers_BS) | (asked_BS == 0)
    return (log_probability_BS.double() * asked_BS).sum(dim=1), likeliest_BS.all(dim=1)


def _padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """(B, longest) int64, filled up on the right; and as many of 1 where they are a row's own, 0 where filled up."""
    lengths_B = torch.tensor([len(row) for row in rows])
    longest = int(lengths_B.max())
    values = torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])
    return values, (torch.arange(longest) < lengths_B[:, None]).long()


def logits_at(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, positions_BS: Tensor) -> Tensor:
    """(B, S, V): a model's logits at some positions of each sequence.

    The matrix over the vocabulary, half of a small model's work, is applied there alone, wherever the model has it as a
    linear module of its own.
    """
    with _head_at(model, positions_BS) as applied:
        logits = model(input_ids=ids_BT, attention_mask=mask_BT).logits
    return logits if applied else _at(logits, positions_BS)


@contextmanager
def _head_at(model: PreTrainedModel, positions_BS: Tensor) -> Iterator[list[nn.Module]]:
    """Meanwhile the output embeddings see these positions only. Yields a list that they are in once they were used."""
    applied: list[nn.Module] = []

    def choose(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        applied.append(head)
        return (_at(inputs[0], positions_BS),)

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(choose) if isinstance(head, nn.Linear) else None
    try:
        yield applied
    finally:
        if handle:
            handle.remove()


def _at(states_BTD: Tensor, positions_BS: Tensor) -> Tensor:
    return states_BTD.gather(1, positions_BS.unsqueeze(-1).expand(-1, -1, states_BTD.shape[-1]))
