"""Codecs of hidden values that are kept: rows of numbers to arrays that a file can hold, and back.

Arrays are row-aligned, so any rows can be read without the others. Which values are kept is decided before, and where
the arrays lie is for others to say.

A scale is stored in bf16, as the upper half of the fp32 that it is: 2 bytes, and fp32's range. It costs no precision,
because codes are rounded against the scale as it was stored.
"""

# R kept tokens, u units of each, G groups of units that share a scale

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from homodistil.errors import ModelError

Arrays = dict[str, NDArray[Any]]
"""What a codec stores, by name; the first axis is the rows'."""

SMALLEST = torch.finfo(torch.float32).tiny
"""The least scale, 2^-126: a row of zeros has one too."""
FP16_ROOM = 2.0**15
"""Half of fp16's range: below it, nothing overflows by being rounded."""
INT4_GROUP = 32
"""Units that share a scale in int4. Seven levels serve the largest of a group and lose the rest: for a BERT of 384
units the squared error is a third of that with a scale a row, for 12 % more bytes."""


class ValueCodec(Protocol):
    """(R, u) values to arrays of R rows and back. Rows do not influence each other."""

    def encode(self, values_Ru: Tensor) -> Arrays:
        """From fp32 or bf16. Raises ModelError for a value that is not finite."""
        ...

    def decode(self, arrays: Mapping[str, Tensor], units: int) -> Tensor:
        """(..., u) in fp32 from the arrays of any rows, on the device that they are on, without waiting for it."""
        ...

    def bytes_per_row(self, units: int) -> int: ...


class Exact:
    """fp32: what was given."""

    def encode(self, values_Ru: Tensor) -> Arrays:
        return {"codes": _finite(values_Ru).numpy()}

    def decode(self, arrays: Mapping[str, Tensor], units: int) -> Tensor:
        return arrays["codes"]

    def bytes_per_row(self, units: int) -> int:
        return 4 * units


class Half:
    """fp16, each row times the power of two that takes its largest value to [2^14, 2^15).

    |error| <= max(2^-11 |value|, 2^-39 of the row's largest). Plain fp16 would turn an outlier above 65504 into
    infinity, and saturating would lose most of it; a power of two loses nothing, of outliers or of the others.
    """

    def encode(self, values_Ru: Tensor) -> Arrays:
        values_Ru = _finite(values_Ru)
        largest_R1 = values_Ru.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST * FP16_ROOM)
        scale_R1 = largest_R1 / FP16_ROOM / torch.frexp(largest_R1).mantissa  # exact: all but the exponent divided out
        return {"codes": (values_Ru / scale_R1).half().numpy(), "scale": _bits(scale_R1)}

    def decode(self, arrays: Mapping[str, Tensor], units: int) -> Tensor:
        return arrays["codes"].float() * _scale(arrays)

    def bytes_per_row(self, units: int) -> int:
        return 2 * units + 2


@dataclass(frozen=True)
class Integers:
    """Symmetric integers of 8 or 4 bits: value = code * scale, the largest value of a group having the largest code.

    |error| <= scale / 2, and scale is the group's largest |value| / 127 or / 7, to 0.2 % (2^-9). Two codes of 4 bits
    share a byte, the first in its lower half.
    """

    bits: int
    group: int | None
    """Units that share a scale; None: the whole row."""

    def encode(self, values_Ru: Tensor) -> Arrays:
        values_Ru = _finite(values_Ru)
        rows, units = values_Ru.shape
        group = self.group or units
        values_RGg = F.pad(values_Ru, (0, -units % group)).reshape(rows, -1, group)
        scale_RG1 = (values_RGg.abs().amax(dim=-1, keepdim=True) / self._largest).bfloat16().clamp(min=SMALLEST)
        codes = (values_RGg / scale_RG1.float()).round().to(torch.int8).flatten(1)  # 127 (1 + 2^-9) still is 127
        codes = codes[:, :units] if self.bits == 8 else _pack(codes[:, : units + units % 2])
        return {"codes": codes.numpy(), "scale": _bits(scale_RG1.squeeze(-1))}

    def decode(self, arrays: Mapping[str, Tensor], units: int) -> Tensor:
        codes = arrays["codes"] if self.bits == 8 else _unpack(arrays["codes"])
        scale = _scale(arrays).repeat_interleave(self.group or units, dim=-1)
        return codes[..., :units].float() * scale[..., :units]

    def bytes_per_row(self, units: int) -> int:
        return -(-units * self.bits // 8) + 2 * -(-units // (self.group or units))

    @property
    def _largest(self) -> int:
        return 2 ** (self.bits - 1) - 1


VALUE_CODECS: dict[str, ValueCodec] = {
    "fp32": Exact(),
    "fp16": Half(),
    "int8": Integers(8, None),
    "int4": Integers(4, INT4_GROUP),
}


def _finite(values_Ru: Tensor) -> Tensor:
    """In fp32, from here on."""
    strange = ~torch.isfinite(values_Ru).all(dim=-1)
    if strange.any():
        raise ModelError(
            f"the teacher's hidden values: {int(strange.sum())} of {len(strange)} tokens have one that is not finite, "
            f"the first is token {int(strange.nonzero()[0])} of this batch. A cache can only keep finite ones: "
            f"run the teacher in fp32 or bf16, or mend its weights."
        )
    return values_Ru.float().contiguous()


def _bits(scale: Tensor) -> NDArray[Any]:
    """A scale that bf16 can hold, as NumPy can: its 16 bits."""
    return scale.bfloat16().view(torch.uint16).numpy()


def _scale(arrays: Mapping[str, Tensor]) -> Tensor:
    return arrays["scale"].view(torch.bfloat16).float()


def _pack(codes: Tensor) -> Tensor:
    """(R, 2n) codes of -7 to 7 to (R, n) bytes."""
    low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(dim=-1)
    return low | (high << 4)


def _unpack(packed: Tensor) -> Tensor:
    """(..., n) bytes to (..., 2n) codes."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
