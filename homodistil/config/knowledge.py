"""What of the teacher is compared: hidden states and how much of them, filters, and a cache of both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from homodistil.config.section import Section


class Share(NamedTuple):
    """How much of the hidden states is compared; None: all."""

    states: int | None = None
    tokens: int | None = None
    """Of each sequence and state."""
    units: float | None = None
    """Fraction of a state's."""


class KnowledgeConfig(Section):
    """What of the teacher's hidden states and attention the student is compared with."""

    keep: str | None = None
    """How much: `1l_10t_0.1h` is one layer, ten tokens of each sequence, a tenth of the units. What is not named is
    kept whole, as everything is by default."""
    interval: int = Field(default=1, ge=1)
    """Every so many of the student's layers one is compared, up to the last; divides their number."""
    top: float = Field(default=1.0, gt=0, le=1)
    """Share of the teacher's depth that the student's last layer is compared at; the others are spaced evenly below.
    5/6 (0.8333) did best in the marginal-utility paper."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """For each of those layers, the teacher's that it is compared with, counted from 0, instead of spacing them."""
    embeddings: bool = True
    """Compare the embeddings' output as well; filters have none there. The first that `keep` drops."""
    tokens: Literal["left", "random", "attention", "attention_no_sep"] = "attention_no_sep"
    """Which tokens `keep` keeps: the first; drawn anew for every sequence, state and masking; those that [CLS] attends
    to most, in the layer whose output is compared; or of those without [SEP]. A causal model's last token takes
    [CLS]'s part."""
    units: Literal["random", "uniform", "magnitude"] = "magnitude"
    """Which units: drawn once for the run; evenly spaced; or each token's largest."""
    left_out: Literal["ignored", "zero"] = "ignored"
    """What becomes of units that are not kept: nothing, or the student's are pulled to zero."""
    padding: bool = False
    """Compare padding as well, as TED's authors' code does; not with `keep`'s tokens."""

    @field_validator("keep")
    @classmethod
    def _share_can_be_read(cls, keep: str | None) -> str | None:
        _read_share(keep)
        return keep

    @model_validator(mode="after")
    def _padding_is_never_chosen(self) -> KnowledgeConfig:
        if self.padding and self.share.tokens is not None:
            raise ValueError(f"padding is true, but keep ({self.keep}) chooses tokens, and padding is none")
        return self

    @property
    def share(self) -> Share:
        return _read_share(self.keep)


def _read_share(keep: str | None) -> Share:
    found = re.fullmatch(r"(?:(\d+)l)?(?:(?:^|_)(\d+)t)?(?:(?:^|_)(\d*\.?\d+)h)?", keep or "")
    if found is None or keep == "":
        raise ValueError(f"found {keep}, expected layers, tokens and units, or some of them, such as 1l_10t_0.1h")
    states, tokens, units = found.groups()
    share = Share(
        states=None if states is None else int(states),
        tokens=None if tokens is None else int(tokens),
        units=None if units is None else float(units),
    )
    if share.states == 0 or share.tokens == 0 or not (share.units is None or 0 < share.units <= 1):
        raise ValueError(f"found {keep}, expected at least one layer, one token, and units above 0, at most 1")
    return share


class CacheConfig(Section):
    """A teacher's knowledge on disk, written once by launchers/cache_teacher.py and read instead of the teacher."""

    path: Path | None = None
    """Folder of the cache; without one, the teacher runs beside the student."""
    values: Literal["fp32", "fp16", "int8", "int4"] = "fp16"
    """How hidden states are stored; what each costs is in docs/performance.md."""
    logits: Literal["draws", "top_k", "states"] = "draws"
    """What is kept of a language model's predictions: words drawn from them, right on average; the most probable words
    and the mass of all others, which loses much of a softened distribution; or the last hidden states, exact, with the
    teacher's head beside them. A task's few logits are kept as they are."""
    top_k: int = Field(default=32, ge=1)
    """Words that `top_k` tells apart."""
    draws: int = Field(default=50, ge=1)
    """Words that `draws` draws for a slot."""


class FiltersConfig(Section):
    """Task-aware filters (TED, stage I): linear maps of layers' outputs, learned before distilling."""

    of: Literal["teacher", "student"] | None = None
    """Whose filters this run learns, instead of distilling; launchers/learn_filters.py sets it."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Of that model, counted from 0; by default those that `knowledge` compares."""
    teacher: str | None = None
    """Whose width the filters of a student lead to, and whose head scores them; launchers/learn_filters.py sets it."""
    hidden: int | None = Field(default=None, ge=1)
    """Width of a layer inside the filter; by default the filter is one linear map."""
    activation: Literal["gelu", "relu", "tanh"] = "gelu"
    """After that inner layer."""
    init: Literal["random", "identity"] = "random"
    """`identity` lets filters of square, single maps start with the layer's output as it is."""
    head: Literal["shared", "new"] = "shared"
    """In language modelling, what scores a filter's output: the teacher's frozen `shared` head, or a `new` one per
    filter. A benchmark's task always takes new ones."""
    updates: int | None = Field(default=None, ge=1)
    """Optimizer updates; by default `run.updates`."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak; by default `optimizer.learning_rate`."""
