"""Hidden values through a file's arrays and back: how far off, how many bytes, and each row for itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from homodistil.errors import ModelError
from homodistil.knowledge.values import VALUE_CODECS, Arrays

UNITS = [1, 2, 31, 33, 77, 96]
every_codec = pytest.mark.parametrize("name", VALUE_CODECS)


def awkward(units: int) -> Tensor:
    """Rows of every size that hidden states have been seen to have, and some that they have not."""
    rows = torch.randn(12, units, generator=torch.Generator().manual_seed(units))
    rows[1, units // 2] = 1e5  # an outlier beyond fp16
    rows[2, -1], rows[3, 0] = -3e4, 40
    rows[4], rows[5], rows[6] = 0, 0.7, -0.7
    rows[7] *= 1e-6
    rows[8] *= 1e30
    rows[9] *= 1e-30
    rows[10, 1:] = 0
    rows[11] *= torch.logspace(0, -12, units)
    return rows


def there_and_back(name: str, values: Tensor) -> Tensor:
    return VALUE_CODECS[name].decode(as_tensors(VALUE_CODECS[name].encode(values)), values.shape[-1])


def as_tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def largest_of_32(values: Tensor) -> Tensor:
    """For each value, the largest |value| of the 32 that it is one of."""
    found = [part.abs().amax(dim=-1, keepdim=True).expand_as(part) for part in values.split(32, dim=-1)]
    return torch.cat(found, dim=-1)


def allowed(name: str, values: Tensor) -> Tensor:
    """Half a step for whole numbers, half a unit in fp16's last place; as the codecs promise it."""
    row = values.abs().amax(dim=-1, keepdim=True)
    step = 1 + 2**-9 + 1e-5  # a step that bf16 can hold, and fp32's own rounding
    return {
        "fp32": torch.zeros_like(values),
        "fp16": torch.maximum(2**-11 * values.abs(), 2**-39 * row),
        "int8": step * row / 127 / 2,
        "int4": step * largest_of_32(values) / 7 / 2,
    }[name]


@every_codec
@pytest.mark.parametrize("units", UNITS)
def test_no_value_comes_back_further_off_than_its_codec_promises(name: str, units: int) -> None:
    values = awkward(units).double()
    found = there_and_back(name, values.float())
    assert found.dtype == torch.float32 and found.shape == values.shape
    assert ((found.double() - values.float().double()).abs() <= allowed(name, values)).all()


@every_codec
def test_zeros_stay_zeros(name: str) -> None:
    assert not there_and_back(name, torch.zeros(2, 33)).any()


@every_codec
def test_one_value_alone_survives_to_a_part_in_two_hundred_whatever_its_size(name: str) -> None:
    values = torch.tensor([[3.0], [-1e6], [1e-20], [70_000.0]])
    torch.testing.assert_close(there_and_back(name, values), values, rtol=1 / 200, atol=0)


@every_codec
@pytest.mark.parametrize("units", UNITS)
def test_any_rows_can_be_read_without_the_others_and_were_written_without_them(name: str, units: int) -> None:
    codec, values = VALUE_CODECS[name], awkward(units)
    arrays = codec.encode(values)
    for key, array in codec.encode(values[[7, 1]]).items():
        assert np.array_equal(array, arrays[key][[7, 1]])
    whole, rows = codec.decode(as_tensors(arrays), units), torch.tensor([[3, 3], [0, 8]])
    some = codec.decode({key: array[rows] for key, array in as_tensors(arrays).items()}, units)
    assert torch.equal(some, whole[rows])


@every_codec
@pytest.mark.parametrize("units", UNITS)
def test_a_row_takes_the_bytes_that_were_announced(name: str, units: int) -> None:
    arrays = VALUE_CODECS[name].encode(awkward(units))
    assert sum(array.nbytes for array in arrays.values()) == 12 * VALUE_CODECS[name].bytes_per_row(units)


def test_the_width_of_bert_takes_so_many_bytes() -> None:
    assert {name: codec.bytes_per_row(768) for name, codec in VALUE_CODECS.items()} == {
        "fp32": 3072,
        "fp16": 1538,
        "int8": 770,
        "int4": 432,
    }


@every_codec
def test_bf16_values_are_those_that_they_are_in_fp32(name: str) -> None:
    values = awkward(33).bfloat16()
    assert torch.equal(there_and_back(name, values), there_and_back(name, values.float()))


def test_an_outlier_costs_int4_only_the_units_that_share_its_scale() -> None:
    plain = torch.randn(1, 96, generator=torch.Generator().manual_seed(0))
    struck = plain.clone()
    struck[0, 40] = 1e4
    without, beside = there_and_back("int4", plain), there_and_back("int4", struck)
    others = [*range(32), *range(64, 96)]
    assert torch.equal(beside[:, others], without[:, others])
    assert not beside[0, 41:64].any()


def test_two_codes_of_four_bits_share_a_byte_the_first_in_its_lower_half() -> None:
    arrays = VALUE_CODECS["int4"].encode(torch.tensor([[7.0, -7, 3]]))
    assert arrays["codes"].tolist() == [[15 + 16 * 1, 11 + 16 * 8]]


@every_codec
@pytest.mark.parametrize("strange", [torch.inf, -torch.inf, torch.nan])
def test_a_value_that_is_not_finite_is_refused_by_its_token(name: str, strange: float) -> None:
    values = awkward(5)
    values[3, 2] = strange
    with pytest.raises(ModelError, match=r"1 of 12 tokens .* the first is token 3"):
        VALUE_CODECS[name].encode(values)
