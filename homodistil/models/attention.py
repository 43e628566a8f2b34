"""Queries and keys from inside stock attention: functions registered with transformers' attention interface.

A registered function runs a stock kernel unchanged and hands back `(output, (query, key))`, so that a model asked
for `output_attentions=True` returns, layer by layer, what attention scores are made of and never the maps. Unlike a
list filled on the side, this survives activation checkpointing and compiles to one graph. What a family makes of the
tuples is its adapter's.
"""

# B sequences, A heads, T tokens, d head width

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from homodistil.errors import ConfigError

Kernel = Literal["auto", "sdpa", "flash_attention_2", "eager"]
Attention = Callable[..., tuple[Tensor, Any]]
SHORT = 256
"""Tokens up to which `auto` writes attention out on CPUs; beyond, its maps would fill memory."""

# transformers loads a flash kernel from its hub for any other name with "flash" in it
_NAMES: dict[Kernel, str] = {
    "auto": "homodistil_auto",
    "sdpa": "homodistil_sdpa",
    "flash_attention_2": "homodistil_fa2",
    "eager": "homodistil_eager",
}


@cache
def attention_implementation(kernel: Kernel) -> str:
    """Register `kernel`, once, and return the name to give as `attn_implementation`.

    A model built with that name returns in `attentions`, for `output_attentions=True`, one `(query, key)` per
    layer, each (B, A, T, d). Raises `ConfigError` where FlashAttention is asked for and cannot run.
    """
    mask = ALL_MASK_ATTENTION_FUNCTIONS[kernel] if kernel == "flash_attention_2" else _mask
    return register(_NAMES[kernel], _kernel_function(kernel), mask)


def register(name: str, kernel: Attention, mask: Callable[..., Tensor | None] | None = None) -> str:
    """Make `kernel` an `attn_implementation` that hands out queries and keys; returns its name."""
    AttentionInterface.register(name, _returning_queries_and_keys(kernel))
    AttentionMaskInterface.register(name, mask or _mask)  # without one, padding is attended to
    return name


def is_written_out(kernel: Kernel, device_type: str, tokens: int) -> bool:
    """Whether `kernel` makes maps of so many tokens: `eager`, and `auto` for short sequences on CPUs, where SDPA's
    backward alone takes longer than all of the plain one."""
    return kernel == "eager" or (kernel == "auto" and device_type == "cpu" and tokens <= SHORT)


def nothing_masked(device: torch.device) -> Tensor:
    """(1, 1, 1, 1): the `attention_mask` of a causal model's batch without padding. Given none, transformers would
    search the positions for packed sequences, and wait for the device to do so."""
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)


def _mask(
    *,
    attention_mask: Tensor | None,
    mask_function: Callable[..., Any],
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    **_: Any,
) -> Tensor | None:
    """(B, 1, 1, T) for bidirectional attention, where transformers' own is (B, 1, T, T): all queries have one mask.
    Without padding there is none, so that SDPA may choose its fastest kernel; causality is then the kernel's."""
    if attention_mask is None:
        return None
    keys_B11T = attention_mask[:, None, None, :].bool()
    if mask_function is bidirectional_mask_function:
        return keys_B11T
    queries_T1 = torch.arange(q_length, device=attention_mask.device)[:, None] + q_offset
    return keys_B11T & mask_function(0, 0, queries_T1, torch.arange(kv_length, device=attention_mask.device))


def _kernel_function(kernel: Kernel) -> Attention:
    if kernel == "flash_attention_2":
        _require_flash_attention()
        return _flash_attention_2
    return {"auto": _by_shape, "eager": _eager, "sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"]}[kernel]


def _by_shape(module: nn.Module, query: Tensor, *arguments: Any, **settings: Any) -> tuple[Tensor, Any]:
    written_out = is_written_out("auto", query.device.type, query.shape[2])
    return (_eager if written_out else ALL_ATTENTION_FUNCTIONS["sdpa"])(module, query, *arguments, **settings)


def _returning_queries_and_keys(attention: Attention) -> Attention:
    @wraps(attention)
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        output_attentions: bool = False,  # taken out: the kernel has no maps to return, and would say so
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if attention_mask is not None and attention_mask.numel() == 1:
            attention_mask = None  # `nothing_masked`
        output, _ = attention(module, query, key, value, attention_mask, **kwargs)
        return output, (query, key)

    return forward


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention written out. transformers keeps one such function per model and none in its registry."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is None and module.is_causal:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        attention_mask = attention_mask.tril(key.shape[2] - query.shape[2])
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    probabilities = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), None


def _flash_attention_2(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """FlashAttention 2 by its name: transformers' own wrapper would look for a kernel called as the config says."""
    output = _flash_attention_forward(
        query.transpose(1, 2),  # (B, T, A, d), as the kernel wants them
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        query_length=query.shape[2],
        is_causal=bool(module.is_causal),
        dropout=dropout,
        softmax_scale=scaling,
        attn_implementation="flash_attention_2",
    )
    return output, None


def _require_flash_attention() -> None:
    if not (is_flash_attn_2_available() and torch.cuda.is_available()):
        raise ConfigError(
            "performance.attention: flash_attention_2: needs a CUDA GPU and the package flash-attn, of which one is "
            "missing here. Install it with the extra `gpu`, or set performance.attention to sdpa."
        )
