"""Shards that the tests of this folder share; read only."""

from pathlib import Path

import pytest

from tests.unit.data.corpora import small_shards, write_text


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    small_shards(str(write_text(folder / "text.txt")), folder / "shards")
    return folder / "shards"
