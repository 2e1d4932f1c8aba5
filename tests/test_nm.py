"""N:M masks and their packed form: laws that hold for every input, checked by hypothesis."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambacompress import nm
from mambacompress.errors import UserError
from mambacompress.kernels import nm_linear
from mambacompress.nm import Pattern

SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Pattern]:
    """Weights of few distinct values, so that ties are common, and a pattern that divides them."""
    of = draw(st.integers(2, 17))
    pattern = Pattern(draw(st.integers(1, of - 1)), of)
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    values = draw(st.lists(st.integers(-3, 3), min_size=rows * groups * of, max_size=rows * groups * of))
    return torch.tensor(values, dtype=torch.float32).reshape(rows, -1), pattern


@SETTINGS
@given(cases())
def test_a_mask_keeps_the_largest_and_the_earlier_of_equal_ones(case: tuple[Tensor, Pattern]):
    weight, pattern = case
    mask = nm.nm_mask(weight.abs(), pattern)
    assert mask.dtype == torch.bool
    for row, kept in zip(weight.tolist(), mask.tolist(), strict=True):
        for start in range(0, len(row), pattern.of):
            group = [abs(v) for v in row[start:start + pattern.of]]
            order = sorted(range(pattern.of), key=lambda i: (-group[i], i))
            expected = [i in order[:pattern.keep] for i in range(pattern.of)]
            assert kept[start:start + pattern.of] == expected


@SETTINGS
@given(cases(), st.sampled_from([torch.int8, torch.float16, torch.float32]))
def test_packing_round_trips_and_takes_the_smaller_form(case: tuple[Tensor, Pattern], dtype: torch.dtype):
    weight, (keep, of) = case[0], (case[1].keep, case[1].of)
    mask = nm.nm_mask(weight.abs(), case[1])
    sparse = nm.pruned(weight, mask).to(dtype)
    values, positions = nm_linear.kept_values(sparse, mask), nm_linear.pack_positions(mask, keep, of)
    columns = weight.shape[1]
    assert values.shape == (len(weight), columns * keep // of)
    bits = min(columns, columns // of * keep * math.ceil(math.log2(of)))
    assert positions.shape == (len(weight), -(-bits // 8))
    assert positions.shape[1] == nm_linear.position_bytes(columns, keep, of)
    assert torch.equal(nm_linear.unpack_positions(positions, columns, keep, of), mask)
    assert torch.equal(nm_linear.expand(values, positions, columns, keep, of), sparse)


@pytest.mark.parametrize(("pattern", "bits"), [("2:4", 5), ("1:4", 2.5), ("1:8", 1.375), ("1:16", 0.75), ("2:8", 2.75),
                                               ("4:8", 5)])
def test_bits_a_weight_with_int8_values(pattern: str, bits: float):
    p = Pattern.parse(pattern)
    columns = 16 * p.of
    assert 8 * (p.density * columns + nm_linear.position_bytes(columns, p.keep, p.of)) / columns == bits


def test_zeros_are_positive_and_survive_what_a_product_would_not():
    weight = torch.tensor([[-1.0, -2.0, float("inf"), -4.0]])
    pruned = nm.pruned(weight, torch.tensor([[False, True, False, True]]))
    assert torch.equal(pruned, torch.tensor([[0.0, -2.0, 0.0, -4.0]]))
    assert not torch.signbit(pruned[0, 0])


def test_columns_that_do_not_divide_name_the_layer():
    with pytest.raises(UserError, match="block 3 in_proj has 30 input channels, which groups of 4"):
        Pattern(2, 4).check(30, "block 3 in_proj")
    with pytest.raises(ValueError, match="groups of 4"):
        nm.nm_mask(torch.ones(2, 30), Pattern(2, 4))


@pytest.mark.parametrize("text", ["4:4", "0:4", "2:400", "2-4", "x"])
def test_what_is_no_pattern(text: str):
    with pytest.raises(ValueError, match="no N:M pattern"):
        Pattern.parse(text)
    assert Pattern.parse("2of4") == Pattern(2, 4)


def test_excess_counts_the_groups_that_hold_too_many():
    weight = torch.tensor([[1.0, 1, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1]])
    assert nm.excess(weight, Pattern(2, 4)) == 2
    assert nm.excess(nm.pruned(weight, nm.nm_mask(weight, Pattern(2, 4))), Pattern(2, 4)) == 0
