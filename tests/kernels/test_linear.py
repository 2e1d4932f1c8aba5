"""Float linears: fp32 sums whatever the dtype; rows of a few that do not depend on one another."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mambacompress.kernels import registry
from mambacompress.kernels.int8_linear.cpu import native_linear
from mambacompress.kernels.linear import FEW_ROWS, linear
from mambacompress.kernels.tolerances import rms_ratio
from tests.kernels.scans import threads

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # RMS ratio: of the result's own rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"),
                         [(1, 1, 1), (1, 48, 80), (3, 63, 37), (4, 257, 5), (8, 768, 99)])
def test_against_fp64(level: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((rows, inputs), (outputs, inputs), (outputs,)))
    with torch.no_grad(), registry.recording() as seen:
        y = linear(x, weight, bias)
    assert y.dtype == dtype
    assert [choice.backend for choice in seen] == ["native"]
    error = rms_ratio(y, F.linear(x.double(), weight.double(), bias.double()))
    assert error <= DTYPES[dtype], f"{dtype} on {level}"
    for row in range(rows):
        with torch.no_grad():
            assert torch.equal(linear(x[row:row + 1], weight, bias)[0], y[row]), f"row {row} depends on the others"


@pytest.mark.parametrize(("rows", "inputs", "outputs"),
                         [(9, 1, 1), (12, 48, 80), (13, 63, 37), (99, 257, 33), (250, 64, 5)])
@torch.no_grad()
def test_many_rows_against_fp64(level: str, rows: int, inputs: int, outputs: int) -> None:
    """The C function itself: ``linear`` calls it for many rows only where it is faster."""
    for dtype, tolerance in DTYPES.items():
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        bias = torch.randn(outputs)
        y = native_linear("mc_linear", x, weight, bias=bias)
        error = rms_ratio(y, F.linear(x.double(), weight.double(), bias.double()))
        assert error <= tolerance, f"{dtype} on {level}"
        with threads(2):
            assert torch.equal(native_linear("mc_linear", x, weight, bias=bias), y)


def test_what_stays_with_torch() -> None:
    """Many rows in half precision, gradients, other dtypes, weights that are not contiguous: F.linear, bit for bit."""
    x, weight = torch.randn(FEW_ROWS + 1, 40), torch.randn(7, 40)
    with torch.no_grad():
        half = x.bfloat16(), weight.bfloat16()
        assert torch.equal(linear(*half), F.linear(*half))
        assert torch.equal(linear(x[:1].double(), weight.double()), F.linear(x[:1].double(), weight.double()))
        across = torch.randn(40, 7).t()
        assert torch.equal(linear(x[:1], across), F.linear(x[:1], across))
    weight.requires_grad_()
    linear(x[:1], weight).sum().backward()
    torch.testing.assert_close(weight.grad, x[:1].expand(7, 40), rtol=0, atol=0)
