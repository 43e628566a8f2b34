"""What this machine is good at, and what its C library is told about memory."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
PRODUCTS = 10
"""Matrix products between two looks at the clock."""
LIBC = ctypes.CDLL(None)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""glibc's malloc.h."""
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def has_bf16() -> bool:
    """Whether bf16 is computed in hardware: CUDA from compute capability 8, or a CPU with such instructions."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0] >= 8
    return bool(BF16_FLAGS & _cpu_flags())


def device_name(device: torch.device) -> str:
    """As people call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cores()} CPU cores"


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for the next update, instead of giving it back to the system: on CPUs, new
    pages cost a tenth of an update. Where it has no such settings (macOS, musl), nothing happens."""
    _tell_allocator({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})  # large arrays come from the heap as well


def give_back_freed_memory() -> None:
    """What the C library does by itself in a process that has freed large arrays: the other side of benchmarks."""
    _tell_allocator({M_MMAP_MAX: 1 << 16, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20})
    trim_heap()


def trim_heap() -> None:
    """Give freed memory back to the system now."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def _tell_allocator(settings: dict[int, int]) -> None:
    if hasattr(LIBC, "mallopt"):
        for parameter, value in settings.items():
            LIBC.mallopt(parameter, value)


def matrix_product_flops(dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> float:
    """FLOP/s of this rank's plain matrix product, the ceiling that times and utilisation are quoted against."""
    tokens = 16384 if device.type == "cuda" else 1024  # fewer would be over before the next is started
    a = torch.randn(tokens, 768, device=device).to(dtype)
    b = torch.randn(768, 3072, device=device).to(dtype)
    (a @ b).sum().item()  # libraries load at the first product
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(PRODUCTS):
            product = a @ b
        product[0, 0].item()  # waits for all of them
        count += PRODUCTS
    return count * 2 * tokens * 768 * 3072 / (time.perf_counter() - started)


def _cpu_flags() -> set[str]:
    if not CPUINFO.is_file():
        return set()
    lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}
