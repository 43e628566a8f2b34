"""A corpus is the same whoever reads it; what says the same twice, or quotes an evaluation, goes, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from homodistil.cli import INTERRUPTED
from homodistil.data import readers, sampling, sources
from homodistil.data.build import build_shards
from homodistil.data.choice import SIMILAR
from homodistil.data.corpus import sentence_borders, sentence_starts
from homodistil.data.encoder import Encoder
from homodistil.data.fingerprints import QUOTED_WORDS, ngrams, signatures, words_of
from homodistil.data.shards import ShardIndex, read_shard, verify
from homodistil.data.sources import documents, parts_of, read
from homodistil.data.tokenizer import open_tokenizer, train_tokenizer
from homodistil.data.workers import Workers
from homodistil.errors import DataError
from tests.processes import mpirun

ROOT = Path(__file__).parents[3]
DRAW = random.Random(3)
VOCABULARY = ["".join(DRAW.choices("abcdefghijklmnopqrstuvwxyz", k=DRAW.randint(3, 9))) for _ in range(2000)]


def prose(words: int, seed: int) -> str:
    """Sentences of made-up words, capitalised and punctuated."""
    draw, text = random.Random(seed), []
    while len(text) < words:
        sentence = draw.choices(VOCABULARY, k=draw.randint(4, 12))
        text += [sentence[0].capitalize(), *sentence[1:-1], sentence[-1] + draw.choice(".!?")]
    return " ".join(text)


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([prose(20_000, 1)], 600).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of rows, and titled text."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        write_rows(folder / f"{number}.jsonl", [prose(150, 100 * number + row) for row in range(40)])
    lines = [f"= Title {number} =\n{prose(200, 1000 + number)}" for number in range(20)]
    (folder / "titled.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def build(source: list[Path], output: Path, tokenizer: Path | None, **options: Any) -> list[ShardIndex]:
    usual = {"sequence_length": [32], "shards": 4, "workers": 1, "progress": False, "vocab_size": 600}
    return build_shards([*map(str, source)], output, tokenizer=tokenizer, **{**usual, **options})[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def command(corpus: Path, output: Path, tokenizer: Path, *flags: str) -> list[str]:
    sizes = ["--sequence_length", "32", "--shards", "4", "--tokenizer", str(tokenizer)]
    script = str(ROOT / "data_prep/build_shards.py")
    return [script, "--source", str(corpus), "--output", str(output), *sizes, *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_any_number_of_workers_writes_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    """Also of a tokenizer that is trained on the way."""
    for workers in (1, 2, 4):
        build([corpus], tmp_path / str(workers), None, workers=workers, sequence_length=[32, 64])
    alone = contents(tmp_path / "1")
    assert {"32/train-00003.tar", "64/index.json", "report.json", "removed.jsonl"} <= alone.keys()
    assert contents(tmp_path / "2") == alone == contents(tmp_path / "4")


def test_processes_of_mpi_write_the_same_bytes(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    if not mpirun():
        pytest.skip("no mpirun: install Open MPI, or the dev extra")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    launcher = [str(mpirun()), *root, "--oversubscribe", "--bind-to", "none", "-np", "3", sys.executable]
    done = subprocess.run(
        [*launcher, *command(corpus, tmp_path / "mpi", tokenizer)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("training and") == 1, "one process speaks"
    build([corpus], tmp_path / "alone", tokenizer)
    assert contents(tmp_path / "mpi") == contents(tmp_path / "alone")


@pytest.mark.parametrize("workers, ending", [("1", signal.SIGKILL), ("2", signal.SIGINT)])
def test_a_killed_build_goes_on_to_the_same_bytes(
    tokenizer: Path, tmp_path: Path, workers: str, ending: signal.Signals
) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    for number in range(12):
        write_rows(copies / f"{number:02d}.jsonl", [prose(400, 10_000 * number + row) for row in range(300)])
    build([copies], tmp_path / "whole", tokenizer)
    parts = tmp_path / ".out.partial" / "parts"
    line = [sys.executable, *command(copies, tmp_path / "out", tokenizer, "--workers", workers)]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(line, env=environment(), stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.npz"))) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, ending)  # as a terminal's Ctrl-C does
    assert process.wait() == (INTERRUPTED if ending == signal.SIGINT else -ending)
    assert "Traceback" not in log.read_text() and not (tmp_path / "out").exists()
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert 3 <= len(done) < 12
    read_again: list[str] = []
    real = sources.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("homodistil.data.encoding.read", lambda part: read_again.append(part.file.name) or real(part))
        build([copies], tmp_path / "out", tokenizer)
    assert len(read_again) == 12 - len(done)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not parts.parent.exists()


def test_planted_duplicates_and_quotations_go_and_nothing_else(tokenizer: Path, tmp_path: Path) -> None:
    evaluation = [prose(30, 77_000 + number) for number in range(4)]
    (tmp_path / "dev.tsv").write_text("label\ttext\n" + "".join(f"1\t{text}\n" for text in evaluation))
    clean = [prose(180, 500 + number) for number in range(60)]
    words = [text.split() for text in clean]
    exact = [clean[3], clean[3], clean[10]]
    shouted = clean[20].upper().replace(".", " ;")
    edited = " ".join([*words[30][:60], "changed", *words[30][61:]])
    halves = " ".join(words[40][:90] + prose(90, 999).split())  # half of it is new: stays
    quotes = [" ".join([*words[50][:50], *evaluation[2].split()[5 : 5 + QUOTED_WORDS], "end"]) + " own"]
    nearly = " ".join([*prose(150, 888).split(), *evaluation[1].split()[: QUOTED_WORDS - 1], "otherwise"])
    texts = [*clean, *exact, shouted, edited, halves, *quotes, nearly, "   "]
    write_rows(tmp_path / "rows.jsonl", texts)
    _, removals = build_shards(
        str(tmp_path / "rows.jsonl"), tmp_path / "out", tokenizer=tokenizer, sequence_length=[32], shards=2,
        decontaminate=[tmp_path / "dev.tsv"], workers=1, progress=False,
    )  # fmt: skip
    seen = [(line["document"], line["why"], line["of"]) for line in removals.removed]
    place = {"source": "rows.jsonl", "file": "rows.jsonl"}
    assert seen == [
        (60, "exact", {**place, "document": 3}),
        (61, "exact", {**place, "document": 3}),
        (62, "exact", {**place, "document": 10}),
        (63, "near", {**place, "document": 20}),
        (64, "near", {**place, "document": 30}),
        (66, "quotes", "dev.tsv"),
    ]
    report = json.loads((tmp_path / "out/report.json").read_text())["rows.jsonl"]
    assert (report["read"], report["empty"], report["kept"]) == (69, 1, 62)
    index = verify(tmp_path / "out")
    assert index.documents == 62 and index.tokens == report["kept_tokens"]


def test_without_deduplication_everything_stays(tokenizer: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [prose(100, number % 30) for number in range(60)])
    for deduplicate, kept in (("none", 60), ("exact", 30)):
        (index,) = build([tmp_path / "rows.jsonl"], tmp_path / deduplicate, tokenizer, deduplicate=deduplicate)
        assert index.documents == kept


@pytest.mark.parametrize("cased", [False, True])
def test_plain_lines_get_the_ids_that_the_tokenizer_gives_the_whole_text(tmp_path: Path, cased: bool) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,!?;:'()[]-=", "the", "##ing"]
    pieces += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0"] + (["The", "É", "T"] if cased else ["é"])
    (tmp_path / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    plain = open_tokenizer(tmp_path / "vocab.txt")
    padding = plain.backend_tokenizer
    padding.enable_padding(length=128)  # as many a published tokenizer was saved
    padding.enable_truncation(32)
    plain.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved/tokenizer.json").read_text())
    settings |= {
        "padding": json.loads(padding.to_str())["padding"],
        "truncation": json.loads(padding.to_str())["truncation"],
    }
    (tmp_path / "saved/tokenizer.json").write_text(json.dumps(settings))
    padding.no_padding()
    padding.no_truncation()
    mixed = "The CAT, sing-ing.\n= [MASK] [SEP] =\nÉté über alles\nand\n\nmore: x" + "y" * 200
    texts = [mixed, "日本\nThe", "é\né", prose(300, 3)]
    backend = plain.backend_tokenizer
    backend.encode_special_tokens = True
    wanted = [[*backend.encode(text, add_special_tokens=False).ids, 3] for text in texts]
    found = Encoder(tmp_path / "saved").ids(texts, 3, np.dtype(np.uint16))
    assert [ids.tolist() for ids in found] == wanted
    assert any(4 in ids for ids in wanted) is False


def spoken(text: str) -> list[str]:
    """Its words as letters and digits."""
    return re.findall(r"[^\W_]+", text.lower())


def test_ngrams_are_those_of_words() -> None:
    """Two windows have equal hashes if and only if they are the same words; texts don't run into each other."""
    texts = ["", prose(60, 5), prose(3, 6), "", prose(40, 7) + " " + prose(60, 5)[:150], "on no NO 12 21 don't", "..."]
    words, counts = words_of(texts)
    expected = [spoken(text) for text in texts]
    assert counts.tolist() == [len(document) for document in expected]
    for n in (1, 5, 13):
        grams, numbers = ngrams(words, counts, n)
        windows = [tuple(document[i : i + n]) for document in expected for i in range(len(document) - n + 1)]
        assert numbers.tolist() == [max(0, len(document) - n + 1) for document in expected]
        pairs = set(zip(grams.tolist(), windows, strict=True))
        assert len(pairs) == len(set(windows)) == len(set(grams.tolist()))


def test_ideographs_are_words_of_their_own() -> None:
    words, counts = words_of(["\u4e2d\u6587abc \u4e2d", "abc"])
    assert counts.tolist() == [4, 1] and words[0] == words[3] and words[2] == words[4]


def test_texts_without_words_have_none() -> None:
    for texts in ([], [""], ["", "...", ""]):
        words, counts = words_of(texts)
        assert len(words) == 0 and counts.tolist() == [0] * len(texts)


def test_quotations_and_duplicates_are_found_however_a_cased_tokenizer_cuts_them(tmp_path: Path) -> None:
    """Byte-level pieces differ with case, and with what stands before a word."""
    opened = train_tokenizer([prose(8000, 1)], 2000, task="clm")
    opened.save_pretrained(tmp_path / "cased")
    evaluation = prose(QUOTED_WORDS, 77)
    (tmp_path / "dev.jsonl").write_text(json.dumps(evaluation))
    clean = [prose(180, 500 + number) for number in range(30)]
    quoted = " ".join(f'"{word}"' for word in evaluation.split())
    write_rows(tmp_path / "rows.jsonl", [*clean, f"{prose(50, 1)} {quoted}", clean[4].upper()])
    _, removals = build_shards(
        str(tmp_path / "rows.jsonl"), tmp_path / "out", tokenizer=tmp_path / "cased", task="clm",
        sequence_length=[32], shards=2, decontaminate=[tmp_path / "dev.jsonl"], workers=1, progress=False,
    )  # fmt: skip
    assert [(line["document"], line["why"]) for line in removals.removed] == [(30, "quotes"), (31, "near")]


def test_signatures_estimate_the_jaccard_similarity_of_shingles() -> None:
    base = prose(400, 9).split()
    texts = [" ".join(base[:keep] + prose(400, 10).split()[keep:]) for keep in (400, 360, 300, 200, 0)]
    found = signatures(*words_of(texts))
    shingles = [{tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in map(spoken, texts)]
    for row, (one, other) in enumerate(pairwise(shingles), start=1):
        wanted = len(shingles[0] & shingles[row]) / len(shingles[0] | shingles[row])
        assert abs((found[0] == found[row]).mean() - wanted) < 0.13, row
        assert one != other
    assert 0.5 < SIMILAR < 1


def test_sequences_start_with_sentences_and_nothing_is_lost(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    (index,) = build([corpus], tmp_path / "out", tokenizer, packing="sentences", sequence_length=[128])
    opened = open_tokenizer(tokenizer)
    rows = np.concatenate([read_shard(tmp_path / "out", index, entry) for entry in index.splits["train"]])
    source = " ".join(document.text.lower() for document in documents([str(corpus)]))
    first = {sentence.split()[0] for sentence in re.split(r"(?<=[.!?])\s+", source) if sentence}
    starts = [opened.decode(row[1:-1]).split(" [SEP] ")[0].split()[0] for row in rows]
    assert sum(word in first or word == "title" for word in starts) / len(starts) > 0.98
    (plain,) = build([corpus], tmp_path / "plain", tokenizer, sequence_length=[128])
    assert 1.0 < index.sequences("train") / plain.sequences("train") < 1.6


def test_sentence_starts_are_what_a_plain_loop_finds(tokenizer: Path) -> None:
    opened = open_tokenizer(tokenizer)
    text = 'One two three. "Four five!" (Six seven?) Eight e.g. nine ten eleven twelve. ' + prose(300, 4)
    ids = np.array([*opened.backend_tokenizer.encode(text, add_special_tokens=False).ids, opened.sep_token_id])
    pieces = [opened.decode([int(i)]) for i in ids]
    borders = [
        place + 1
        for place, (piece, following) in enumerate(pairwise([*pieces, "x"]))
        if following not in {'"', ")", ".", "!", "?"}
        and (piece in {".", "!", "?"} or (piece in {'"', ")"} and place and pieces[place - 1] in {".", "!", "?"}))
    ]
    borders = sorted({*borders, len(ids)})
    found = sentence_borders(ids, opened, opened.sep_token_id)
    assert found.tolist() == borders
    body, start, expected = 20, 0, []
    while start + body <= len(ids):
        expected.append(start)
        inside = [border for border in borders if start < border <= start + body]
        start = inside[-1] if inside else start + body
    assert sentence_starts(found, len(ids), body).tolist() == expected


def test_parts_of_large_files_hold_each_document_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [prose(DRAW.randint(1, 80), number) + " é" for number in range(200)]
    write_rows(tmp_path / "rows.jsonl", texts)
    table = pyarrow.table({"text": texts})
    parquet.write_table(table, tmp_path / "table.parquet", row_group_size=7)
    whole = [document.text for document in documents([str(tmp_path / "rows.jsonl")])]
    monkeypatch.setattr(readers, "PART_BYTES", 1500)
    for name in ("rows.jsonl", "table.parquet"):
        parts = parts_of([str(tmp_path / name)])
        assert len(parts) > 8
        assert [document.text for part in parts for document in read(part)] == whole


def test_a_dataset_is_read_shard_by_shard_and_sentences_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    rows = [f"sentence {number} ." for number in range(30)]
    for shard in range(3):
        write_rows(tmp_path / "data" / f"train-{shard}.jsonl", rows[10 * shard : 10 * shard + 10])
    source = f"hf:{tmp_path / 'data'}"
    assert len(parts_of([source])) == 3
    assert [document.text for document in documents([source])] == rows
    monkeypatch.setitem(sources.NAMED, "bookcorpus", ("hf:{}", "nowhere"))
    monkeypatch.setitem(sources.ROWS_OF_A_DOCUMENT, "bookcorpus", 4)
    found = list(documents([f"bookcorpus:{tmp_path / 'data'}"]))
    assert {document.source for document in found} == {"bookcorpus"}
    assert [document.text for document in found][:3] == [
        "\n".join(rows[:4]),
        "\n".join(rows[4:8]),
        "\n".join(rows[8:10]),
    ]


def test_the_same_documents_are_held_out_of_every_length(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    held_out = []
    for index in build([corpus], tmp_path / "out", tokenizer, sequence_length=[16, 64]):
        folder = tmp_path / "out" / str(index.sequence_length)
        assert verify(folder) == index
        held_out.append(Counter(read_shard(folder, index, index.splits["validation"][0])[:, 1:-1].ravel().tolist()))
    short, long = held_out
    assert short.total() > 1000
    assert (long - short).total() < 14 and (short - long).total() < 62, "only what a last partial cut drops"


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [("dev.pdf", "x", "known kinds"), ("dev.json", "{", "cannot be read"), ("missing.tsv", None, "no evaluation text")],
)
def test_an_evaluation_text_that_cannot_be_read_is_refused_first(
    corpus: Path, tokenizer: Path, tmp_path: Path, name: str, text: str | None, named: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=named) as refused:
        build([corpus], tmp_path / "out", tokenizer, decontaminate=[tmp_path / name])
    assert name in str(refused.value) and not (tmp_path / "out").exists()


def test_a_changed_file_is_read_again(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [prose(100, number) for number in range(30)])
    with pytest.raises(DataError, match="fewer than --shards 5000"):
        build([tmp_path / "rows.jsonl"], tmp_path / "out", tokenizer, shards=5000)
    write_rows(tmp_path / "rows.jsonl", [prose(100, number) for number in range(20, 60)])
    (index,) = build([tmp_path / "rows.jsonl"], tmp_path / "out", tokenizer)
    assert index.documents == 40


def test_removed_documents_are_numbered_in_their_file_whatever_its_parts(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [prose(60, number % 50) if number % 7 else "" for number in range(100)]
    path = write_rows(tmp_path / "rows.jsonl", texts)
    seen = []
    for parts in (1, 8):
        monkeypatch.setattr(readers, "PART_BYTES", -(-path.stat().st_size // parts))
        assert len(parts_of([str(path)])) == parts
        build([path], tmp_path / f"out{parts}", tokenizer)
        lines = (tmp_path / f"out{parts}/removed.jsonl").read_text().splitlines()
        seen.append([(line["document"], line["of"]["document"]) for line in map(json.loads, lines)])
    assert seen[0] == seen[1] == [(n, n - 50) for n in range(50, 100) if n % 7 and (n - 50) % 7]


def test_the_same_folder_built_with_another_tokenizer_is_of_that_tokenizer(
    corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """In one process: what was opened for the first is not the second's."""
    train_tokenizer([prose(20_000, 2)], 400).save_pretrained(tmp_path / "other")
    build([corpus], tmp_path / "fresh", tmp_path / "other")
    with pytest.raises(DataError, match="fewer than --shards 50000"):
        build([corpus], tmp_path / "out", tokenizer, shards=50_000)
    build([corpus], tmp_path / "out", tmp_path / "other")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_full_disk_is_an_error_that_the_same_command_mends(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("homodistil.data.dealing.write_shard", full)
    with pytest.raises(DataError, match=r"No space left.*Make room"):
        build([corpus], tmp_path / "out", tokenizer)
    monkeypatch.undo()
    build([corpus], tmp_path / "out", tokenizer)


def test_of_two_builds_at_once_one_says_that_the_other_made_the_folder(
    corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    line = [sys.executable, *command(corpus, tmp_path / "out", tokenizer, "--workers", "1")]
    both = [subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = sorted((process.communicate()[1], process.returncode) for process in both)
    errors = [error for error, code in ended if code == 2]
    assert sorted(code for _, code in ended) == [0, 2], ended
    assert "exists already" in errors[0] and "Traceback" not in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    verify(tmp_path / "out")


def test_an_error_in_a_process_of_mpi_ends_all_of_them(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    if not mpirun():
        pytest.skip("no mpirun: install Open MPI, or the dev extra")
    (tmp_path / "bad.jsonl").write_text('{"txt": "x"}\n')
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    launcher = [str(mpirun()), *root, "--oversubscribe", "--bind-to", "none", "-np", "3", sys.executable]
    more = ["--source", str(tmp_path / "bad.jsonl")]
    line = [*launcher, *command(corpus, tmp_path / "out", tokenizer, *more)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "bad.jsonl, line 1: found ['txt']" in done.stderr
    assert not (tmp_path / "out").exists()


def test_ids_are_read_in_blocks_of_whole_documents(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build([corpus], tmp_path / "whole", tokenizer)
    monkeypatch.setattr("homodistil.data.reading.IDS_AT_ONCE", 300)
    build([corpus], tmp_path / "blocks", tokenizer)
    monkeypatch.setattr("homodistil.data.encoding.DOCUMENTS_AT_ONCE", 7)
    monkeypatch.setattr("homodistil.data.choice.PAIRS_AT_ONCE", 3)
    build([corpus], tmp_path / "batches", tokenizer)
    assert contents(tmp_path / "whole") == contents(tmp_path / "blocks") == contents(tmp_path / "batches")


def test_the_sample_of_parts_is_the_sample_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large part's documents are as likely to be drawn as a small one's."""
    monkeypatch.setattr(sampling, "TOKENIZER_CHARACTERS", 60_000)
    write_rows(tmp_path / "0.jsonl", [f"large {prose(60, number)}" for number in range(300)])
    write_rows(tmp_path / "1.jsonl", [f"small {prose(60, number)}" for number in range(60)])
    sample = sampling.tokenizer_text(parts_of([str(tmp_path)]), Workers())
    share = {kind: sum(text.startswith(kind) for text in sample) / size for kind, size in SIZES.items()}
    assert 0.6 < share["large"] / share["small"] < 1.6


SIZES = {"large": 300, "small": 60}


@pytest.mark.parametrize("task", ["mlm", "clm"])
def test_special_tokens_that_a_text_writes_about_are_text(task: str, tmp_path: Path) -> None:
    opened = train_tokenizer([prose(8000, 1) + " [ ] < | >"], 600, task=task)  # type: ignore[arg-type]
    opened.save_pretrained(tmp_path / "tokenizer")
    write_rows(
        tmp_path / "rows.jsonl", [f"[PAD] [MASK] [SEP] <|endoftext|> {prose(99, number)}" for number in range(30)]
    )
    (index,) = build([tmp_path / "rows.jsonl"], tmp_path / "out", tmp_path / "tokenizer", task=task)
    rows = np.concatenate([read_shard(tmp_path / "out", index, entry) for entry in index.entries()])
    ends, specials = (opened.sep_token_id, rows[:, 1:-1]) if task == "mlm" else (opened.eos_token_id, rows)
    assert set(specials[np.isin(specials, opened.all_special_ids)].tolist()) <= {ends, opened.unk_token_id}
    assert (specials == ends).sum() <= 30
