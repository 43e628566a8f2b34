"""Perplexity against a forward pass a token; words, windows and WikiText's conventions against sums by hand."""

from __future__ import annotations

import json
import math
from itertools import pairwise, product
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel

from homodistil.errors import ConfigError, DataError, ModelError
from homodistil.evaluation.perplexity import Windows, evaluate_perplexity
from homodistil.evaluation.wikitext import as_typed, count_words
from tests.fixtures import save_bert
from tests.unit.evaluation.tiny_gpt2 import POSITIONS, TEXT, log_probability, save_gpt2, save_tokenizer

WIKITEXT = Path(__file__).parents[4] / "shared" / "data" / "lm" / "wikitext2_valid.txt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gpt2(tmp_path_factory.mktemp("model") / "gpt2")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def contexts(count: int, window: int, stride: int) -> list[int]:
    """How many tokens the n-th of a text is foretold from, the one that begins it included: said another way than the
    code does, by walking the text."""
    seen, until = [], min(window, count)  # the first window foretells the tokens up to `until`
    for number in range(count):
        if number == until:
            until = min(until + stride, count)
        last_shown = until  # inputs are the begin token and all but the last of those foretold
        seen.append(number + 1 - max(0, last_shown - window))
    return seen


@pytest.mark.parametrize(("window", "stride"), [(None, None), (8, 3), (7, 7), (9, 1), (POSITIONS, 5)])
def test_the_loss_is_that_of_each_token_in_a_forward_pass_of_its_own(
    model: Path, text: str, window: int | None, stride: int | None
) -> None:
    scores = evaluate_perplexity(model, text, window, stride, micro_batch=3)

    stock = GPT2LMHeadModel.from_pretrained(model).eval()
    ids = AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    shown = contexts(len(ids), window or POSITIONS, stride or (window or POSITIONS) // 2)
    all_ids = [0, *ids]
    losses = [
        -log_probability(stock, all_ids[number + 1 - seen : number + 1], token)[0]
        for number, (token, seen) in enumerate(zip(ids, shown, strict=True))
    ]
    assert len(ids) > 2 * POSITIONS
    assert scores["tokens"] == len(ids)
    assert scores["nll_per_token"] == pytest.approx(sum(losses) / len(ids), rel=1e-5)
    assert scores["token_perplexity"] == pytest.approx(math.exp(sum(losses) / len(ids)), rel=1e-4)


def test_windows_foretell_each_token_once_and_never_from_less_than_was_promised() -> None:
    for count, length, stride in product(range(1, 40), range(1, 13), range(1, 13)):
        if stride > length:
            continue
        foretold = []
        for start, end, scored in Windows(length, stride).over(count):
            assert end - start - 1 <= length  # the last token is an answer, and not shown
            for target in range(end - scored, end):
                foretold.append(target)
                assert target - start >= min(length - stride + 1, target)
        assert foretold == list(range(1, count))


def test_a_word_a_byte_and_a_token_share_one_loss(model: Path, text: str) -> None:
    scores = {name: float(score) for name, score in evaluate_perplexity(model, text).items() if name != "convention"}
    words = 12 + 1 + 15 + 1 + 0 + 1 + 17 + 1  # of each line, and its end
    nll = scores["nll_per_token"] * scores["tokens"]
    assert (scores["words"], scores["bytes"]) == (words, len(TEXT.encode()))
    assert scores["word_perplexity"] == pytest.approx(math.exp(nll / words))
    assert scores["bits_per_byte"] == pytest.approx(nll / len(TEXT.encode()) / math.log(2))


def test_documents_are_read_apart(model: Path, tmp_path: Path) -> None:
    texts = ["A lobster is blue .", "The sea is cold , and the sea is large ."]
    alone = []
    for number, one in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(one, encoding="utf-8")
        alone.append(evaluate_perplexity(model, str(tmp_path / f"{number}.txt")))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts), encoding="utf-8")
    together = evaluate_perplexity(model, str(rows))
    nll = sum(float(one["nll_per_token"]) * float(one["tokens"]) for one in alone)
    assert together["documents"] == 2
    assert together["words"] == 5 + 11
    assert float(together["nll_per_token"]) * float(together["tokens"]) == pytest.approx(nll, rel=1e-6)


def test_every_character_of_a_text_file_is_foretold(model: Path, tmp_path: Path) -> None:
    raw = " \n = Title = \n \n Two  spaces\tand a tab \n"
    (tmp_path / "raw.txt").write_text(raw, encoding="utf-8")
    scores = evaluate_perplexity(model, str(tmp_path / "raw.txt"))
    assert scores["tokens"] == len(AutoTokenizer.from_pretrained(model)(raw)["input_ids"])
    assert (scores["words"], scores["documents"]) == (3 + 5 + 4, 1)


def test_detokenising_changes_what_is_read_and_not_what_is_counted(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "wikitext.txt"
    path.write_text(" = Sea = \n A cold @-@ water animal , 2 @.@ 5 kg . \n", encoding="utf-8")
    as_it_is, typed = (evaluate_perplexity(model, str(path), detokenize=undone) for undone in (False, True))
    assert as_it_is["words"] == typed["words"] == 3 + 1 + 11 + 1
    assert as_it_is["bytes"] == typed["bytes"]
    assert int(typed["tokens"]) < int(as_it_is["tokens"])
    assert "--perplexity.detokenize" in str(as_it_is["convention"])
    assert "undone" in str(typed["convention"])


@pytest.mark.parametrize(
    ("tokenised", "typed"),
    [
        (" = = Early life = = \n", "== Early life ==\n"),
        (" = = = Deep = = = ", "=== Deep ==="),
        (" a well @-@ known 1 @,@ 234 @.@ 5 ", "a well-known 1,234.5"),
        (' he said , " no ! " and left . ', 'he said, "no!" and left.'),
        (" it 's what the players ' wives didn 't know ", "it's what the players' wives didn't know"),
        (" ( 24 in ) cost $ 5 , 10 % [ 1 ] ; so : why ? ", "(24 in) cost $5, 10% [1]; so: why?"),
        (" \n a <unk> . \n \n", "\na <unk>.\n\n"),
    ],
)
def test_wikitexts_tokenisation_is_undone(tokenised: str, typed: str) -> None:
    assert as_typed(tokenised) == typed


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="../shared/data/lm/wikitext2_valid.txt is not there")
def test_wikitext_2_has_the_number_of_words_that_it_is_known_for(model: Path, tmp_path: Path) -> None:
    text = WIKITEXT.read_text(encoding="utf-8")
    assert count_words(text) == 217_646
    assert as_typed(text).count("\n") == text.count("\n")
    beginning = tmp_path / "beginning.txt"
    beginning.write_text("".join(text.splitlines(keepends=True)[:6]), encoding="utf-8")
    assert evaluate_perplexity(model, str(beginning), micro_batch=16)["words"] == count_words(beginning.read_text())


def test_an_encoder_is_refused_before_its_weights_are_read(text: str, tmp_path: Path) -> None:
    encoder = save_bert(tmp_path / "bert")
    (encoder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"expected a causal.*found masked.*\(bert\).*--task mlm or pseudo_perplexity"):
        evaluate_perplexity(encoder, text)


def test_a_window_beyond_the_models_positions_is_refused(model: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--perplexity\.window 25: the model has {POSITIONS} positions"):
        evaluate_perplexity(model, text, window=25)


def test_a_stride_beyond_the_window_would_leave_tokens_out_and_is_refused(model: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"--perplexity\.stride 9: expected at most the window, 8"):
        evaluate_perplexity(model, text, window=8, stride=9)


def test_an_empty_text_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"empty\.txt: no text in it"):
        evaluate_perplexity(model, str(tmp_path / "empty.txt"))


def test_a_model_without_a_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    bare = save_gpt2(tmp_path / "gpt2")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer here"):
        evaluate_perplexity(bare, text)


def test_a_tokenizer_of_another_vocabulary_is_refused_with_both_sizes(text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer has \d+ tokens.*vocab_size is 100"):
        evaluate_perplexity(save_gpt2(tmp_path / "gpt2", vocab_size=100), text)


def test_a_tokenizer_that_cannot_begin_a_text_is_refused(text: str, tmp_path: Path) -> None:
    directory = save_gpt2(tmp_path / "gpt2")
    save_tokenizer(directory, special=False)
    with pytest.raises(ModelError, match="neither a bos_token nor an eos_token"):
        evaluate_perplexity(directory, text)


def test_consecutive_windows_are_a_stride_apart() -> None:
    ends = [end for _, end, _ in Windows(8, 3).over(30)]
    assert ends[0] == 9
    assert {after - before for before, after in pairwise(ends[:-1])} == {3}
