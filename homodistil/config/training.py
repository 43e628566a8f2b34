"""How a run goes: its length, data, optimizer, measurements, checkpoints, and fast forms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from homodistil.config.section import Section

Decay = Annotated[float, Field(ge=0, lt=1)]


class RunSection(Section):
    """Which run this is, how long, and where it leaves its files."""

    name: str = "run"
    """Folder below `directory`; give each run its own."""
    directory: Path = Path("runs")
    """Where runs are kept."""
    updates: int = Field(default=1000, ge=1)
    """Optimizer updates in total."""
    seed: int = 0
    """Decides data order, masks and every initial weight."""
    log_every: int = Field(default=10, ge=1)
    """Updates between two points in TensorBoard."""

    @property
    def path(self) -> Path:
        return self.directory / self.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


class DataConfig(Section):
    """The stream: shards made by data_prep/build_shards.py, batched and masked."""

    shards: Path = Path("data/quickstart")
    """Folder with index.json and the shards."""
    source: str | None = None
    """Build missing shards from this source first: `embedded` (the documentation of this Python
    installation), or a text file or folder."""
    global_batch: int = Field(default=64, ge=1)
    """Sequences an update, over all ranks."""
    micro_batch: int = Field(default=32, ge=1)
    """Sequences a forward pass, on one rank, at most; the rest is accumulated."""
    lanes: int = Field(default=64, ge=1)
    """Fixed lanes the shards are dealt to: divides the global batch, and is divided by the world size."""
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """Share of a sequence's positions that are scored."""
    whole_word: bool = False
    """Mask whole words instead of single pieces."""
    maskings: int | None = Field(default=None, ge=1)
    """Masks that a sequence has: in each epoch the next, then the first again; by default, every epoch's are new, or,
    for causal models, there is one that hides nothing. A cache holds the teacher's knowledge of each."""
    mask_seed: int | None = None
    """Decides the masks, and a draw of tokens and units; by default `run.seed`. Students of several seeds can share a
    cache."""
    on_bad_shard: Literal["stop", "replace"] = "stop"
    """A shard that is missing or not as its index says: `stop`, or `replace` it by the one read before it."""
    prefetch: int = Field(default=4, ge=1)
    """Updates that the background worker prepares ahead of the step."""


class OptimizerConfig(Section):
    """Values of the optimizer; its type is the DeepSpeed JSON's."""

    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    warmup: float = Field(default=0.02, ge=0, le=1)
    """Share of the updates over which the rate rises linearly; ends at or before `pruning.start`."""
    schedule: Literal["linear", "constant"] = "linear"
    """After warm-up: fall linearly to zero, or stay."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's moment decays."""
    eps: float = Field(default=1e-6, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay, on matrices only (no biases, no LayerNorm)."""


class ValidationConfig(Section):
    """Held-out shard, always the same text and masks."""

    every: int = Field(default=200, ge=1)
    """Updates between validations; there is always one at the end."""
    sequences: int = Field(default=256, ge=1)
    """Held-out sequences used (all there are, if fewer)."""


class CheckpointConfig(Section):
    """Sharded checkpoints: what a run goes on from after an interruption."""

    resume: str = "auto"
    """`auto`: go on from the newest whole checkpoint of this run, if there is one. `never`: start over; what was
    there is set aside. Or the path of a checkpoint."""
    every: int = Field(default=500, ge=1)
    """Updates between two checkpoints; there is always one at the end."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept; with two, a damaged one costs one interval more."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this many updates are never deleted."""
    allow_changes: list[Annotated[str, Field(pattern=r"^(optimizer|objective)\.")]] = Field(default_factory=list)
    """Keys of `optimizer` and `objective` that may differ from the checkpoint's, such as a lower learning rate."""
    background: bool = True
    """Write beside the training: a step waits only for the copy in memory."""


class HealthConfig(Section):
    """What is watched while the run goes on."""

    max_skipped: int = Field(default=10, ge=0)
    """Updates in a row that may be left out because a gradient was not finite; one more stops the run."""
    compare_every: int = Field(default=500, ge=1)
    """Updates between two comparisons of all ranks' weights."""
    hang_timeout_seconds: int = Field(default=1800, ge=1)
    """Seconds without progress after which a rank ends the run and names the rank it waits for."""


class PerformanceConfig(Section):
    """Fast forms, each beside a plain twin that is tested against it."""

    fused_adamw: bool = True
    """torch's fused AdamW instead of the loop."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """Attention kernel; `auto` is torch's SDPA, or, for short sequences on CPUs, attention written out."""
    activation_checkpointing: bool = False
    """Recompute the student's layers in backward: less memory, about a third more arithmetic."""
    teacher_ahead: bool = False
    """Start the teacher on the next micro-batch beside the student's backward pass (GPUs); holds both in memory."""
    compile: bool = False
    """torch.compile the student's and teacher's encoder (ZeRO 1 or 2, replicated teacher)."""
    fused_vocabulary: bool = True
    """Cross-entropy and KL from one look at the logits, a few rows at a time."""
    gram_attention: Literal["auto", "on", "off"] = "auto"
    """Attention loss from Gram matrices, without any T x T map; `auto` where it needs fewer FLOPs."""
