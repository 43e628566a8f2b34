"""Masked language modelling on the held-out split: any Hugging Face directory, and the guess every model must beat.

Text and masks are those of a run's own validation, so that figures compare. Loss and accuracy are measured by
objective/measures.py; models are loaded by stock.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from homodistil.batch import Batch
from homodistil.config import DataConfig
from homodistil.data.shards import ShardIndex, read_shard
from homodistil.data.stream import Stream
from homodistil.errors import DataError
from homodistil.evaluation.stock import Precision, check_fits, check_kind, device, load_stock
from homodistil.objective.measures import Measures, measure
from homodistil.progress import progress_bar
from homodistil.ranks import Ranks
from homodistil.signals import Signals

logger = logging.getLogger(__name__)

# B sequences, T tokens, S scored slots per sequence, V vocabulary

COUNTED_TOKENS = 20_000_000
"""Enough text to know how frequent tokens are; larger corpora are sampled, shard by shard."""


def evaluate_mlm(
    model: Path, shards: Path, sequences: int, micro_batch: int, dtype: Precision = "float32"
) -> dict[str, float]:
    """`score` of the model in a Hugging Face directory, on up to `sequences` held-out sequences of `shards`.

    On this process alone. Raises `ModelError` for weights that are missing or another vocabulary, `DataError` for
    the shards.
    """
    alone = Ranks(rank=0, world_size=1, local_rank=0, device=device())
    # One lane and one sequence an update divide whatever was built; validation asks for neither.
    stream = Stream(DataConfig(shards=shards, lanes=1, global_batch=1), seed=0, ranks=alone)
    check_fits(model, check_kind(model, "masked"), shards, stream.index)
    loaded = load_stock(model, dtype)
    loaded.to(alone.device)  # type: ignore[arg-type]  # a decorator hides its signature
    return score(loaded, stream.validation(sequences, micro_batch))


@torch.no_grad()
def score(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, float]:
    """mlm_loss (nats a scored position), mlm_accuracy, and tokens_per_second of the forward passes."""
    sums, tokens = [], 0
    with progress_bar("evaluate", len(batches), "batch") as bar:
        started = time.perf_counter()
        for batch in batches:
            rows = batch.to(model.device)
            sums.append(measure(_scored(model, rows), None, rows))
            tokens += batch.input_ids.numel()
            bar.update()
        figures = _figures(sums)  # waits for the device, before the clock is read
        seconds = time.perf_counter() - started
    return {**figures, "tokens_per_second": tokens / seconds}


def unigram(shards: Path, batches: Sequence[Batch], ranks: Ranks, prefix: str = "mlm") -> dict[str, float]:
    """mlm_loss and mlm_accuracy, or with another `prefix`, of guessing each token by how often it is trained on.
    batches: this rank's. Collective."""
    frequencies_V = ranks.once(lambda: token_frequencies(shards))
    surprise_V, likeliest = -frequencies_V.log(), frequencies_V.argmax()
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        labels_BS, weights_BS = batch.labels.cpu(), batch.weights.cpu().double()
        parts = (torch.ones_like(weights_BS), surprise_V[labels_BS], (labels_BS == likeliest).double())
        sums += torch.stack([(part * weights_BS).sum() for part in parts])
    slots, loss, hits = ranks.sum(sums.to(ranks.device)).tolist()
    return {f"{prefix}_loss": loss / max(slots, 1.0), f"{prefix}_accuracy": hits / max(slots, 1.0)}


def token_frequencies(shards: Path) -> Tensor:
    """(V,) float64, sums to 1: how often each token comes in the training split, add-one smoothed.

    Special tokens, which are never masked, count as never seen where words are. Shards that cannot be read are left
    out: a run is not to fail at its very end for a reference figure.
    """
    index = ShardIndex.load(shards, check_files=False)
    step = max(1, index.sequences("train") * index.sequence_length // COUNTED_TOKENS)
    counts_V = np.zeros(index.vocab_size)
    for entry in index.splits["train"][::step]:
        try:
            counts_V += np.bincount(read_shard(shards, index, entry).ravel(), minlength=index.vocab_size)
        except DataError as error:
            logger.warning("not counted for the unigram guess: %s", error)
    if index.task == "mlm":
        counts_V[index.special_tokens.ids] = 0
    return torch.from_numpy((counts_V + 1) / (counts_V + 1).sum())


def _scored(model: PreTrainedModel, batch: Batch) -> Signals:
    logits_BTV = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    index_BSV = batch.scored_positions.unsqueeze(-1).expand(-1, -1, logits_BTV.shape[-1])
    return _only_logits(logits_BTV.gather(1, index_BSV))


def _only_logits(logits_BSV: Tensor) -> Signals:
    return Signals(hidden_states=(), queries_keys=(), attention_scale=1.0, logits=logits_BSV)


def _figures(sums: Sequence[Tensor]) -> dict[str, float]:
    measures = Measures.of(torch.stack(list(sums)).sum(dim=0))
    assert measures.student_accuracy is not None
    return {"mlm_loss": measures.student_loss, "mlm_accuracy": measures.student_accuracy}
