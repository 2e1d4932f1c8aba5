"""The Hadamard rotation in Triton."""

from __future__ import annotations

import pytest
import torch

from mambacompress.kernels.hadamard import hadamard, hadamard_int8
from tests.kernels.gpu.parity import FLOATS, assert_gradients, assert_same, both


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 2, 8, 12, 48, 80, 160, 768, 1152])
def test_every_base(device: str, dtype: torch.dtype, size: int) -> None:
    x = torch.randn(3, size, dtype=dtype).to(device)
    signs = (torch.randint(0, 2, (size,)) * 2 - 1).to(device)
    for options in ({}, {"transpose": True}):
        for s in (None, signs):
            assert_same(*both(hadamard, x, s, **options), dtype)
    assert_same(*both(hadamard_int8, x, signs), dtype)
    assert_same(*both(hadamard_int8, x, signs, transpose=True, act_scale=torch.tensor([0.02], device=device)), dtype)


def test_blocks_slices_and_nothing(device: str) -> None:
    x = torch.randn(2, 3, 200, device=device)
    signs = (torch.randint(0, 2, (96,)) * 2 - 1).to(device)
    for part in (x[..., 10:106], x[:0, :, :96]):
        assert_same(*both(hadamard, part, signs, block=32), torch.float32)
        assert_same(*both(hadamard_int8, part, signs, block=48, act_bits=4), torch.float32)


def test_outliers_do_not_overflow_the_second_product(device: str) -> None:
    x = torch.randn(2, 768).half()
    x[0, 5] = 30000.0
    assert_same(*both(hadamard, x.to(device)), torch.float16)


def test_rows_that_hold_no_number(device: str) -> None:
    x = torch.randn(3, 48, device=device)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    got, want = both(hadamard_int8, x)
    assert torch.equal(got[1].isnan(), want[1].isnan())
    assert got[0][1:].abs().max() == 0


def test_gradients(device: str) -> None:
    assert_gradients(hadamard, {"x": torch.randn(3, 80, device=device)})
