"""The registered attention functions: stock results, the right queries and keys, gradients, one graph."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForMaskedLM
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_outputs import MaskedLMOutput

from homodistil.errors import ConfigError
from homodistil.models import attention
from homodistil.models.attention import attention_implementation, nothing_masked
from tests.fixtures import batch, bert, gpt2

KERNELS = ("sdpa", "eager", "auto")


def _run(model: BertForMaskedLM, input_ids: Tensor, attention_mask: Tensor) -> MaskedLMOutput:
    return model(input_ids, attention_mask=attention_mask, output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_output_is_that_of_the_stock_kernel(kernel: str) -> None:
    rows = batch()
    ours = bert(attn_implementation=attention_implementation(kernel))
    stock = bert(attn_implementation="sdpa" if kernel == "auto" else kernel)
    with torch.no_grad():
        logits = _run(ours, rows.input_ids, rows.attention_mask).logits
        expected = stock(rows.input_ids, attention_mask=rows.attention_mask).logits
    real = rows.attention_mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_layer_hands_out_the_queries_and_keys_of_the_stock_attention_maps(kernel: str) -> None:
    rows = batch()
    with torch.no_grad():
        ours = _run(bert(attn_implementation=attention_implementation(kernel)), rows.input_ids, rows.attention_mask)
        stock = _run(bert(attn_implementation="eager"), rows.input_ids, rows.attention_mask)
    assert len(ours.attentions) == 3
    for (query, key), expected in zip(ours.attentions, stock.attentions, strict=True):
        assert query.shape == key.shape == (6, 6, 24, 12)
        for row, length in enumerate(rows.attention_mask.sum(dim=1).tolist()):
            scores = query[row, :, :length] @ key[row, :, :length].mT / 12**0.5
            torch.testing.assert_close(scores.softmax(dim=-1), expected[row, :, :length, :length])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_padded_batch_gives_the_signals_of_its_unpadded_sequences(kernel: str) -> None:
    rows = batch()
    model = bert(attn_implementation=attention_implementation(kernel))
    with torch.no_grad():
        padded = _run(model, rows.input_ids, rows.attention_mask)
        for row, length in enumerate(rows.attention_mask.sum(dim=1).tolist()):
            alone = _run(model, rows.input_ids[row : row + 1, :length], torch.ones(1, length, dtype=torch.long))
            for ours, expected in zip(padded.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(ours[row : row + 1, :length], expected, rtol=1e-5, atol=1e-5)
            for layer, expected_layer in zip(padded.attentions, alone.attentions, strict=True):
                for ours, expected in zip(layer, expected_layer, strict=True):
                    torch.testing.assert_close(ours[row : row + 1, :, :length], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mask", ["padding", "none", "nothing masked"])
def test_a_causal_models_output_is_that_of_the_stock_kernel(kernel: str, mask: str) -> None:
    rows = batch()
    real = rows.attention_mask if mask == "padding" else torch.ones_like(rows.attention_mask)
    given = {"padding": real, "none": None, "nothing masked": nothing_masked(real.device)}[mask]
    with torch.no_grad():
        ours = gpt2(attn_implementation=attention_implementation(kernel))
        logits = ours(rows.input_ids, attention_mask=given, output_attentions=True).logits
        expected = gpt2(attn_implementation="eager")(rows.input_ids, attention_mask=real).logits
    torch.testing.assert_close(logits[real.bool()], expected[real.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_token_of_a_causal_model_does_not_see_those_after_it(kernel: str) -> None:
    rows, model = batch(), gpt2(attn_implementation=attention_implementation(kernel))
    other = rows.input_ids.clone()
    other[:, 9:] += 1
    with torch.no_grad():
        for given in (rows.attention_mask, nothing_masked(other.device)):
            one, two = (model(ids, attention_mask=given).logits for ids in (rows.input_ids, other))
            torch.testing.assert_close(one[:, :9], two[:, :9], rtol=1e-5, atol=1e-5)
            assert (one[:, 9:] - two[:, 9:]).abs().max() > 0.1


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_causal_model_generates_with_a_cache_what_it_generates_without(kernel: str) -> None:
    model, start = gpt2(attn_implementation=attention_implementation(kernel)), batch().input_ids[:2, :5]
    settings = {"attention_mask": torch.ones_like(start), "max_new_tokens": 6, "do_sample": False}
    cached, plain = (model.generate(start, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)


def test_without_padding_a_causal_models_mask_is_sdpas_own(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[tuple[bool, Tensor | None]] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def listening(*tensors: Tensor, is_causal: bool, attn_mask: Tensor | None, **others: Any) -> Tensor:
        settings.append((is_causal, attn_mask))
        return sdpa(*tensors, is_causal=is_causal, attn_mask=attn_mask, **others)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", listening)
    rows = batch()
    gpt2(attn_implementation=attention_implementation("sdpa"))(
        rows.input_ids, attention_mask=nothing_masked(rows.input_ids.device)
    )
    assert settings == [(True, None)] * 3


def _loss(output: MaskedLMOutput) -> Tensor:
    return sum(((query @ key.mT).square().mean() for query, key in output.attentions), output.logits.square().mean())


def _gradients(model: BertForMaskedLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_through_queries_and_keys_survive_activation_checkpointing() -> None:
    rows, no_dropout = batch(), {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    gradients = []
    for checkpointing in (False, True):
        model = bert(attn_implementation=attention_implementation("sdpa"), **no_dropout).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        _loss(_run(model, rows.input_ids, rows.attention_mask)).backward()
        gradients.append(_gradients(model))
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)


def test_model_and_loss_compile_to_one_graph() -> None:
    rows = batch()
    model = bert(attn_implementation=attention_implementation("sdpa"), num_hidden_layers=2)

    def loss(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return _loss(_run(model, input_ids, attention_mask))

    loss(rows.input_ids, rows.attention_mask).backward()
    expected = _gradients(model)
    model.zero_grad()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(rows.input_ids, rows.attention_mask).backward()
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_flash_attention_is_called_as_transformers_declares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        """Tensors (B, T, A, d) and a padding mask (B, T) or None, as the kernel takes them."""
        inspect.signature(_flash_attention_forward).bind(query, key, value, mask, **options)
        assert options["attn_implementation"] == "flash_attention_2"
        scores = torch.einsum("bqad,bkad->baqk", query, key) * options["softmax_scale"]
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
        if options["is_causal"]:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        return torch.einsum("baqk,bkad->bqad", scores.softmax(dim=-1), value)

    monkeypatch.setattr(attention, "_require_flash_attention", lambda: None)
    monkeypatch.setattr(attention, "_flash_attention_forward", stand_in)
    rows, name = batch(), attention_implementation.__wrapped__("flash_attention_2")
    with torch.no_grad():
        for model in (bert, gpt2):
            found = _run(model(attn_implementation=name), rows.input_ids, rows.attention_mask).logits
            expected = model(attn_implementation="eager")(rows.input_ids, attention_mask=rows.attention_mask).logits
            real = rows.attention_mask.bool()
            torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="claims something about machines without a GPU")
def test_flash_attention_without_a_gpu_is_refused_with_the_mend() -> None:
    with pytest.raises(ConfigError, match=r"performance\.attention.*flash_attention_2.*sdpa"):
        attention_implementation("flash_attention_2")
