"""Scores against a twin that keeps every update's |w g| whole and sums by name, loop by loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from homodistil.config import PruningConfig
from homodistil.models.bert import BertFamily
from homodistil.models.groups import kept_positions
from homodistil.models.shape import StudentShape
from homodistil.pruning.importance import Importance
from homodistil.pruning.surgery import slice_flat
from homodistil.ranks import Ranks
from tests.fixtures import bert
from tests.pool import RankPool
from tests.unit.pruning.shards import ALONE, Buffers, Named, shattered, whole

FAMILY = BertFamily()
MODEL = bert(num_hidden_layers=2)
SHAPE = StudentShape.full(2, FAMILY.widths(MODEL.config))
GROUPS = FAMILY.groups(SHAPE)
WINDOW, BETA = 3, 0.85


def settings(metric: str = "sensitivity", across: str = "per_matrix") -> PruningConfig:
    return PruningConfig.model_validate(
        {"metric": metric, "across": across, "smoothing_window": WINDOW, "smoothing_beta": BETA}
    )


def update(number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and gradients of one update; both move."""
    random = torch.Generator().manual_seed(100 + number)
    named = {name: p.detach() for name, p in MODEL.named_parameters()}
    weights = {n: w + 0.01 * torch.randn(w.shape, generator=random) for n, w in named.items()}
    return weights, {n: torch.randn(w.shape, generator=random) * 1e-3 for n, w in named.items()}


def smoothed(metric: str, updates: int) -> dict[str, Tensor]:
    """Per-weight importance in float64, smoothed as docs/methods.md says, never summed."""
    history = []
    for number in range(updates):
        weights, gradients = update(number)
        history.append(
            {n: (w if metric == "magnitude" else w * gradients[n]).abs().double() for n, w in weights.items()}
        )
    result = {}
    for name, first in history[0].items():
        mean, uncertainty = torch.zeros_like(first), torch.zeros_like(first)
        if metric == "platon":
            b = BETA ** (1 / WINDOW)
            for entry in history:
                mean = b * mean + (1 - b) * entry[name]
                uncertainty = b * uncertainty + (1 - b) * (entry[name] - mean).abs()
            result[name] = mean * uncertainty
        else:
            for begin in range(0, updates, WINDOW):
                window = torch.stack([entry[name] for entry in history[begin : begin + WINDOW]])
                mean = BETA * mean + (1 - BETA) * window.mean(dim=0)
            result[name] = mean
    return result


def twin(s: dict[str, Tensor], across: str) -> dict[str, Tensor]:
    """The groups of docs/methods.md once more: per group, per matrix, the named tensors whose sums count together."""
    emb, top = "bert.embeddings", "cls.predictions.transform"
    embed = [s[f"{emb}.word_embeddings.weight"].sum(0), s[f"{emb}.LayerNorm.weight"], s[f"{emb}.LayerNorm.bias"]]
    hidden = [embed] + [[s[f"{emb}.{kind}_embeddings.weight"].sum(0)] for kind in ("position", "token_type")]
    groups: dict[str, list[list[Tensor]]] = {}

    def writer(block: str) -> list[Tensor]:
        norm = [s[f"{block}.LayerNorm.weight"], s[f"{block}.LayerNorm.bias"]]
        return [s[f"{block}.dense.weight"].sum(1), s[f"{block}.dense.bias"], *norm]

    for layer in range(2):
        at = f"bert.encoder.layer.{layer}"
        rows = {
            p: [s[f"{at}.attention.self.{p}.weight"].sum(1), s[f"{at}.attention.self.{p}.bias"]]
            for p in ("query", "key", "value")
        }
        out = [s[f"{at}.attention.output.dense.weight"].sum(0)]
        hidden += [[s[f"{at}.attention.self.{p}.weight"].sum(0)] for p in rows]
        hidden += [
            writer(f"{at}.attention.output"),
            [s[f"{at}.intermediate.dense.weight"].sum(0)],
            writer(f"{at}.output"),
        ]
        up = [s[f"{at}.intermediate.dense.weight"].sum(1), s[f"{at}.intermediate.dense.bias"]]
        groups[f"layers.{layer}.ffn"] = [up, [s[f"{at}.output.dense.weight"].sum(0)]]
        groups[f"layers.{layer}.heads"] = [[v.view(6, 12).sum(1) for v in vs] for vs in (*rows.values(), out)]
        for head in range(6):
            span = slice(12 * head, 12 * head + 12)
            groups[f"layers.{layer}.heads.{head}.qk"] = [[v[span] for v in rows[p]] for p in ("query", "key")]
            groups[f"layers.{layer}.heads.{head}.vo"] = [[v[span] for v in vs] for vs in (rows["value"], out)]
    groups["hidden"] = [*hidden, writer(top), [s[f"{top}.dense.weight"].sum(0)]]
    return {name: weighed(matrices, across) for name, matrices in groups.items()}


def weighed(matrices: list[list[Tensor]], across: str) -> Tensor:
    if across == "none":
        return torch.stack([vector for matrix in matrices for vector in matrix]).sum(0)
    if across == "per_parameter":
        matrices = [[vector] for matrix in matrices for vector in matrix]
    sums = [torch.stack(matrix).sum(0) for matrix in matrices]
    return torch.stack([vector / vector.sum() for vector in sums]).sum(0)


def observed(importance: Importance, updates: int, cut: Callable[[Named, Named, Buffers], list[object]]) -> Importance:
    buffers: Buffers = {}
    for number in range(updates):
        importance.observe(cut(*update(number), buffers))  # type: ignore[arg-type]
    return importance


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=0)


@pytest.mark.parametrize("across", ["per_matrix", "none", "per_parameter"])
@pytest.mark.parametrize("updates", [1, 3, 7])
def test_scores_of_shattered_weights_are_the_twins(updates: int, across: str) -> None:
    importance = Importance(settings(across=across), GROUPS, ALONE, seed=0)
    observed(importance, updates, lambda w, g, b: shattered(w, g, seed=updates, buffers=b))  # type: ignore[arg-type,return-value]
    assert_close(importance.scores(), twin(smoothed("sensitivity", updates), across), rtol=1e-6)


@pytest.mark.parametrize(("metric", "rtol"), [("magnitude", 1e-6), ("platon", 1e-4)])
def test_each_metric_is_the_twins(metric: str, rtol: float) -> None:
    importance = Importance(settings(metric), GROUPS, ALONE, seed=0)
    observed(importance, 5, lambda w, g, b: shattered(w, g, seed=1, buffers=b))  # type: ignore[arg-type,return-value]
    assert_close(importance.scores(), twin(smoothed(metric, 5), "per_matrix"), rtol)


def test_the_metrics_disagree_with_each_other() -> None:
    orders = set()
    for metric in ("sensitivity", "magnitude", "platon", "random"):
        importance = observed(Importance(settings(metric), GROUPS, ALONE, seed=0), 4, whole)  # type: ignore[arg-type]
        orders.add(tuple(importance.scores()["hidden"].argsort().tolist()))
    assert len(orders) == 4


def test_making_a_plan_does_not_close_an_open_window() -> None:
    importance = Importance(settings(), GROUPS, ALONE, seed=0)
    for number in range(5):
        importance.observe(whole(*update(number)))
        importance.scores()
    assert_close(importance.scores(), twin(smoothed("sensitivity", 5), "per_matrix"), rtol=1e-6)


def test_scores_carry_over_a_prune_at_the_kept_positions() -> None:
    before = Importance(settings(across="none"), GROUPS, ALONE, seed=0)
    observed(before, 4, whole)  # type: ignore[arg-type]
    kept = {name: tuple(range(0, len(units), 2)) for name, units in SHAPE.kept.items()}
    kept = {n: u for n, u in kept.items() if "heads." not in n or int(n.split(".")[3]) in kept["layers.0.heads"]}
    scores = before.scores()
    before.rebase(FAMILY.groups(SHAPE.narrowed(kept)), kept_positions(GROUPS, kept))
    after = before.scores()
    assert set(after) == set(kept)
    for name in kept:
        if not name.endswith("heads"):  # a head's score loses its pruned dimensions
            torch.testing.assert_close(after[name], scores[name][list(kept[name])], rtol=1e-12, atol=0)


def test_platons_buffers_go_on_weight_by_weight_after_a_prune() -> None:
    kept = {name: tuple(range(len(units) - len(units) // 3)) for name, units in SHAPE.kept.items()}
    kept = {n: u for n, u in kept.items() if "heads." not in n or int(n.split(".")[3]) in kept["layers.0.heads"]}
    positions = kept_positions(GROUPS, kept)
    axes = {n: {a: p for (m, a), p in positions.items() if m == n} for n, _ in MODEL.named_parameters()}

    def cut(tensors: Named) -> dict[str, Tensor]:
        return {
            n: slice_flat(t.flatten(), t.shape, 0, axes[n])[0].view(
                [len(axes[n].get(a, range(s))) for a, s in enumerate(t.shape)]
            )
            for n, t in tensors.items()
        }

    pruned, always_narrow = (
        Importance(settings("platon"), g, ALONE, 0) for g in (GROUPS, FAMILY.groups(SHAPE.narrowed(kept)))
    )
    wide, narrow = {}, {}  # type: ignore[var-annotated]
    for number in range(3):
        pruned.observe(whole(*update(number), wide))
        always_narrow.observe(whole(*map(cut, update(number)), narrow))
    shapes = {n: p.shape for n, p in MODEL.named_parameters()}
    moved = {
        (n, 0): {k: slice_flat(b, shapes[n], 0, axes[n])[0] for k, b in own.items()} for (n, _), own in wide.items()
    }
    pruned.rebase(FAMILY.groups(SHAPE.narrowed(kept)), positions)
    for one, buffers in ((pruned, moved), (always_narrow, narrow)):
        one.observe(whole(*map(cut, update(3)), buffers))
    for name, scores in pruned.scores().items():
        assert torch.equal(scores, always_narrow.scores()[name])


def test_random_scores_depend_on_the_seed_and_on_nothing_else() -> None:
    def scores(seed: int, updates: int) -> Tensor:
        importance = Importance(settings("random"), GROUPS, ALONE, seed)
        return observed(importance, updates, whole).scores()["hidden"]  # type: ignore[arg-type]

    assert torch.equal(scores(3, 1), scores(3, 4))
    assert not torch.equal(scores(3, 1).argsort(), scores(4, 1).argsort())


def test_a_tensor_without_any_importance_does_not_decide() -> None:
    weights, gradients = update(0)
    importance = Importance(settings(), GROUPS, ALONE, seed=0)
    silent = {**gradients, "bert.embeddings.token_type_embeddings.weight": torch.zeros(2, 72)}
    importance.observe(whole(weights, silent))
    assert torch.isfinite(importance.scores()["hidden"]).all()


def test_a_checkpoint_brings_back_scores_and_the_open_window() -> None:
    first = observed(Importance(settings(), GROUPS, ALONE, seed=0), 5, whole)  # type: ignore[arg-type]
    second = Importance(settings(), GROUPS, ALONE, seed=0)
    second.load(first.shares(), first.observed)
    for importance in (first, second):
        importance.observe(whole(*update(5)))
        importance.observe(whole(*update(6)))
    assert second.observed == 7
    assert_close(second.scores(), first.scores(), rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("metric", ["sensitivity", "platon"])
def test_an_update_with_a_gradient_that_is_not_finite_is_not_scored(metric: str, bad: float) -> None:
    importance = Importance(settings(metric), GROUPS, ALONE, seed=0)
    buffers: Buffers = {}
    for number in (0, 99, 1):
        weights, gradients = update(number)
        if number == 99:
            gradients["cls.predictions.bias"][5] = bad  # in no group
        importance.observe(whole(weights, gradients, buffers))
    assert importance.observed == 2
    assert_close(importance.scores(), twin(smoothed(metric, 2), "per_matrix"), rtol=1e-4)


def test_after_a_resume_platon_knows_its_scores_before_any_update_is_scored() -> None:
    buffers: Buffers = {}
    first = Importance(settings("platon"), GROUPS, ALONE, seed=0)
    for number in (0, 1):
        first.observe(whole(*update(number), buffers))
    second = Importance(settings("platon"), GROUPS, ALONE, seed=0)
    second.load(first.shares(), first.observed)
    weights, gradients = update(2)
    gradients["cls.predictions.bias"][5] = float("nan")
    second.observe(whole(weights, gradients, buffers))  # the checkpoint brought the buffers back with the weights
    assert_close(second.scores(), first.scores(), rtol=0)


def scores_of_a_rank(metric: str, world_size: int) -> tuple[int, dict[str, Tensor]]:
    """In a rank: every world_size-th fragment; after the second update one rank alone meets a NaN; then a
    checkpoint is written and read back."""
    ranks = Ranks.current()
    importance, buffers = Importance(settings(metric), GROUPS, ranks, seed=0), {}  # type: ignore[var-annotated]
    for number in (0, 1, 99, 2, 3):
        weights, gradients = update(number)
        own = shattered(weights, gradients, 0, buffers)[ranks.rank :: world_size]
        if number == 99 and ranks.rank == world_size - 1:
            own[0].gradient[0] = float("nan")
        importance.observe(own)
    if metric != "platon":
        importance.load(importance.shares(), importance.observed)
    return importance.observed, importance.scores()


@pytest.mark.parametrize("metric", ["sensitivity", "platon"])
def test_two_ranks_score_as_one_and_skip_together(pool: Callable[[int], RankPool], metric: str) -> None:
    expected = twin(smoothed(metric, 4), "per_matrix")
    for count, scores in pool(2).run(scores_of_a_rank, metric, 2):
        assert count == 4
        assert_close(scores, expected, rtol=1e-4)
