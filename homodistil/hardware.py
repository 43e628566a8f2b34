"""What this machine's arithmetic is good at."""

from __future__ import annotations

from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def has_bf16() -> bool:
    """Whether bf16 is computed in hardware: CUDA from compute capability 8, or a CPU with such instructions."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0] >= 8
    return bool(BF16_FLAGS & _cpu_flags())


def _cpu_flags() -> set[str]:
    if not CPUINFO.is_file():
        return set()
    lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}
