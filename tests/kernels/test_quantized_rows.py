"""Norms and rotations with an int8 output give exactly what the separate ops give, at every level and odd sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mambacompress.kernels import native, registry
from mambacompress.kernels.hadamard import hadamard, hadamard_int8, hadamard_reference, largest_block
from mambacompress.kernels.int8_linear import quantize_rows
from mambacompress.kernels.rms_norm import (
    add_rms_norm,
    gated_rms_norm,
    gated_rms_norm_int8,
    rms_norm,
    rms_norm_int8,
    rms_norm_reference,
)
from tests.kernels.scans import nan_filled, needs_native, threads

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
          (torch.bfloat16, torch.float32)]
QUANTIZERS = [(None, 8), (None, 4), (torch.tensor(0.013), 8), (torch.tensor([0.4]), 4)]


def assert_quantized(result: tuple[Tensor, Tensor], y: Tensor, act_scale: Tensor | None, act_bits: int) -> None:
    """``result`` is y through ``quantize_rows``, bit for bit."""
    codes, scales = quantize_rows(y, "token" if act_scale is None else "tensor", act_bits, act_scale)
    assert result[0].dtype == torch.int8
    assert torch.equal(result[0], codes)
    assert result[1].shape == (*y.shape[:-1], 1)
    assert torch.equal(result[1], scales.reshape(-1, 1).expand(y.numel() // y.shape[-1], 1).reshape(result[1].shape))


def norms(x: Tensor, z: Tensor, residual: Tensor, weight: Tensor, act_scale: Tensor | None, act_bits: int) -> None:
    """Every fused form against the separate ops of the same backend."""
    how = {"act_scale": act_scale, "act_bits": act_bits}
    group = x.shape[-1] // 3 if x.shape[-1] % 3 == 0 else x.shape[-1]
    assert_quantized(rms_norm_int8(x, weight, **how)[:2], rms_norm(x, weight), **how)
    assert_quantized(rms_norm_int8(x, **how)[:2], rms_norm(x), **how)
    *result, total = rms_norm_int8(x, weight, residual=residual, **how)
    assert torch.equal(total, x + residual)
    assert_quantized(tuple(result), rms_norm(total, weight), **how)
    y, total = add_rms_norm(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight))
    assert_quantized(gated_rms_norm_int8(x, z, weight, 1e-5, group, **how), gated_rms_norm(x, z, weight, 1e-5, group),
                     **how)


def norm_problem(size: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, z, residual = (torch.randn(2, 3, size).to(dtype) for _ in range(3))
    return x, z, residual, torch.rand(size).to(weight_dtype)


@needs_native
@pytest.mark.parametrize("size", [1, 7, 48, 769, 1536])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_native_norms_give_the_codes_of_the_separate_ops(level: str, size: int,
                                                         dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for act_scale, act_bits in QUANTIZERS:
        with nan_filled(), registry.backend("native"), registry.strict():
            norms(*norm_problem(size, *dtypes), act_scale, act_bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_the_reference_of_the_norms(dtype: torch.dtype) -> None:
    with registry.backend("reference"):
        for act_scale, act_bits in QUANTIZERS:
            norms(*norm_problem(33, dtype, dtype), act_scale, act_bits)


def rotations(n: int, dtype: torch.dtype, act_scale: Tensor | None, act_bits: int) -> None:
    x, signs, block = torch.randn(5, n).to(dtype), torch.where(torch.rand(n) < 0.5, -1, 1), largest_block(n)
    for transpose in (False, True):
        for s in (signs, None):
            codes = hadamard_int8(x, s, block=block, transpose=transpose, act_scale=act_scale, act_bits=act_bits)
            assert_quantized(codes, hadamard_reference(x, s, block=block, transpose=transpose), act_scale, act_bits)


@needs_native
@pytest.mark.parametrize("n", [1, 12, 40, 128, 768, 24 * 29])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_rotation_gives_the_codes_of_the_reference(level: str, n: int, dtype: torch.dtype) -> None:
    for act_scale, act_bits in QUANTIZERS:
        with nan_filled(), registry.backend("native"), registry.strict():
            rotations(n, dtype, act_scale, act_bits)


def test_the_reference_of_the_rotation() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        with registry.backend("reference"):
            rotations(48, dtype, None, 8)
            rotations(20, dtype, torch.tensor(0.02), 8)


OPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "norm": rms_norm_int8, "hadamard": hadamard_int8,
    "gated": lambda x, **how: gated_rms_norm_int8(x, torch.ones_like(x), torch.ones(x.shape[-1]), 1e-5, 8, **how)}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rows_that_cannot_be_rounded(name: str, backend: str) -> None:
    """NaN is never rounded away: a row that holds one has a NaN for a scale, the others are as they were."""
    x = torch.randn(4, 16)
    x[1, 3], x[2] = torch.nan, 0.0
    with registry.backend(backend):
        for act_scale in (None, torch.tensor(0.01)):
            codes, scales = OPS[name](x, act_scale=act_scale)[:2]
            clean = OPS[name](x[[0, 3]], act_scale=act_scale)
            assert scales.isnan().flatten().tolist() == [False, True, False, False]
            assert not codes[1:3].any()
            assert torch.equal(codes[[0, 3]], clean[0])
            assert torch.equal(scales[[0, 3]], clean[1])


@needs_native
@pytest.mark.parametrize("name", OPS)
def test_rows_threads_and_strides(name: str) -> None:
    """A row alone equals the row among others; two threads give the bits of one; a view needs no copy."""
    x = torch.randn(70, 2, 768)[:, 1]
    codes, scales = OPS[name](x)[:2]
    for t in (0, 37, 69):
        one = OPS[name](x[t:t + 1])
        assert torch.equal(one[0][0], codes[t])
        assert torch.equal(one[1][0], scales[t])
    with threads(2):
        both = OPS[name](x.contiguous())
    assert torch.equal(both[0], codes)
    assert torch.equal(both[1], scales)
    assert OPS[name](x[:0])[0].shape == (0, 768)


def test_the_custom_ops_are_well_formed() -> None:
    x, weight, scale = torch.randn(3, 24), torch.rand(24), torch.tensor(0.02)
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.mambacompress
    torch.library.opcheck(ops.rms_norm_int8, (x, None, weight, 1e-5, None, 8), test_utils=checks)
    torch.library.opcheck(ops.rms_norm_int8, (x, x.clone(), None, 1e-5, scale, 4), test_utils=checks)
    torch.library.opcheck(ops.gated_rms_norm_int8, (x, x.clone(), weight, 1e-5, 8, None, 8), test_utils=checks)
    torch.library.opcheck(ops.hadamard_int8, (x, None, 24, True, scale, 8), test_utils=checks)


def test_a_residual_has_gradients() -> None:
    x, r, w = (t.requires_grad_() for t in (torch.randn(2, 6), torch.randn(2, 6), torch.rand(6)))
    y, total = add_rms_norm(x, r, w)
    (y.sum() + (total * total).sum()).backward()
    want = torch.autograd.grad(rms_norm_reference(x + r, w).sum() + (x + r).square().sum(), (x, r, w))
    for got, expected in zip((x.grad, r.grad, w.grad), want, strict=True):
        assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(("call", "message"), [
    (lambda x: rms_norm_int8(x, torch.ones(7)), "rms_norm_int8: weight has shape"),
    (lambda x: rms_norm_int8(x, residual=x.half()), "rms_norm_int8: the residual is"),
    (lambda x: add_rms_norm(x, x[:1]), "add_rms_norm: the residual is"),
    (lambda x: rms_norm_int8(x, act_scale=torch.ones(8)), "expected one number"),
    (lambda x: gated_rms_norm_int8(x, x, torch.ones(8), 1e-5, 3), "groups of 3 do not divide 8"),
    (lambda x: gated_rms_norm_int8(x, x, torch.ones(8), 1e-5, 8, act_bits=3), "8 or 4 bits"),
    (lambda x: hadamard_int8(x, block=3), "no whole number of blocks"),
    (lambda x: hadamard_int8(x, act_scale=torch.ones(2)), "hadamard_int8: act_scale"),
])
def test_refusals(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 8))


@needs_native
def test_strict_refuses_what_native_code_does_not_do() -> None:
    with registry.strict(), pytest.raises(registry.KernelFallback, match="float64"):
        hadamard_int8(torch.randn(2, 8, dtype=torch.float64))
    assert native.library() is not None
    assert hadamard(torch.randn(2, 8)).shape == (2, 8)
