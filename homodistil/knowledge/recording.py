"""Recording: how a teacher's knowledge of a sequence becomes a row of arrays, and how rows become knowledge again.

A row holds the masked input, so that it can be told whose it is; the kept positions, units and values of every
compared state; and what the teacher expects at the scored slots. Where rows lie is data/records.py's, who reads them
cached.py's.
"""

# B sequences, T tokens, S scored slots, K compared states, n kept tokens, u kept units, E teacher's width, V vocabulary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from homodistil.batch import Batch
from homodistil.config import CacheConfig
from homodistil.data.hashing import Purpose, counter_hash
from homodistil.errors import ModelError
from homodistil.knowledge.selection import Selection, numbered
from homodistil.knowledge.targets import Draws, TargetCodec, TopK
from homodistil.knowledge.values import VALUE_CODECS, ValueCodec
from homodistil.models.outputs import NOWHERE
from homodistil.signals import Kept, Signals
from homodistil.sparse_targets import SparseTargets

PADDING = -1
"""In place of an id, which any number from 0 on may be."""
Arrays = Mapping[str, NDArray[Any]]
Predictions = Literal["targets", "states", "logits"]


@dataclass(frozen=True)
class Recording:
    """The layout of one cache's rows. Made by `of`."""

    selection: Selection
    states: int
    """K."""
    tokens: int
    """T of the longest sequence."""
    slots: int
    """S."""
    vocabulary: int
    """V; of a task its outputs, of a span T."""
    values: ValueCodec
    predictions: Predictions
    """Compressed `targets`; the last hidden `states`, which a head makes logits of; or, of tasks, the few `logits`."""
    targets: TargetCodec | None
    dtype: torch.dtype
    """The teacher's."""
    seed: int

    @classmethod
    def of(
        cls,
        config: CacheConfig,
        selection: Selection,
        states: int,
        tokens: int,
        slots: int,
        vocabulary: int,
        dtype: torch.dtype,
        temperature: float,
        is_language: bool,
    ) -> Recording:
        """The layout that a configuration asks for; a task's logits are few, and kept as they are."""
        predictions: Predictions = "logits"
        codec: TargetCodec | None = None
        if is_language and config.logits == "states":
            predictions = "states"
        elif is_language:
            draws = config.logits == "draws"
            predictions, codec = (
                "targets",
                Draws(config.draws, temperature) if draws else TopK(config.top_k, temperature),
            )
        values = VALUE_CODECS[config.values]
        seed = selection.seed
        return cls(selection, states, tokens, slots, vocabulary, values, predictions, codec, dtype, seed)

    @property
    def kept_tokens(self) -> int:
        """n at most."""
        return min(self.selection.tokens or self.tokens, self.tokens)

    @property
    def kept_units(self) -> int:
        """u."""
        return self.selection.units or self.selection.width

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of a row, by what they are for."""
        token = _integers(self.tokens)
        cells = self.states * self.kept_tokens
        units = min(-(-self.selection.width // 8), self.kept_units * _integers(self.selection.width).itemsize)
        per_slot = {
            "states": self.selection.width * self.dtype.itemsize,
            "logits": 4 * self.vocabulary,
            "targets": self.targets.bytes_per_row(self.vocabulary) if self.targets else 0,
        }
        is_chosen = self.selection.tokens is not None
        has_own_units = self.selection.units is not None and self.selection.config.units == "magnitude"
        return {
            "masked input": 4 * self.tokens + (token.itemsize + 4) * self.slots,
            "positions": cells * token.itemsize * is_chosen,
            "units": cells * units * has_own_units,
            "values": cells * self.values.bytes_per_row(self.kept_units),
            "predictions": self.slots * per_slot[self.predictions],
        }

    @property
    def bytes_per_record(self) -> int:
        return sum(self.parts.values())

    @cached_property
    def fixed_units(self) -> Tensor | None:
        return self.selection.fixed_units()

    def encode(self, knowledge: Signals, batch: Batch) -> dict[str, NDArray[Any]]:
        """Rows of what a live teacher, whose left-out units are not zero, said of `batch`. Raises `ModelError` for
        numbers that are not finite."""
        return inputs(batch, self.tokens) | self._hidden(knowledge) | self._predictions(knowledge, batch)

    def _hidden(self, knowledge: Signals) -> dict[str, NDArray[Any]]:
        if self.states == 0:
            return {}
        values_BKnu = self._padded(torch.stack(knowledge.hidden_states, dim=1), dim=2)
        rows, cells = len(values_BKnu), values_BKnu.shape[1:3]
        encoded = self.values.encode(values_BKnu.flatten(0, 2).cpu())
        found = {f"values_{name}": array.reshape(rows, *cells, *array.shape[1:]) for name, array in encoded.items()}
        kept = knowledge.kept
        if kept and kept[0].positions is not None:
            positions_BKn = self._padded(torch.stack([k.positions for k in kept], dim=1), 2, self.tokens - 1)  # type: ignore[misc]
            found["positions"] = positions_BKn.cpu().numpy().astype(_integers(self.tokens))
        if kept and kept[0].units is not None and kept[0].units.ndim == 3:
            units_BKnu = self._padded(torch.stack([k.units for k in kept], dim=1), dim=2)  # type: ignore[misc]
            found["units"] = self._units(units_BKnu.cpu().numpy())
        return found

    def _units(self, units_BKnu: NDArray[np.int64]) -> NDArray[Any]:
        """Numbers, or a bit for every unit that there is, whichever takes less."""
        if not self._has_bits:
            return units_BKnu.astype(_integers(self.selection.width))
        bits = np.zeros((*units_BKnu.shape[:-1], self.selection.width), dtype=np.bool_)
        np.put_along_axis(bits, units_BKnu, True, axis=-1)
        return np.packbits(bits, axis=-1, bitorder="little")

    @property
    def _has_bits(self) -> bool:
        width = self.selection.width
        return -(-width // 8) < self.kept_units * _integers(width).itemsize

    def _predictions(self, knowledge: Signals, batch: Batch) -> dict[str, NDArray[Any]]:
        if self.predictions == "states":
            assert knowledge.final_states is not None
            return {"final_states": _bits(_finite("last hidden states", knowledge.final_states).to(self.dtype))}
        if self.predictions == "logits":
            logits_BSV = _finite("logits", knowledge.logits).float()
            short = self.vocabulary - logits_BSV.shape[-1]
            return {"logits": F.pad(logits_BSV, (0, short), value=NOWHERE).cpu().numpy()}
        assert self.targets is not None
        rows, slots = batch.labels.shape
        samples = batch.samples.cpu().numpy()[:, None]
        keys_BS = counter_hash(Purpose.DRAWN_TARGETS, self.seed, batch.masking, samples, np.arange(slots))
        encoded = self.targets.encode(knowledge.logits.flatten(0, 1), keys_BS.reshape(-1))
        return {f"targets_{name}": array.reshape(rows, slots, *array.shape[1:]) for name, array in encoded.items()}

    def _padded(self, of_slots: Tensor, dim: int, value: int = 0) -> Tensor:
        """Kept-token slots filled up to n, for a batch may be narrower than that; their position is the last, which is
        padding wherever there are such slots."""
        short = self.kept_tokens - of_slots.shape[dim]
        return F.pad(of_slots, (*(0, 0) * (of_slots.ndim - dim - 1), 0, short), value=value)

    def decode(self, recorded: Mapping[str, Tensor], batch: Batch) -> Signals:
        """What rows say of `batch`, on its device, without waiting for it; of `states`, without logits yet."""
        states, kept = self._decoded_states(recorded, batch) if self.states else ((), ())
        logits, targets, final = self._decoded_predictions(recorded, batch)
        return Signals(states, (), 1.0, logits, kept, targets, final)

    def _decoded_states(
        self, recorded: Mapping[str, Tensor], batch: Batch
    ) -> tuple[tuple[Tensor, ...], tuple[Kept, ...]]:
        n = min(self.kept_tokens, batch.input_ids.shape[1])
        encoded = {name: array[:, :, :n] for name, array in _below("values_", recorded).items()}
        values_BKnu = self.values.decode(encoded, self.kept_units).to(self.dtype)
        eligible_BT = self.selection.eligible(batch)
        states, kept = [], []
        for state in range(self.states):
            positions, counted = None, eligible_BT
            if "positions" in recorded:
                positions = recorded["positions"][:, state, :n].to(torch.int64).clamp(max=eligible_BT.shape[1] - 1)
                counted = eligible_BT.gather(1, positions)
            units = self._decoded_units(recorded, state, n, batch.input_ids.device)
            values, units = self.selection.completed(values_BKnu[:, state].contiguous(), units)
            states.append(values)
            kept.append(Kept(counted.to(batch.weights.dtype), positions, units))
        return tuple(states), () if self.selection.is_everything else tuple(kept)

    def _decoded_units(self, recorded: Mapping[str, Tensor], state: int, n: int, device: torch.device) -> Tensor | None:
        if self.selection.units is None:
            return None
        if "units" not in recorded:
            assert self.fixed_units is not None
            return self.fixed_units.to(device, non_blocking=True)
        stored = recorded["units"][:, state, :n]
        if not self._has_bits:
            return stored.to(torch.int64)
        bits = (stored.unsqueeze(-1) >> torch.arange(8, device=device, dtype=torch.uint8)) & 1
        return numbered(bits.flatten(-2)[..., : self.selection.width].bool(), self.kept_units)

    def _decoded_predictions(
        self, recorded: Mapping[str, Tensor], batch: Batch
    ) -> tuple[Tensor, SparseTargets | None, Tensor | None]:
        nothing = batch.weights.new_empty((*batch.labels.shape, 0))
        if self.predictions == "states":
            return nothing, None, recorded["final_states"].view(self.dtype)
        if self.predictions == "logits":
            is_span = self.vocabulary == self.tokens and batch.labels.shape[1] == 2
            logits_BSV = recorded["logits"].to(self.dtype)
            return logits_BSV[..., : batch.input_ids.shape[1]] if is_span else logits_BSV, None, None
        assert self.targets is not None
        return nothing, self.targets.decode(_below("targets_", recorded)), None


def inputs(batch: Batch, tokens: int) -> dict[str, NDArray[Any]]:
    """What tells whose a row is, however wide its batch is padded: the masked input, filled up to `tokens`, where it is
    scored, and the labels."""
    ids_BT = batch.input_ids.masked_fill(batch.attention_mask == 0, PADDING)
    labels_BS = batch.labels if batch.labels.is_floating_point() else batch.labels.int()
    return {
        "input_ids": F.pad(ids_BT, (0, tokens - ids_BT.shape[1]), value=PADDING).int().cpu().numpy(),
        "scored_positions": batch.scored_positions.cpu().numpy().astype(_integers(tokens)),
        "labels": labels_BS.cpu().numpy(),
    }


def _below(prefix: str, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _integers(count: int) -> np.dtype[Any]:
    """The smallest that numbers below `count` fit."""
    return np.min_scalar_type(max(count - 1, 0))


def _finite(name: str, values_BSx: Tensor) -> Tensor:
    strange_BS = ~torch.isfinite(values_BSx).all(dim=-1)
    if strange_BS.any():
        raise ModelError(
            f"the teacher's {name}: {int(strange_BS.sum())} of {strange_BS.numel()} slots have one that is not finite. "
            "A cache can only keep finite ones: run the teacher in fp32 or bf16, or mend its weights."
        )
    return values_BSx


def _bits(values: Tensor) -> NDArray[Any]:
    """As NumPy can hold them: bf16's as 16 bits."""
    values = values.cpu().contiguous()
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
