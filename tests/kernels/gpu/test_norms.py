"""RMS norms in Triton: every variant, sizes that fill no block, all dtypes."""

from __future__ import annotations

import pytest
import torch

from mambacompress.kernels import registry
from mambacompress.kernels.rms_norm import add_rms_norm, gated_rms_norm, gated_rms_norm_int8, rms_norm, rms_norm_int8
from tests.kernels.gpu.parity import FLOATS, assert_gradients, assert_same, both


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "channels", "group"), [(1, 1, 1), (3, 63, 21), (2, 257, 257), (5, 96, 32)])
def test_every_variant(device: str, dtype: torch.dtype, rows: int, channels: int, group: int) -> None:
    x, z = torch.randn(rows, channels, dtype=dtype).to(device), torch.randn(rows, channels, dtype=dtype).to(device)
    for weight in (torch.rand(channels, dtype=dtype).to(device), torch.rand(channels).to(device)):
        assert_same(*both(rms_norm, x, weight, 1e-5), dtype)
        assert_same(*both(gated_rms_norm, x, z, weight, 1e-5, group), dtype)
        assert_same(*both(add_rms_norm, x, z, weight), dtype)
        for quantizer in ({}, {"act_bits": 4}, {"act_scale": torch.tensor([0.013], device=device)}):
            assert_same(*both(rms_norm_int8, x, weight, residual=z, **quantizer), dtype)
            assert_same(*both(gated_rms_norm_int8, x, z, weight, 1e-5, group, **quantizer), dtype)
    assert_same(*both(rms_norm, x), dtype)


def test_rows_that_are_not_contiguous_and_none_at_all(device: str) -> None:
    wide = torch.randn(2, 5, 100, device=device)
    assert_same(*both(rms_norm, wide[..., 20:68]), torch.float32)
    assert_same(*both(rms_norm, wide[:, ::2, :48].transpose(0, 1)), torch.float32)
    assert_same(*both(rms_norm, wide[:0]), torch.float32)


def test_rows_that_hold_no_number(device: str) -> None:
    x = torch.randn(4, 48, device=device)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    got, want = both(rms_norm_int8, x)
    assert [t.isnan().tolist() for t in got] == [t.isnan().tolist() for t in want]
    assert got[0][1].abs().max() == 0


def test_gradients(device: str) -> None:
    assert_gradients(rms_norm, {"x": torch.randn(3, 2, 40, device=device), "weight": torch.randn(40, device=device)})


def test_compiles_into_a_graph(device: str) -> None:
    """The fake implementation carries shapes through torch.compile, forward and backward."""
    x, weight = torch.randn(3, 40, device=device, requires_grad=True), torch.randn(40, device=device)

    def block(x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x * 2, weight).relu()

    with registry.backend("triton"):
        expected = torch.autograd.grad(block(x).sum(), x)[0]
        got = torch.autograd.grad(torch.compile(block, backend="aot_eager", fullgraph=True)(x).sum(), x)[0]
    assert torch.equal(got, expected)
