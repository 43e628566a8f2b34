"""Tokenized examples, and the stream of them: the same for any number of ranks, every epoch a permutation."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from homodistil.batch import Batch
from homodistil.config import DataConfig, TaskConfig
from homodistil.data.examples import TaskData, TaskStream, updates_for
from homodistil.data.tokenizer import tokenizer_hash
from homodistil.errors import ConfigError, DataError
from tests.fixtures import PAD, VOCABULARY, save_tokenizer
from tests.unit.data.corpora import ranks
from tests.unit.data.small_tasks import GLUE, write_glue, write_squad

MAX_LENGTH = 20
TRAIN, VALIDATION, GLOBAL_BATCH = 26, 11, 12


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def causal_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like GPT-2's: bytes, one special token, nothing added."""
    folder = tmp_path_factory.mktemp("causal")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<|endoftext|>"])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = ["input_ids", "attention_mask"]
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", model_input_names=names)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("rte"), "rte", TRAIN, VALIDATION)


@pytest.fixture(scope="module")
def data(rte: Path, tokenizer: Path) -> TaskData:
    return TaskData.open(TaskConfig(name="rte", path=rte, max_length=MAX_LENGTH), tokenizer)


def stream(
    data: TaskData, rank: int = 0, world_size: int = 1, seed: int = 0, grouped: bool = False, **options: Any
) -> TaskStream:
    settings = {"global_batch": GLOBAL_BATCH, "micro_batch": 4, **options}
    config = DataConfig.model_validate(settings)
    return TaskStream(data, config, seed, ranks(rank, world_size), group_by_length=grouped)


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def test_what_a_run_reads_at_its_end_is_missed_at_its_beginning(tmp_path: Path, tokenizer: Path) -> None:
    folder = write_glue(tmp_path, "mnli", TRAIN, VALIDATION)
    (folder / "dev_mismatched.tsv").unlink()
    config = TaskConfig(name="mnli", path=folder, max_length=MAX_LENGTH)
    with pytest.raises(DataError, match=r"dev_mismatched\.tsv: no such file.*dev_matched\.tsv, dev_mismatched\.tsv"):
        TaskData.open(config, tokenizer)
    assert TaskData.open(config, tokenizer, ["validation"]).count("validation") == VALIDATION


def test_one_file_of_questions_is_no_run(tmp_path: Path, tokenizer: Path) -> None:
    write_squad(tmp_path, impossible=False)
    config = TaskConfig(name="squad", path=tmp_path / "dev-v0.json", max_length=MAX_LENGTH)
    with pytest.raises(DataError, match=r"dev-v0\.json: one file, which the run would train on and be measured on"):
        TaskData.open(config, tokenizer)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_rows_interleaved_are_the_global_batch_of_one_rank(data: TaskData, world_size: int) -> None:
    alone = list(stream(data).updates(0, 7))
    shared = [list(stream(data, rank, world_size).updates(0, 7)) for rank in range(world_size)]
    for number, (update, whole) in enumerate(alone):
        assert {parts[number][0] for parts in shared} == {update} == {number + 1}
        for name, tensor in tensors(whole).items():
            for rank in range(world_size):
                assert torch.equal(getattr(shared[rank][number][1], name), tensor[rank::world_size]), name


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("global_batch", [1, 5, 12, 40])
def test_every_epoch_is_another_permutation_and_nothing_is_dropped(
    data: TaskData, global_batch: int, grouped: bool
) -> None:
    updates = stream(data, grouped=grouped, global_batch=global_batch).updates(0, 3 * TRAIN)
    samples = [sample for _, batch in updates for sample in batch.samples.tolist()][: 3 * TRAIN]
    epochs = [samples[start : start + TRAIN] for start in range(0, 3 * TRAIN, TRAIN)]
    assert all(sorted(epoch) == list(range(TRAIN)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_grouped_by_length_a_batch_is_of_like_lengths_and_batches_come_in_no_order(data: TaskData) -> None:
    def lengths(grouped: bool) -> list[torch.Tensor]:
        """Of each batch of two epochs."""
        updates = stream(data, grouped=grouped, global_batch=4).updates(0, 2 * TRAIN // 4)
        return [batch.attention_mask.sum(dim=1) for _, batch in updates]

    def spread(batches: list[torch.Tensor]) -> int:
        return sum(int(lengths_B.max() - lengths_B.min()) for lengths_B in batches)

    apart, together = lengths(False), lengths(True)
    assert spread(together) < spread(apart) / 3
    longest = [int(lengths_B.max()) for lengths_B in together]
    assert longest != sorted(longest, reverse=True) and longest != sorted(longest)


def test_the_order_depends_on_the_seed_and_not_on_the_batch_size(data: TaskData) -> None:
    def order(seed: int, global_batch: int) -> list[int]:
        updates = stream(data, seed=seed, global_batch=global_batch).updates(0, 24 // global_batch)
        return [sample for _, batch in updates for sample in batch.samples.tolist()]

    assert order(0, 4) == order(0, 12) != order(1, 12)


@pytest.mark.parametrize("start", [1, 5, 1000])
def test_resuming_at_any_update_continues_the_uninterrupted_run(data: TaskData, start: int) -> None:
    whole = list(islice(stream(data, 1, 2).updates(0, start + 2), start, None))
    resumed = list(stream(data, 1, 2).updates(start, start + 2))
    for (update, expected), (found_update, found) in zip(whole, resumed, strict=True):
        assert update == found_update
        assert all(torch.equal(tensor, getattr(found, name)) for name, tensor in tensors(expected).items())


@pytest.mark.parametrize("name", GLUE)
def test_rows_are_what_the_tokenizer_makes_of_the_files_lines(name: str, tmp_path: Path, tokenizer: Path) -> None:
    write_glue(tmp_path, name)
    some = TaskData.open(TaskConfig(name=name, path=tmp_path, max_length=MAX_LENGTH), tokenizer)
    one_text = name in ("cola", "sst2")
    columns = {"cola": (3, 3, 1), "sst2": (0, 0, 1), "mrpc": (3, 4, 0), "qnli": (1, 2, 3), "rte": (1, 2, 3)}
    columns |= {"wnli": (1, 2, 3), "stsb": (7, 8, 9), "qqp": (3, 4, 5), "mnli": (8, 9, 11)}
    first, second, label = columns[name]
    lines = (tmp_path / "train.tsv").read_text().splitlines()[0 if name == "cola" else 1 :]
    plain = AutoTokenizer.from_pretrained(tokenizer)
    batch = some.batch("train", np.arange(len(lines)))
    for row, line in enumerate(lines):
        fields = line.split("\t")
        texts = fields[first : first + 1] if one_text else [fields[first], fields[second]]
        expected = plain(*texts, truncation=True, max_length=MAX_LENGTH)
        length = len(expected["input_ids"])
        assert batch.input_ids[row, :length].tolist() == expected["input_ids"]
        assert batch.token_type_ids[row, :length].tolist() == expected["token_type_ids"]
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
        assert (batch.input_ids[row, length:] == PAD).all()
        truth = some.task.classes.index(fields[label]) if some.task.classes else float(fields[label])
        assert batch.labels[row].tolist() == [truth]
    assert batch.labels.dtype == (torch.float32 if name == "stsb" else torch.int64)
    assert batch.scored_positions.tolist() == [[0]] * len(lines)
    assert batch.weights.tolist() == [[1]] * len(lines)
    assert batch.weights.dtype == torch.float32


def test_batches_are_as_wide_as_their_longest_needs_in_steps_of_eight(data: TaskData) -> None:
    widths = set()
    for _, batch in stream(data, global_batch=2, micro_batch=2).updates(0, 40):
        longest = int(batch.attention_mask.sum(dim=1).max())
        assert batch.input_ids.shape[1] == min(-(-longest // 8) * 8, MAX_LENGTH)
        assert batch.padded == (not bool(batch.attention_mask.all()))
        widths.add(batch.input_ids.shape[1])
    assert widths >= {16, MAX_LENGTH}


def test_rows_that_fill_their_width_are_not_padded(data: TaskData) -> None:
    longest = np.flatnonzero(data.splits["train"].lengths == MAX_LENGTH)
    assert len(longest) > 1
    assert not data.batch("train", longest).padded


def test_spans_have_two_slots_and_their_windows_are_counted(tmp_path: Path, tokenizer: Path) -> None:
    write_squad(tmp_path, impossible=True)
    config = TaskConfig(name="squad2", path=tmp_path, max_length=24, stride=6)
    some = TaskData.open(config, tokenizer)
    assert some.windows is not None and some.count("validation") == len(some.windows.question) > 8
    _, batch = next(stream(some).updates(0, 1))
    assert batch.labels.shape == batch.scored_positions.shape == batch.weights.shape == (GLOBAL_BATCH, 2)
    assert batch.labels.dtype == torch.int64
    assert not batch.scored_positions.any()


def test_a_causal_tokenizer_pads_with_its_end_and_scores_the_last_token(tmp_path: Path, causal_tokenizer: Path) -> None:
    write_glue(tmp_path, "sst2", TRAIN, VALIDATION)
    some = TaskData.open(TaskConfig(name="sst2", path=tmp_path, max_length=40), causal_tokenizer)
    _, batch = next(TaskStream(some, DataConfig(global_batch=13), 0, ranks(0, 1), last_token=True).updates(0, 1))
    lengths = batch.attention_mask.sum(dim=1)
    assert len(lengths.unique()) > 2
    assert batch.scored_positions.tolist() == [[length - 1] for length in lengths.tolist()]
    assert (batch.input_ids[batch.attention_mask == 0] == 256).all()
    assert not batch.token_type_ids.any()


def test_a_causal_tokenizers_second_segment_has_no_type_where_the_tokenizer_has_none(
    rte: Path, causal_tokenizer: Path
) -> None:
    some = TaskData.open(TaskConfig(name="rte", path=rte), causal_tokenizer)
    assert not some.splits["train"].types.any()


def test_an_example_without_any_token_is_refused(tmp_path: Path, causal_tokenizer: Path) -> None:
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nfine\t1\n\t0\n")
    with pytest.raises(DataError, match="example 1: '' has no tokens"):
        TaskData.open(TaskConfig(name="sst2", path=tmp_path), causal_tokenizer, splits=["train"])


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("sequences", [7, 100])
def test_validation_counts_every_drawn_example_once_on_any_number_of_ranks(
    data: TaskData, world_size: int, sequences: int
) -> None:
    alone = stream(data).validation(sequences, 3)
    shared = [stream(data, rank, world_size).validation(sequences, 3) for rank in range(world_size)]
    assert len({tuple(map(len, batches)) for batches in shared}) == 1

    def counted(batches: list[Batch]) -> list[tuple[int, ...]]:
        return [
            (int(batch.samples[row]), int(batch.labels[row, 0]), int(batch.attention_mask[row].sum()))
            for batch in batches
            for row in range(len(batch))
            if batch.weights[row, 0] == 1
        ]

    found = sorted(row for batches in shared for row in counted(batches))
    assert found == sorted(counted(alone))
    assert len({sample for sample, *_ in found}) == len(found) == min(sequences, VALIDATION)
    for batches in shared:
        assert all(len(batch) <= 3 for batch in batches)
        for batch in batches:
            longest = int(batch.attention_mask.sum(dim=1).max())
            assert batch.input_ids.shape[1] == min(-(-longest // 8) * 8, MAX_LENGTH)


def test_more_ranks_than_validation_examples_fill_up_with_rows_of_no_weight(data: TaskData) -> None:
    shares = [stream(data, rank, 4).validation(2, 8) for rank in range(4)]
    assert [[len(batch) for batch in batches] for batches in shares] == [[1]] * 4
    assert [float(batches[0].weights.sum()) for batches in shares] == [1, 1, 0, 0]


def test_validation_is_the_same_whatever_the_seed(data: TaskData) -> None:
    for one, other in zip(stream(data, seed=1).validation(6, 4), stream(data, seed=2).validation(6, 4), strict=True):
        assert all(torch.equal(tensor, getattr(other, name)) for name, tensor in tensors(one).items())


def test_a_part_of_the_training_examples_is_fixed_and_in_order(rte: Path, tokenizer: Path, data: TaskData) -> None:
    def part(count: int) -> list[tuple[int, ...]]:
        config = TaskConfig(name="rte", path=rte, max_length=MAX_LENGTH, train_examples=count)
        some = TaskData.open(config, tokenizer)
        assert some.count("validation") == VALIDATION
        encoded = some.splits["train"]
        return [tuple(encoded.ids[start:end]) for start, end in zip(encoded.bounds, encoded.bounds[1:], strict=False)]

    whole, small, larger = part(10**6), part(5), part(9)
    assert (len(whole), len(small), len(larger)) == (TRAIN, 5, 9)
    places = [whole.index(row) for row in small]
    assert places == sorted(places) != list(range(5))
    assert set(small) < set(larger) < set(whole)


def test_a_run_learns_its_vocabulary_lengths_and_counts(data: TaskData, tokenizer: Path) -> None:
    assert (data.vocab_size, data.sequence_length, data.tokenizer) == (VOCABULARY, MAX_LENGTH, tokenizer)
    assert (data.count("train"), data.count("validation")) == (TRAIN, VALIDATION)
    assert data.tokenizer_sha256 == tokenizer_hash(tokenizer)
    lengths = data.batch("train", np.arange(TRAIN)).attention_mask.sum(dim=1)
    assert data.mean_length == pytest.approx(float(lengths.double().mean()))


def test_the_hash_tells_other_texts_labels_and_lengths_apart(rte: Path, tokenizer: Path, tmp_path: Path) -> None:
    def sha256(folder: Path, **changes: Any) -> str:
        settings = {"name": "rte", "path": folder, "max_length": MAX_LENGTH, **changes}
        return TaskData.open(TaskConfig.model_validate(settings), tokenizer).sha256

    def changed(name: str, old: str, new: str) -> Path:
        folder = write_glue(tmp_path / name, "rte", TRAIN, VALIDATION)
        text = (folder / "dev.tsv").read_text()
        assert old in text
        (folder / "dev.tsv").write_text(text.replace(old, new, 1))
        return folder

    hashes = [
        sha256(rte),
        sha256(rte, max_length=16),
        sha256(rte, train_examples=25),
        sha256(changed("text", "\tw", "\tw7 w")),
        sha256(changed("label", "not_entailment", "entailment")),
    ]
    assert len(set(hashes)) == len(hashes)
    assert sha256(rte) == hashes[0]


@pytest.mark.parametrize(
    ("epochs", "examples", "batch", "updates"),
    [(3, 26, 12, 7), (1, 24, 12, 2), (0.1, 30, 3, 1), (0.3, 100, 10, 3), (0.01, 30, 12, 1), (2.5, 8551, 32, 669)],
)
def test_updates_for_some_epochs_round_up_without_floating_errors(
    epochs: float, examples: int, batch: int, updates: int
) -> None:
    assert updates_for(epochs, examples, batch) == updates


def test_a_global_batch_that_ranks_cannot_share_is_refused(data: TaskData) -> None:
    with pytest.raises(ConfigError, match=r"data\.global_batch 10 is not a multiple of 4 rank\(s\).*8 or 12"):
        stream(data, 0, 4, global_batch=10)


def test_there_are_no_bad_shards(data: TaskData) -> None:
    assert stream(data).bad_shards == []


def test_a_folder_without_a_tokenizers_words_is_refused(rte: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        TaskData.open(TaskConfig(name="rte", path=rte), tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match="no words"):
        TaskData.open(TaskConfig(name="rte", path=rte), tmp_path)
