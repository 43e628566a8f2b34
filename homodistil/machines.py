"""Machine: the few numbers of a rank's device and its links that time can be foretold from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, log2

import torch
from torch import Tensor
from torch.nn import functional as F

from homodistil.costs import Cost

GIB = 1024**3
PRODUCTS_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.7, 0.35, 0.8
"""Assumed, not measured: what linear layers of BERT's sizes, attention and plain kernels get of a GPU's data sheet."""
LAUNCH = 7.5e-5
"""Seconds that the host takes for one operation, with its share of autograd and of ZeRO's hooks: fitted beside an
H100, where an update of BERT-base took as long at half width (docs/scaling.md)."""
TOKENS, HIDDEN, LAYERS, ARRAY_BYTES, CHAIN = 1024, 768, 4, 1 << 26, 100
"""Sizes that this machine is measured with: of linear layers, of an array; operations one after another."""
ON_GPU = 16
"""Times as many tokens there: of fewer, an H100 only shows how fast the host starts its work."""


@dataclass(frozen=True)
class Machine:
    """One rank's device, and how it reaches the others."""

    name: str
    products: float
    """FLOP/s of a linear layer of BERT's sizes, forward and backward, in bf16."""
    batched: float
    """FLOP/s of one product per attention head."""
    attention: float
    """FLOP/s of torch's SDPA, forward and backward."""
    elementwise: float
    """Bytes/s that a model's other operations read and write: GELU's in bf16."""
    bandwidth: float
    """Bytes/s of sums of large fp32 arrays: what an optimizer can have."""
    latency: float
    """Seconds that the host takes to start one operation, with its share of autograd."""
    host_computes: bool
    """Then latencies add up; else they matter only where they are longer than the work."""
    memory: float = float("inf")
    """Bytes."""
    link: float = float("inf")
    """Bytes/s to the other ranks of a node."""
    network: float = float("inf")
    """Bytes/s of a whole node to the others."""
    per_node: int = 1
    """Ranks."""
    hop: float = 1e-5
    """Seconds that a collective takes for each doubling of the ranks."""

    @classmethod
    def here(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """This rank's device, measured in about two seconds; its links are not."""
        one, other, both = (torch.ones(ARRAY_BYTES // 4, device=device) for _ in range(3))
        more = ON_GPU if device.type == "cuda" else 1
        tokens = torch.randn(more * TOKENS, HIDDEN, device=device).to(dtype).requires_grad_()
        wide = torch.randn(more * TOKENS, 4 * HIDDEN, device=device).to(dtype)
        sizes = [(HIDDEN, 4 * HIDDEN), (4 * HIDDEN, HIDDEN)] * LAYERS  # more weights than a cache holds
        layers = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in sizes)).to(device, dtype)
        query = torch.randn(8 * more, 12, 128, 64, device=device).to(dtype).requires_grad_()
        head = torch.randn(2 * more, 12, 512, 64, device=device).to(dtype).requires_grad_()
        small = torch.ones(1, device=device, requires_grad=True)
        return cls(
            name="this machine",
            # FLOP: 2 for each multiplication, once forward and twice backward
            products=48
            * LAYERS
            * len(tokens)
            * HIDDEN**2
            / _seconds(lambda: _gradient(layers(tokens), tokens, *layers.parameters())),
            batched=6 * 12 * len(query) * 128 * 128 * 64 / _seconds(lambda: _gradient(query @ query.mT, query)),
            attention=14
            * 12
            * len(head)
            * 512
            * 512
            * 64
            / _seconds(lambda: _gradient(F.scaled_dot_product_attention(head, head, head), head)),
            elementwise=2 * wide.nbytes / _seconds(lambda: F.gelu(wide)),
            bandwidth=3 * ARRAY_BYTES / _seconds(lambda: torch.add(one, other, out=both)),
            latency=_seconds(lambda: _gradient(_chain(small), small)) / (2 * CHAIN),
            host_computes=device.type == "cpu",
            memory=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf"),
        )

    def seconds(self, cost: Cost) -> dict[str, float]:
        """Of this work on one device: arithmetic, elementwise, and what starting operations adds."""
        arithmetic = cost.products / self.products + cost.batched / self.batched + cost.attention / self.attention
        elementwise, starting = cost.traffic / self.elementwise, cost.operations * self.latency
        if not self.host_computes:
            starting = max(0.0, starting - arithmetic - elementwise)
        return {"arithmetic": arithmetic, "elementwise": elementwise, "starting": starting}

    def all_reduce(self, count: float, ranks: int, pieces: int = 1) -> float:
        """Seconds to add up `count` bytes over all ranks: a reduction to the parts' owners, and a gathering."""
        return 2 * self.gather(count, ranks, pieces)

    def gather(self, count: float, ranks: int, pieces: int = 1) -> float:
        """Seconds until every rank has all of `count` bytes, of which each had its part, in a ring; or, the other way
        round, until each has the sum of its part. In so many pieces, one after another."""
        if ranks == 1:
            return 0.0
        slowest = self.link if ranks <= self.per_node else min(self.link, self.network)
        return (ranks - 1) / ranks * count / slowest + pieces * ceil(log2(ranks)) * self.hop


def _gpu(name: str, tflops: float, terabytes: float, memory: float, link: float, network: float) -> Machine:
    plain = BANDWIDTH_SHARE * terabytes * 1e12
    return Machine(
        name=name,
        products=PRODUCTS_SHARE * tflops * 1e12,
        batched=ATTENTION_SHARE * tflops * 1e12,
        attention=ATTENTION_SHARE * tflops * 1e12,
        elementwise=plain,
        bandwidth=plain,
        latency=LAUNCH,
        host_computes=False,
        memory=memory * GIB,
        link=link * 1e9,
        network=network * 1e9 / 8,
        per_node=8,
    )


GPUS = {
    machine.name: machine
    for machine in (
        _gpu("a100-40gb", 312, 1.56, 40, link=250, network=1600),
        _gpu("a100-80gb", 312, 2.04, 80, link=250, network=1600),
        _gpu("h100-80gb", 989, 3.35, 80, link=400, network=3200),
        _gpu("h200-141gb", 989, 4.8, 141, link=400, network=3200),
    )
}
"""Eight to a node. Data sheets: dense bf16 TFLOP/s, TB/s, GiB; then GB/s of NVLink in one direction, a little rounded
down, and Gbit/s of a node's network cards together, as in a DGX. None of it was measured here."""


def gpu_machine(name: str, gigabits: float | None = None) -> Machine:
    """One of `GPUS`, on a network of so many Gbit/s a node."""
    machine = GPUS[name]
    return machine if gigabits is None else replace(machine, network=gigabits * 1e9 / 8)


def _seconds(work: Callable[[], Tensor], least: float = 0.2) -> float:
    """Mean seconds of a call, over at least `least` seconds."""
    work().sum().item()
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < least:
        result = work()
        result.flatten()[0].item()  # waits for it
        count += 1
    return elapsed / count


def _gradient(output: Tensor, *inputs: Tensor) -> Tensor:
    return torch.autograd.grad(output, inputs, torch.ones_like(output))[0]


def _chain(x: Tensor) -> Tensor:
    for _ in range(CHAIN):
        x = x * 1.0
    return x
