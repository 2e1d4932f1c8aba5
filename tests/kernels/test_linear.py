"""Float linears of a few rows: fp32 sums whatever the dtype, rows that do not depend on one another."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mambacompress.kernels import registry
from mambacompress.kernels.linear import FEW_ROWS, linear
from mambacompress.kernels.tolerances import rms_ratio

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


def test_what_stays_with_torch() -> None:
    """Many rows, gradients, other dtypes, weights that are not contiguous: the same result as F.linear, bit for bit."""
    x, weight = torch.randn(FEW_ROWS + 1, 40), torch.randn(7, 40)
    with torch.no_grad():
        assert torch.equal(linear(x, weight), F.linear(x, weight))
        assert torch.equal(linear(x[:1].double(), weight.double()), F.linear(x[:1].double(), weight.double()))
        across = torch.randn(40, 7).t()
        assert torch.equal(linear(x[:1], across), F.linear(x[:1], across))
    weight.requires_grad_()
    linear(x[:1], weight).sum().backward()
    torch.testing.assert_close(weight.grad, x[:1].expand(7, 40), rtol=0, atol=0)
