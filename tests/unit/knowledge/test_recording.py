"""Recording: what a teacher said comes back from real files as it was kept, whoever it was written and read with."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from homodistil.batch import Batch
from homodistil.config import CacheConfig, KnowledgeConfig
from homodistil.data.records import BLOCK, Records, RecordWriter
from homodistil.errors import CacheError, ModelError
from homodistil.knowledge.recording import Recording, inputs
from homodistil.knowledge.selection import Selection
from homodistil.models.outputs import NOWHERE
from homodistil.signals import Signals

TOKENS, WIDTH, STATES, SLOTS, WORDS = 12, 20, 2, 3, 50
MANY = 2 * BLOCK + 88
CODECS = ["fp32", "fp16", "int8", "int4"]
KEPT = [
    (None, "magnitude"),
    ("4t", "magnitude"),
    ("0.1h", "magnitude"),  # 2 of 20 units: numbers take less than bits
    ("4t_0.5h", "magnitude"),  # 10 of 20 units: bits do
    ("4t_0.5h", "uniform"),
    ("0.1h", "random"),
]
every_part = pytest.mark.parametrize(("keep", "units"), KEPT, ids=[f"{keep}-{units}" for keep, units in KEPT])


def selection(keep: str | None, units: str = "magnitude", left_out: str = "ignored", tokens: str = "left") -> Selection:
    config = {"keep": keep, "units": units, "left_out": left_out, "tokens": tokens}
    return Selection(KnowledgeConfig.model_validate(config), WIDTH, seed=3)


def recording(chosen: Selection, dtype: torch.dtype = torch.float32, language: bool = True, **cache: Any) -> Recording:
    return Recording.of(
        CacheConfig.model_validate({"values": "fp32", "logits": "states", "top_k": 5, "draws": 6, **cache}),
        chosen,
        states=STATES,
        tokens=TOKENS,
        slots=SLOTS,
        vocabulary=WORDS if language else 4,
        dtype=dtype,
        temperature=2.0,
        is_language=language,
    )


def batch(sequences: int = MANY, longest: int = TOKENS) -> Batch:
    """Of unequal lengths, with ids from 0 on, filled up with an id that no tokenizer would call 0."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, WORDS, (sequences, TOKENS), generator=random)
    lengths = torch.randint(2, longest + 1, (sequences, 1), generator=random)
    real = torch.arange(TOKENS) < lengths
    positions = torch.rand(sequences, TOKENS, generator=random).masked_fill(~real, 2).argsort(dim=1)[:, :SLOTS]
    return Batch(
        input_ids=ids.where(real, 7),
        attention_mask=real.long(),
        token_type_ids=torch.zeros_like(ids),
        scored_positions=positions.sort(dim=1).values,
        labels=torch.randint(0, WORDS, (sequences, SLOTS), generator=random),
        weights=torch.ones(sequences, SLOTS),
        samples=torch.arange(sequences),
    )


def narrowed(rows: Batch, width: int) -> Batch:
    return replace(
        rows,
        **{name: getattr(rows, name)[:, :width] for name in ("input_ids", "attention_mask", "token_type_ids")},
    )


def states(sequences: int = MANY) -> list[Tensor]:
    random = torch.Generator().manual_seed(2)
    return [torch.randn(sequences, TOKENS, WIDTH, generator=random) for _ in range(STATES)]


def knowledge(chosen: Selection, rows: Batch, whole: list[Tensor], outputs: int = WORDS) -> Signals:
    """As a live teacher hands it over that is recorded."""
    random = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(len(rows), SLOTS, outputs, generator=random)
    final = torch.randn(len(rows), SLOTS, WIDTH, generator=random)
    signals = Signals(tuple(whole), (), 1.0, logits, final_states=final)
    if chosen.is_everything:
        return signals
    parts, kept = chosen.parts(whole, range(STATES), signals, rows, chosen.fixed_units())
    return replace(signals, hidden_states=parts, kept=kept)


def ignoring(chosen: Selection) -> Selection:
    return replace(chosen, config=chosen.config.model_copy(update={"left_out": "ignored"}))


def through_a_file(folder: Path, arrays: dict[str, Any], numbers: list[int]) -> dict[str, Tensor]:
    """Written in adds of unequal sizes, read in any order."""
    writer = RecordWriter(folder / "some-0.tar")
    for start, stop in ((0, 100), (100, 101), (101, BLOCK + 150), (BLOCK + 150, MANY)):
        writer.add({name: array[start:stop] for name, array in arrays.items()})
    file = writer.finish()
    assert file.records == MANY
    rows = Records(folder / file.name, file).rows(np.array(numbers))
    return {name: torch.from_numpy(array) for name, array in rows.items()}


NUMBERS = [MANY - 1, 0, BLOCK, BLOCK - 1, 7, 7, 2 * BLOCK, 300, 0, 1]
"""From every block and both sides of its borders, in no order, some twice."""


def subset(rows: Batch, numbers: list[int]) -> Batch:
    return rows._each(lambda tensor: tensor[torch.tensor(numbers)])


def assert_kept(found: Signals, rows: Batch, whole: list[Tensor], chosen: Selection, share: float) -> None:
    """Every counted token's values are the state's own at its position and units, by as much as a codec promises."""
    n = min(chosen.tokens or TOKENS, rows.input_ids.shape[1])
    for number, state in enumerate(whole):
        for row in range(len(rows)):
            length = int(rows.attention_mask[row].sum())
            for place in range(min(n, length)):  # `left`: the first n
                values = found.hidden_states[number][row, place]
                truth, here = state[row, place], torch.arange(WIDTH)
                if chosen.units is not None and chosen.config.units == "magnitude":
                    here = truth.abs().argsort(descending=True)[: chosen.units].sort().values
                elif chosen.units is not None:
                    fixed = chosen.fixed_units()
                    assert fixed is not None
                    here = fixed
                expected = truth[here]
                if chosen.config.left_out == "zero":
                    expected = torch.zeros(WIDTH).index_copy(0, here, expected)
                assert (values - expected).abs().max() <= share * truth[here].abs().max()
                if found.kept and found.kept[number].units is not None:
                    units = found.kept[number].units
                    assert torch.equal(units if units.ndim == 1 else units[row, place], here)
        counted = rows.attention_mask.sum(dim=1).clamp(max=n)
        if found.kept:
            assert torch.equal(found.kept[number].counted.sum(dim=1).long(), counted)


PROMISED = {"fp32": 0.0, "fp16": 2**-11, "int8": 1.01 / 254, "int4": 1.01 / 14}


@pytest.mark.parametrize("codec", CODECS)
@every_part
def test_states_come_back_from_a_file_as_they_were_kept(
    tmp_path: Path, keep: str | None, units: str, codec: str
) -> None:
    chosen, rows, whole = selection(keep, units), batch(), states()
    layout = recording(chosen, values=codec)
    recorded = through_a_file(tmp_path, layout.encode(knowledge(chosen, rows, whole), rows), NUMBERS)
    some = subset(rows, NUMBERS)
    assert_kept(layout.decode(recorded, some), some, [state[NUMBERS] for state in whole], chosen, PROMISED[codec])


@pytest.mark.parametrize("units", ["magnitude", "uniform"])
@pytest.mark.parametrize("keep", ["0.1h", "4t_0.5h"])
def test_units_that_are_left_out_are_zeros_where_the_run_wants_them(keep: str, units: str) -> None:
    chosen, rows, whole = selection(keep, units, left_out="zero"), batch(9), states(9)
    layout = recording(chosen)
    encoded = layout.encode(knowledge(ignoring(chosen), rows, whole), rows)
    found = layout.decode({name: torch.from_numpy(array) for name, array in encoded.items()}, rows)
    assert found.hidden_states[0].shape[-1] == WIDTH and found.kept[0].units is None
    assert_kept(found, rows, whole, chosen, 0.0)


@pytest.mark.parametrize("tokens", ["left", "random"])
@pytest.mark.parametrize("keep", [None, "10t", "10t_0.5h"])
@pytest.mark.parametrize(("written", "read"), [(12, 8), (8, 12), (8, 8)])
def test_short_sequences_may_be_read_wider_or_narrower_than_written(
    keep: str | None, tokens: str, written: int, read: int
) -> None:
    """n = 10 is more than any of them has, and than the narrower batch is wide."""
    chosen, whole = selection(keep, tokens=tokens), states(40)
    wide = batch(40, longest=8)
    layout = recording(chosen)
    said = knowledge(chosen, narrowed(wide, written), [state[:, :written] for state in whole])
    encoded = layout.encode(said, narrowed(wide, written))
    rows = narrowed(wide, read)
    found = layout.decode({name: torch.from_numpy(array) for name, array in encoded.items()}, rows)
    assert_kept(found, rows, whole, chosen, 0.0)  # all tokens are kept, so they are the first ones
    assert all(array.shape[1] == min(read, layout.kept_tokens) for array in found.hidden_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_last_hidden_states_come_back_bit_for_bit_in_the_teachers_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    chosen, rows = selection(None), batch()
    layout = recording(chosen, dtype=dtype, values="int4")
    said = knowledge(chosen, rows, [state.to(dtype) for state in states()])
    said = replace(said, final_states=said.final_states.to(dtype))
    found = layout.decode(through_a_file(tmp_path, layout.encode(said, rows), NUMBERS), subset(rows, NUMBERS))
    assert found.final_states is not None and found.final_states.dtype == dtype
    assert torch.equal(found.final_states, said.final_states[NUMBERS])
    assert all(state.dtype == dtype for state in found.hidden_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tasks_logits_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    chosen, rows = selection("4t"), batch()
    layout = recording(chosen, dtype=dtype, language=False)
    said = knowledge(chosen, rows, states(), outputs=4)
    said = replace(said, logits=said.logits.to(dtype))
    found = layout.decode(through_a_file(tmp_path, layout.encode(said, rows), NUMBERS), subset(rows, NUMBERS))
    assert torch.equal(found.logits, said.logits[NUMBERS]) and found.targets is None


@pytest.mark.parametrize(("written", "read"), [(12, 8), (8, 12)])
def test_an_answers_logits_may_be_read_wider_or_narrower_than_written(written: int, read: int) -> None:
    wide = replace(batch(40, longest=8), labels=torch.zeros(40, 2, dtype=torch.int64))
    logits = torch.randn(40, 2, TOKENS).masked_fill(wide.attention_mask[:, None] == 0, NOWHERE)
    layout = replace(recording(selection("4t"), language=False), slots=2, vocabulary=TOKENS)
    said = replace(knowledge(selection("4t"), wide, states(40)), logits=logits[..., :written])
    encoded = layout.encode(said, narrowed(wide, written))
    found = layout.decode({name: torch.from_numpy(array) for name, array in encoded.items()}, narrowed(wide, read))
    assert torch.equal(found.logits, logits[..., :read])


@pytest.mark.parametrize("kind", ["top_k", "draws"])
def test_every_slot_gets_its_own_targets_back(tmp_path: Path, kind: str) -> None:
    chosen, rows = selection("4t"), batch()
    layout, said = recording(chosen, logits=kind), knowledge(selection("4t"), batch(), states())
    found = layout.decode(through_a_file(tmp_path, layout.encode(said, rows), NUMBERS), subset(rows, NUMBERS))
    assert found.targets is not None and found.logits.shape == (len(NUMBERS), SLOTS, 0)
    q = (said.logits[NUMBERS].double() / 2).softmax(-1)
    if kind == "top_k":
        assert torch.equal(found.targets.ids, q.argsort(dim=-1, descending=True)[..., :5])
        torch.testing.assert_close(
            found.targets.log_mass.double(), q.sort(dim=-1, descending=True).values[..., :5].log(), rtol=2e-3, atol=1e-3
        )
    else:  # an id of probability q has 6 q draws, to less than two
        counts = torch.zeros_like(q).scatter_add(-1, found.targets.ids, 6 * found.targets.log_mass.exp().double())
        assert ((counts - 6 * q).abs() < 2).all()
        torch.testing.assert_close(found.targets.entropy.double(), (q * q.log()).sum(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["states", "top_k", "draws"])
@every_part
def test_a_row_does_not_depend_on_those_that_it_was_written_with(keep: str | None, units: str, kind: str) -> None:
    chosen, rows, whole = selection(keep, units), batch(24), states(24)
    layout, said = recording(chosen, logits=kind, values="int4"), knowledge(selection(keep, units), batch(24), whole)
    together = layout.encode(said, rows)

    def part(value: Any) -> Any:
        return value[9:16] if isinstance(value, Tensor) and value.ndim and len(value) == 24 else value

    some = replace(
        said,
        hidden_states=tuple(map(part, said.hidden_states)),
        logits=part(said.logits),
        final_states=part(said.final_states),
        kept=tuple(kept._make(map(part, kept)) for kept in said.kept),
    )
    alone = layout.encode(some, rows.rows(9, 16))
    assert alone.keys() == together.keys()
    assert all(np.array_equal(array, together[name][9:16]) for name, array in alone.items())


PARTS = {
    "masked input": ("input_ids", "scored_positions", "labels"),
    "positions": ("positions",),
    "units": ("units",),
    "values": ("values_",),
    "predictions": ("final_states", "logits", "targets_"),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["states", "top_k", "draws", "task", "regression"])
@every_part
def test_a_row_takes_the_bytes_that_were_announced_part_by_part(
    keep: str | None, units: str, kind: str, codec: str
) -> None:
    chosen, rows = selection(keep, units), batch(5)
    language = kind in ("states", "top_k", "draws")
    layout = recording(chosen, language=language, values=codec, logits=kind if language else "states")
    if kind == "regression":
        rows = replace(rows, labels=rows.labels.float())
    arrays = layout.encode(knowledge(chosen, rows, states(5), WORDS if language else 4), rows)
    for part, names in PARTS.items():
        found = sum(array.nbytes for name, array in arrays.items() if name.startswith(names))
        assert found == 5 * layout.parts[part], part
    assert sum(array.nbytes for array in arrays.values()) == 5 * layout.bytes_per_record


def test_whose_a_row_is_depends_on_no_padding_and_on_every_token() -> None:
    rows = batch(40, longest=8)
    whole = inputs(rows, TOKENS)
    for other in (narrowed(rows, 8), replace(rows, input_ids=rows.input_ids.where(rows.attention_mask > 0, 49))):
        assert all(np.array_equal(array, whole[name]) for name, array in inputs(other, TOKENS).items())
    longer = rows.attention_mask.clone()
    row = int(rows.attention_mask.sum(dim=1).argmin())
    longer[row, int(longer[row].sum())] = 1
    different = inputs(replace(rows, attention_mask=longer), TOKENS)["input_ids"] != whole["input_ids"]
    assert different.any(axis=1).tolist() == [number == row for number in range(40)]  # a token of any id counts


@pytest.mark.parametrize("strange", [torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["hidden values", "last hidden states", "logits"])
def test_what_is_not_finite_is_refused_by_name(where: str, strange: float) -> None:
    chosen, rows = selection(None), batch(5)
    layout = recording(chosen, language=where != "logits")
    said = knowledge(chosen, rows, states(5), outputs=4)
    spoilt = {"hidden values": said.hidden_states[1], "last hidden states": said.final_states, "logits": said.logits}
    spoilt[where][3, 1, 2] = strange
    with pytest.raises(ModelError, match=f"the teacher's {where}: 1 of "):
        layout.encode(said, rows)


def test_equal_rows_give_equal_files_however_they_were_added(tmp_path: Path) -> None:
    rows = {"x": np.arange(3 * MANY, dtype=np.int32).reshape(MANY, 3), "y": np.arange(MANY).astype(np.uint8)}
    contents = []
    for size in (1, 17, BLOCK, MANY):
        writer = RecordWriter(tmp_path / "some-0.tar")
        for start in range(0, MANY, size):
            writer.add({name: array[start : start + size] for name, array in rows.items()})
        writer.finish()
        contents.append((tmp_path / "some-0.tar").read_bytes())
    assert all(content == contents[0] for content in contents)


def test_a_file_is_an_ordinary_tar_of_ordinary_arrays(tmp_path: Path) -> None:
    rows = {"x": np.arange(2 * MANY, dtype=np.uint16).reshape(MANY, 2)}
    writer = RecordWriter(tmp_path / "some-0.tar")
    writer.add(rows)
    writer.finish()
    with tarfile.open(tmp_path / "some-0.tar") as tar:
        blocks = [np.load(io.BytesIO(tar.extractfile(member).read())) for member in tar]
    assert [len(block) for block in blocks] == [BLOCK, BLOCK, 88]
    assert np.array_equal(np.concatenate(blocks), rows["x"])


def test_a_file_that_is_replaced_or_removed_while_it_is_read_is_refused(tmp_path: Path) -> None:
    def written(first: int) -> Any:
        writer = RecordWriter(tmp_path / "some-0.tar")
        writer.add({"x": np.arange(first, first + MANY)})
        return writer.finish()

    file = written(0)
    records = Records(tmp_path / file.name, file)
    assert records.rows(np.array([3]))["x"] == 3
    written(0)
    assert records.rows(np.array([BLOCK]))["x"] == BLOCK  # the same bytes
    written(1000)
    with pytest.raises(CacheError, match="checksum"):
        records.rows(np.array([MANY - 1, 5]))
    (tmp_path / file.name).unlink()
    with pytest.raises(CacheError, match="cannot be read"):
        records.rows(np.array([BLOCK]))


def test_a_file_is_open_only_while_it_is_read(tmp_path: Path) -> None:
    """A corpus has more files, and a file more arrays, than a process may have open or mapped."""
    writer = RecordWriter(tmp_path / "some-0.tar")
    writer.add({name: np.zeros((40 * BLOCK, 2), np.uint8) for name in "abcdefgh"})
    file = writer.finish()
    records = Records(tmp_path / file.name, file)
    records.rows(np.arange(0, 40 * BLOCK, 100))
    assert file.name not in Path("/proc/self/maps").read_text()
    assert not any(
        file.name in os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.is_symlink() and f.exists()
    )


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_file_is_refused_when_it_is_first_read(tmp_path: Path, damage: str) -> None:
    writer = RecordWriter(tmp_path / "some-0.tar")
    writer.add({"x": np.zeros((MANY, 3))})
    file = writer.finish()
    content = bytearray((tmp_path / file.name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / file.name).write_bytes(content)
    if damage == "missing":
        (tmp_path / file.name).unlink()
    words = "its checksum is" if damage == "flipped" else "cannot be read .No such file"
    with pytest.raises(CacheError, match=f"some-0.tar: {words}.* Remove it, and run cache_teacher.py again"):
        Records(tmp_path / file.name, file).rows(np.array([0]))
