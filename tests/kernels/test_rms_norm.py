"""RMS norms: the stock modules' rounding, rows that do not depend on one another, native equal to the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambacompress.kernels import native, registry
from mambacompress.kernels.rms_norm import (
    check,
    gated_rms_norm,
    gated_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)

needs_native = pytest.mark.skipif(native.library() is None, reason=native.why_not())


def error(y: Tensor, reference: Tensor) -> float:
    return float((y.detach().double() - reference.detach().double()).norm() / reference.detach().double().norm())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_formula(backend: str) -> None:
    x, z, weight = torch.randn(4, 3, 48), torch.randn(4, 3, 48), torch.rand(48)
    with registry.backend(backend):
        assert error(rms_norm(x, weight, 1e-5), F.rms_norm(x, (48,), weight, 1e-5)) < 1e-6
        assert error(rms_norm(x, None, 1e-5), F.rms_norm(x, (48,), None, 1e-5)) < 1e-6
        gated = (x * F.silu(z)).unflatten(-1, (3, 16))
        expected = F.rms_norm(gated, (16,), None, 1e-5).flatten(-2) * weight
        assert error(gated_rms_norm(x, z, weight, 1e-5, 16), expected) < 1e-6


def test_stock_mamba_norms() -> None:
    from transformers.models.mamba.modeling_mamba import MambaRMSNorm
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

    for dtype in (torch.float32, torch.bfloat16):
        x, z = torch.randn(2, 5, 64, dtype=dtype), torch.randn(2, 5, 64, dtype=dtype)
        stock, gated = MambaRMSNorm(64).to(dtype), MambaRMSNormGated(64, 32).to(dtype)
        torch.nn.init.uniform_(stock.weight)
        torch.nn.init.uniform_(gated.weight)
        with registry.backend("reference"):
            assert torch.equal(rms_norm(x, stock.weight, stock.variance_epsilon), stock(x))
        assert error(gated_rms_norm(x, z, gated.weight, gated.variance_epsilon, 32), gated(x, z)) < (
            1e-6 if dtype == torch.float32 else 5e-3)


@needs_native
@pytest.mark.parametrize("size", [1, 7, 48, 768, 1536])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
])
def test_native_is_the_reference(level: str, size: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    x, z, weight = torch.randn(3, size).to(dtype), torch.randn(3, size).to(dtype), torch.rand(size).to(weight_dtype)
    group = size // 3 if size % 3 == 0 else size
    with registry.backend("native"), torch.no_grad():
        pairs = [(rms_norm(x, weight), rms_norm_reference(x, weight)), (rms_norm(x), rms_norm_reference(x)),
                 (gated_rms_norm(x, z, weight, 1e-5, group), gated_rms_norm_reference(x, z, weight, 1e-5, group))]
    for y, reference in pairs:
        assert y.dtype == reference.dtype
        assert error(y, reference) < tolerance


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("size", [48, 768, 2560])
def test_a_row_does_not_depend_on_the_others(size: int, backend: str) -> None:
    """Native exactly; torch computes exponentials at a tensor's end by other code than inside: its gate only nearly."""
    x, z, weight = torch.randn(1, 100, size), torch.randn(1, 100, size), torch.rand(size)
    threads, exact = torch.get_num_threads(), backend == "auto" and native.library() is not None
    with registry.backend(backend):
        together, gated = rms_norm(x, weight), gated_rms_norm(x, z, weight, 1e-5, size // 2)
        for t in (0, 50, 99):
            one = slice(t, t + 1)
            assert torch.equal(rms_norm(x[:, one], weight), together[:, one])
            alone = gated_rms_norm(x[:, one], z[:, one], weight, 1e-5, size // 2)
            assert torch.equal(alone, gated[:, one]) if exact else error(alone, gated[:, one]) < 1e-6
        try:
            torch.set_num_threads(2)
            assert torch.equal(rms_norm(x, weight), together)
        finally:
            torch.set_num_threads(threads)


def test_extremes() -> None:
    x = torch.tensor([[0.0] * 8, [1e-30] * 8, [1e18] * 8, [float("nan")] + [1.0] * 7])
    y = rms_norm(x)
    assert not y[0].any()
    assert torch.isfinite(y[:3]).all()
    assert torch.isnan(y[3]).all()
    assert torch.allclose(y[2], torch.ones(8))


def test_gradient_and_double() -> None:
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert torch.autograd.gradcheck(lambda a, w: gated_rms_norm(a, a, w, 1e-5, 3), (x, weight))
    parameter = torch.nn.Parameter(torch.rand(6))
    rms_norm(torch.randn(2, 6), parameter).sum().backward()
    assert parameter.grad is not None


def test_strides_and_refusals() -> None:
    x = torch.randn(3, 2, 16)
    part = x[..., :8]
    assert torch.equal(rms_norm(part), rms_norm(part.contiguous()))
    assert rms_norm(x[:0]).shape == (0, 2, 16)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(x, torch.ones(15))
    with pytest.raises(ValueError, match="groups of 5"):
        gated_rms_norm(x, x, torch.ones(16), 1e-5, 5)
    with pytest.raises(ValueError, match="do not fit"):
        gated_rms_norm(x, part, torch.ones(16), 1e-5, 16)


def test_check() -> None:
    found, tolerance = check()
    assert found <= tolerance


@needs_native
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_of_the_native_norm(weighted: bool) -> None:
    """The forward with a gradient is the one without, bit for bit; the gradients are the formula's."""
    x, weight = torch.randn(3, 5, 40), torch.rand(40) if weighted else None
    leaves = [t.clone().requires_grad_() for t in (x, weight) if t is not None]
    y = rms_norm(leaves[0], leaves[1] if weighted else None)
    assert torch.equal(y.detach(), rms_norm(x, weight))
    dy = torch.randn_like(y)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(rms_norm_reference(exact[0], exact[1] if weighted else None), exact, dy.double())
    for got, want in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
        assert error(got, want) < 1e-6
