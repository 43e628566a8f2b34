"""The precision that losses are computed in, whatever the models run in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is where it is finer."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Products of `x` in its own precision; on the meta device, which has no autocast, as they are."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
