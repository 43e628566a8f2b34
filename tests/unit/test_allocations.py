"""What an update allocates: nothing as large as an attention map, and no vocabulary-sized array but the logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from homodistil.config import RunConfig
from homodistil.knowledge.teacher import FrozenModel
from homodistil.models.attention import attention_implementation
from homodistil.models.bert import BertFamily
from homodistil.models.loading import new_model
from homodistil.signals import Signals
from homodistil.student import Blueprint, Student, as_tuple
from tests import fixtures, twin

TOKENS = 512


class Shapes(TorchDispatchMode):
    """The shapes of all that any operation returns, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.seen |= {tuple(r.shape) for r in tree_leaves(results) if isinstance(r, torch.Tensor)}
        return results


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_no_attention_map_is_made_at_512_tokens(padded: bool) -> None:
    config = fixtures.bert_config(max_position_embeddings=TOKENS)
    terms = {"objective": {name: {"weight": weight} for name, weight in twin.WEIGHTS.items()}}
    run = RunConfig.model_validate({"teacher": {"path": "in memory"}, **terms})
    blueprint = Blueprint(BertFamily(), config, run, attention_implementation("sdpa"))
    models = [new_model(config, blueprint.attention) for _ in range(2)]
    student, teacher = Student(models[0], blueprint, blueprint.full_shape).train(), FrozenModel(models[1], BertFamily())
    rows = fixtures.batch(sequences=2, tokens=TOKENS)
    if not padded:
        rows = replace(rows, attention_mask=torch.ones_like(rows.attention_mask), padded=False)
    with Shapes() as shapes:
        knowledge = as_tuple(Signals(*teacher(*as_tuple(rows))))  # type: ignore[arg-type]
        total, _ = student(as_tuple(rows), knowledge, rows.counts().vector)
        total.backward()
    assert not [shape for shape in shapes.seen if shape.count(TOKENS) > 1]
