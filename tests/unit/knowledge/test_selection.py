"""Selection: every strategy of length and width against a twin that picks them one by one, and what becomes of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertForMaskedLM

from homodistil.batch import Batch
from homodistil.config import RunConfig
from homodistil.data.hashing import counter_hash, permutation, tensor_hash
from homodistil.knowledge.selection import Selection, shared_units, top
from homodistil.knowledge.teacher import FrozenModel
from homodistil.models.attention import attention_implementation
from homodistil.models.bert import BertFamily
from homodistil.models.gpt2 import Gpt2Family
from homodistil.models.shape import HIDDEN
from homodistil.signals import Kept, Signals
from homodistil.student import Blueprint, Student, as_tuple
from tests import fixtures, twin

SEED, WIDTH = 5, 72
KEPT_TOKENS, KEPT_UNITS = 11, 12
TOKENS, UNITS = ("left", "random", "attention", "attention_no_sep"), ("random", "uniform", "magnitude")


def blueprint(keep: str | None, aligner: str = "projection", **knowledge: Any) -> Blueprint:
    values = {
        "run": {"seed": SEED},
        "teacher": {"path": "in memory"},
        "knowledge": {"keep": keep, **knowledge},
        "objective": {
            "task": {"weight": 0.0},
            "kl": {"weight": 0.0},
            "hidden": {"weight": 1.0, "aligner": aligner},
            "attention": {"weight": 0.0},
        },
    }
    run, attention = RunConfig.model_validate(values), attention_implementation("sdpa")
    return Blueprint(BertFamily(), fixtures.bert_config(), run, attention, sep=fixtures.SEP)


def batch(masking: int = 0) -> Batch:
    """Sequences between [CLS] and one or two [SEP], and a very short one."""
    rows = fixtures.batch()
    rows.input_ids[:, 0] = fixtures.CLS
    for row, length in enumerate(rows.attention_mask.sum(dim=1).tolist()):
        rows.input_ids[row, length - 1] = fixtures.SEP
        rows.input_ids[row, 3 if row % 2 else length - 1] = fixtures.SEP
    rows.attention_mask[2, 4:] = 0
    rows.input_ids[2, 4:] = 0
    rows.input_ids[2, 3] = fixtures.SEP
    return Batch(**{**vars(rows), "samples": rows.samples + 40, "masking": masking})


def positions(choice: str, state: int, row: int, n: int, rows: Batch, scores: list[Tensor]) -> list[int]:
    """By hand, from docs/methods.md, "The minimum knowledge": sorted one by one, ties to the lowest."""
    length = int(rows.attention_mask[row].sum())
    places = list(range(length))
    if choice == "attention_no_sep":
        places = [p for p in places if rows.input_ids[row, p] != fixtures.SEP]

    def rank(place: int) -> float | int:
        if choice == "left":
            return -place
        if choice == "random":
            sample = int(rows.samples[row])
            return int(counter_hash(KEPT_TOKENS, SEED, state, rows.masking, sample, place)[0])
        return float(scores[max(state - 1, 0)][row, :, 0, place].mean())

    return sorted(sorted(places, key=lambda p: (-rank(p), p))[:n])


def units(choice: str, u: int, values: Tensor) -> list[int]:
    if choice == "random":
        return sorted(permutation(WIDTH, KEPT_UNITS, SEED)[:u].tolist())
    if choice == "uniform":
        return [i * WIDTH // u for i in range(u)]
    return sorted(sorted(range(WIDTH), key=lambda i: (-abs(float(values[i])), i))[:u])


def expected(
    plan: Blueprint, student: BertForMaskedLM, teacher: BertForMaskedLM, rows: Batch, kept: list[int] | None = None
) -> Tensor:
    """The hidden loss, element by element. kept: the student's dimensions, where it is compared in these alone."""
    knowledge = plan.run.knowledge
    _, hidden, _ = twin.signals(student, rows)
    with torch.no_grad():
        _, t_hidden, scores = twin.signals(teacher, rows)
    n, fraction = knowledge.share.tokens or 10**6, knowledge.share.units
    losses, counted = [], 0
    for state, (h, t) in enumerate(zip(hidden, t_hidden, strict=True)):
        total = torch.zeros(())
        for row in range(len(rows)):
            chosen = positions(knowledge.tokens if knowledge.share.tokens else "left", state, row, n, rows, scores)
            counted += len(chosen)
            for place in chosen:
                here = units(knowledge.units, round(fraction * WIDTH), t[row, place]) if fraction else range(WIDTH)
                target = t[row, place]
                if knowledge.left_out == "zero":
                    target, here = (
                        torch.zeros(WIDTH).index_copy(0, torch.tensor(here), target[list(here)]),
                        range(WIDTH),
                    )
                both = [i for i in here if kept is None or i in kept]
                mine = [i if kept is None else kept.index(i) for i in both]
                if both:
                    total = total + (h[row, place, mine] - target[both]).square().mean()
        losses.append(total)
    return torch.stack(losses).mean() / (counted / len(losses))


def found(plan: Blueprint, rows: Batch, kept: list[int] | None = None) -> tuple[Tensor, Student]:
    models = [fixtures.bert(seed, attn_implementation=plan.attention) for seed in (1, 0)]
    student = Student(models[0], plan, plan.full_shape)
    teacher = FrozenModel(models[1], plan.family, plan.compared, selection=plan.selection)
    counts = rows.counts(plan.selection.count(rows)).vector
    total, _ = student(as_tuple(rows), teacher(*as_tuple(rows) or ()), counts)
    return total, student


@pytest.mark.parametrize("keep", ["5t", "0.1h", "3t_0.25h"])
@pytest.mark.parametrize(("tokens", "width"), [(t, "magnitude") for t in TOKENS] + [("left", u) for u in UNITS])
def test_what_is_kept_is_what_a_twin_picks_one_by_one(keep: str, tokens: str, width: str) -> None:
    plan, rows = blueprint(keep, tokens=tokens, units=width), batch(masking=3)
    total, student = found(plan, rows)
    total.backward()
    plain = twin.scaled(fixtures.bert(1), 12)
    wanted = expected(plan, plain, twin.scaled(fixtures.bert(0), 12), rows)
    wanted.backward()
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    ours = dict(student.model.named_parameters())
    compared = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert len(compared) > 30
    for name, gradient in compared.items():
        torch.testing.assert_close(ours[name].grad, gradient, rtol=1e-4, atol=1e-7)


def test_units_that_are_left_out_can_be_pulled_to_zero() -> None:
    plan, rows = blueprint("4t_0.25h", left_out="zero"), batch()
    total, _ = found(plan, rows)
    models = [twin.scaled(fixtures.bert(seed), 12) for seed in (1, 0)]
    assert total.item() == pytest.approx(expected(plan, *models, rows).item(), rel=1e-5)


@pytest.mark.parametrize("width", UNITS)
def test_kept_units_meet_the_dimensions_that_an_indexed_student_still_has(width: str) -> None:
    plan, rows = blueprint("4t_0.25h", aligner="indexed", units=width), batch()
    kept = [i for i in range(WIDTH) if i % 3]
    shape = plan.full_shape.narrowed({**plan.full_shape.kept, HIDDEN: tuple(kept)})
    teacher = FrozenModel(fixtures.bert(0, attn_implementation=plan.attention), plan.family, plan.compared)
    selected = FrozenModel(teacher.model, plan.family, plan.compared, selection=plan.selection)
    knowledge = Signals(*selected(*as_tuple(rows) or ()))  # type: ignore[arg-type]
    plain = twin.scaled(fixtures.bert(1), 12)
    narrow = Narrow(plain, kept)
    student = Student.unfilled(plan, shape)
    states = tuple(state[..., kept] for state in twin.signals(plain, rows)[1])
    theirs = Signals(states, knowledge.queries_keys, 1.0, knowledge.logits)
    counts = rows.counts(plan.selection.count(rows))
    total = student.objective.forward(theirs, knowledge, rows, counts, student.aligners).total
    wanted = expected(plan, narrow, twin.scaled(fixtures.bert(0), 12), rows, kept)  # type: ignore[arg-type]
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)


class Narrow:
    """A plain model whose states have lost dimensions, as far as `twin.signals` asks."""

    def __init__(self, model: BertForMaskedLM, kept: list[int]) -> None:
        self.bert, self._model, self._kept = _NoLayers(), model, kept

    def __call__(self, **inputs: Any) -> Any:
        out = self._model(**inputs)
        out.hidden_states = tuple(state[..., self._kept] for state in out.hidden_states)
        return out


class _NoLayers:
    class encoder:
        layer: tuple[()] = ()


def selected(plan: Blueprint, rows: Batch) -> Signals:
    teacher = fixtures.bert(0, attn_implementation=plan.attention)
    return Signals(*FrozenModel(teacher, plan.family, plan.compared, selection=plan.selection)(*as_tuple(rows) or ()))  # type: ignore[arg-type]


def test_of_fewer_tokens_than_are_asked_for_all_are_kept_and_padding_never_is() -> None:
    plan, rows = blueprint("9t", tokens="attention"), batch()
    lengths = rows.attention_mask.sum(dim=1)
    assert (lengths < 9).any() and (lengths > 9).any()
    for kept in selected(plan, rows).kept:
        assert torch.equal(kept.counted.sum(dim=1).long(), lengths.clamp(max=9))
        assert kept.positions is not None
        assert rows.attention_mask.gather(1, kept.positions)[kept.counted.bool()].all()


def test_without_separators_they_are_not_kept_even_where_nothing_else_is_left() -> None:
    plan, rows = blueprint("9t", tokens="attention_no_sep"), batch()
    ordinary = (rows.attention_mask.bool() & (rows.input_ids != fixtures.SEP)).sum(dim=1)
    assert torch.equal(plan.selection.count(rows), ordinary.clamp(max=9))
    for kept in selected(plan, rows).kept:
        assert kept.positions is not None
        assert (rows.input_ids.gather(1, kept.positions)[kept.counted.bool()] != fixtures.SEP).all()


@pytest.mark.parametrize("keep", ["1l", "2l_3t", "4l", "7l"])
def test_states_are_dropped_from_the_lowest_on_the_embeddings_first(keep: str) -> None:
    plan = blueprint(keep)
    every = [(0, 0), (1, 1), (2, 2), (3, 3)]
    compared = plan.compared
    pairs = [(0, 0)] * compared.embeddings + [
        (s + 1, t + 1) for s, t in zip(compared.student, compared.teacher, strict=True)
    ]
    assert pairs == every[-int(keep[0]) :]
    assert len(found(plan, batch())[1].aligners) == len(pairs)


@pytest.mark.parametrize(("top_share", "layers"), [(2 / 3, 12), (5 / 6, 12), (1.0, 12), (0.8333, 6)])
@pytest.mark.parametrize("own", [3, 4, 6])
def test_a_students_layers_learn_from_layers_up_to_a_share_of_the_depth(
    top_share: float, layers: int, own: int
) -> None:
    plan = blueprint(None, top=top_share)
    plan = Blueprint(
        plan.family, fixtures.bert_config(num_hidden_layers=own), plan.run, plan.attention,
        fixtures.bert_config(num_hidden_layers=layers),
    )  # fmt: skip
    highest = round(top_share * layers)
    wanted = [int(np.rint(layer * highest / own)) for layer in range(1, own + 1)]
    assert [layer + 1 for layer in plan.compared.teacher] == wanted


def test_a_causal_models_last_real_token_asks() -> None:
    family, attention = Gpt2Family(), attention_implementation("sdpa")
    model = fixtures.gpt2(0, attn_implementation=attention)
    rows = fixtures.batch()
    config = blueprint("4t", tokens="attention").run.knowledge
    whole = family.signals(model, rows)
    selection = Selection(config, WIDTH, SEED, causal=True)
    _, (kept,) = selection.parts(whole.hidden_states[2:3], [2], whole, rows, None)
    query, key = whole.queries_keys[1]
    for row, length in enumerate(rows.attention_mask.sum(dim=1).tolist()):
        scores = (query[row, :, length - 1, None] * key[row, :, :length]).sum(-1).mean(0).tolist()
        wanted = sorted(sorted(range(length), key=lambda place: -scores[place])[:4])
        assert kept.positions is not None and kept.positions[row].tolist() == wanted


def test_random_tokens_are_others_in_another_state_masking_or_sample() -> None:
    plan = blueprint("4t", tokens="random")
    first, again, other = (selected(plan, batch(masking)).kept for masking in (0, 0, 1))

    def places(kept: tuple[Kept, ...]) -> list[Any]:
        return [part.positions.tolist() for part in kept if part.positions is not None]

    assert places(first) == places(again) != places(other)
    assert places(first)[0] != places(first)[1]


@pytest.mark.parametrize("count", [1, 3, 7, 9])
def test_of_equals_the_lowest_indices_are_taken(count: int) -> None:
    random = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 3, (50, 7), generator=random).float()
    scores[::5, 3] = float("-inf")
    wanted = [sorted(sorted(range(7), key=lambda i: (-row[i], i))[:count]) for row in scores.tolist()]
    assert top(scores, count).tolist() == wanted


def test_hashes_of_tensors_are_ordered_like_those_of_arrays() -> None:
    numbers = np.arange(-1000, 1000)
    signed = tensor_hash(7, torch.from_numpy(numbers), 3).numpy()
    unsigned = counter_hash(7, numbers, 3)
    assert np.array_equal(signed.view(np.uint64) ^ np.uint64(1 << 63), unsigned)


def test_padding_can_be_compared_as_well() -> None:
    plan, rows = blueprint(None, padding=True), batch()
    total, _ = found(plan, rows)
    hidden = twin.signals(twin.scaled(fixtures.bert(1), 12), rows)[1]
    theirs = twin.signals(twin.scaled(fixtures.bert(0), 12), rows)[1]
    wanted = torch.stack([(h - t).square().mean() for h, t in zip(hidden, theirs, strict=True)]).mean()
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize(
    "faulty", [{"keep": "10"}, {"keep": "0l"}, {"keep": "0t"}, {"keep": "1.5h"}, {"keep": ""}, {"keep": "3t_1l"}]
)
def test_a_share_that_cannot_be_read_is_refused(faulty: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"expected|such as 1l_10t_0.1h"):
        RunConfig.model_validate({"knowledge": faulty})


def test_the_share_of_the_paper_is_read() -> None:
    share = RunConfig.model_validate({"knowledge": {"keep": "1l_10t_0.1h"}}).knowledge.share
    assert share == (1, 10, 0.1) and math.isclose(share.units or 0, 0.1)


def test_the_share_of_kept_units_that_a_student_still_has() -> None:
    kept = Kept(torch.ones(1, 2), None, torch.tensor([[[0, 3], [1, 2]]]))
    assert shared_units([kept, kept], (0, 1, 2), 4) == 0.75
    assert shared_units([Kept(torch.ones(1, 2), None, torch.tensor([1, 3]))], (0, 1), 4) == 0.5
    assert shared_units([Kept(torch.ones(1, 2))], (0, 1), 4) is None
