"""Encoded: tokenized examples of a split, end to end in a few arrays, and how rows of them are padded.

Owns what a model reads of an example and its labels. Leaves what an example is to glue.py and squad.py, and which rows
make a batch to examples.py.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from homodistil.batch import Batch

# N examples, B rows of a batch, T tokens, S scored slots per example

WIDTH_MULTIPLE = 8
"""Padded widths are multiples of this: few different shapes, and ones that tensor cores like."""
CHUNK = 1024
"""Examples given to the tokenizer at a time, so that its Python objects stay few."""

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """N examples' tokens one after the other."""

    ids: NDArray[np.int32]
    """(sum of lengths,)"""
    types: NDArray[np.uint8]
    """(sum of lengths,): 1 for the second of two segments; zeros where the tokenizer has no types."""
    bounds: Integers
    """(N + 1,): example n's tokens are bounds[n] to bounds[n + 1]."""
    labels: NDArray[Any]
    """(N, S): int64, or float32 of a regression."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> Integers:
        """(N,): tokens of each example."""
        return np.diff(self.bounds)

    def width(self, numbers: Integers, longest: int) -> int:
        """Tokens that these examples are padded to: a multiple of 8, at most `longest`, which none exceeds."""
        return min(-(-int(self.lengths[numbers].max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, longest)

    def batch(self, numbers: Integers, width: int, pad_token_id: int, last_token: bool = False) -> Batch:
        """The examples of these numbers (B,), on the host, padded on the right to `width`.

        last_token: the scored slot is the last real token, as causal models have it, not the first.
        """
        lengths_B = self.lengths[numbers]
        real_BT = np.arange(width) < lengths_B[:, None]
        places_BT = self.bounds[numbers][:, None] + np.arange(width)
        ids_BT = np.full(real_BT.shape, pad_token_id, dtype=np.int64)
        types_BT = np.zeros(real_BT.shape, dtype=np.int64)
        ids_BT[real_BT], types_BT[real_BT] = self.ids[places_BT[real_BT]], self.types[places_BT[real_BT]]
        labels_BS = self.labels[numbers]
        positions_BS = np.zeros(labels_BS.shape, dtype=np.int64)
        if last_token:
            positions_BS[:] = lengths_B[:, None] - 1
        return Batch(
            input_ids=torch.from_numpy(ids_BT),
            attention_mask=torch.from_numpy(real_BT.astype(np.int64)),
            token_type_ids=torch.from_numpy(types_BT),
            scored_positions=torch.from_numpy(positions_BS),
            labels=torch.from_numpy(labels_BS),
            weights=torch.ones(labels_BS.shape, dtype=torch.float32),
            samples=torch.from_numpy(np.asarray(numbers, dtype=np.int64)),
            padded=not real_BT.all(),
        )

    def digest(self) -> str:
        """SHA-256, in hex, of tokens, types, lengths and labels."""
        digest = hashlib.sha256()
        for part in (self.bounds, self.ids, self.types, self.labels):
            digest.update(part.astype(part.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()


def encode(tokenizer: Any, *texts: Sequence[str], **settings: Any) -> Iterator[tuple[int, Any]]:
    """(n, encoding) of the n-th text, or pair of first and second text; several where it overflows into windows."""
    for start in range(0, len(texts[0]), CHUNK):
        found = tokenizer(*(list(some[start : start + CHUNK]) for some in texts), **settings)
        for row, encoding in enumerate(found.encodings):
            yield start + found.get("overflow_to_sample_mapping", range(CHUNK))[row], encoding


def has_types(tokenizer: Any) -> bool:
    """Whether a tokenizer tells a model which of two segments a token belongs to."""
    return "token_type_ids" in tokenizer.model_input_names


def gather(labelled: Iterable[tuple[Any, Sequence[float]]], dtype: type[np.generic], types: bool) -> Encoded:
    """Encodings, each with its S labels, end to end. types: whether theirs count."""
    ids, kinds, bounds, labels = array("i"), array("B"), array("q", [0]), []
    for encoding, label in labelled:
        ids.extend(encoding.ids)
        kinds.extend(encoding.type_ids)
        bounds.append(len(ids))
        labels.append(label)
    segments = np.frombuffer(kinds, dtype=np.uint8)
    return Encoded(
        ids=np.frombuffer(ids, dtype=np.int32),
        types=segments if types else np.zeros_like(segments),
        bounds=np.frombuffer(bounds, dtype=np.int64),
        labels=np.array(labels, dtype=dtype),
    )
