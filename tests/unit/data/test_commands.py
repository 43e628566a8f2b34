"""The data commands, as they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from homodistil.cli import main
from tests.unit.data.corpora import write_text


def test_shards_are_built_with_a_trained_tokenizer_and_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, tokenizer, shards = write_text(tmp_path / "text.txt"), tmp_path / "tokenizer", tmp_path / "shards"
    main(f"train-tokenizer --source {text} --output {tokenizer} --vocab_size 300".split())
    sizes = "--sequence_length 16 --shards 4"
    main(f"build-shards --source {text} --source {text} --output {shards} --tokenizer {tokenizer} {sizes}".split())
    main(f"verify-shards --shards {shards}".split())
    printed = capsys.readouterr().out
    assert "60 documents" in printed  # of 120, each there twice
    assert "5 shards are whole" in printed


def test_a_damaged_shard_is_an_error_without_a_traceback(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(f"verify-shards --shards {tmp_path}".split())
    assert ended.value.code == 2
    assert f"{tmp_path}: it has no index.json" in capsys.readouterr().err


def test_a_vocabulary_too_small_for_an_alphabet_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train-tokenizer", "--source", "embedded", "--output", "x", "--vocab_size", "9"])
    assert "vocab_size" in capsys.readouterr().err
