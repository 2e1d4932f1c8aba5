"""Rounding, scales and packing: laws that hold for every input, checked by hypothesis."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambacompress import numerics

SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)
normal_floats = st.floats(-1e4, 1e4, width=32, allow_subnormal=False).map(lambda v: v if abs(v) > 1e-3 else 0.0)


@st.composite
def weights(draw: st.DrawFn, even: bool = False) -> Tensor:
    rows, groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 8)) * (2 if even else 1)
    array = draw(hnp.arrays(np.float32, (rows, groups * size), elements=normal_floats))
    return torch.from_numpy(array)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@SETTINGS
@given(hnp.arrays(np.int8, hnp.array_shapes(min_dims=1, max_dims=3, max_side=9), elements=st.integers(-8, 7)))
def test_int4_round_trip(codes: np.ndarray) -> None:
    q = torch.from_numpy(codes)
    if q.shape[-1] % 2:
        with pytest.raises(ValueError, match=str(q.shape[-1])):
            numerics.pack_int4(q)
        return
    packed = numerics.pack_int4(q)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*q.shape[:-1], q.shape[-1] // 2)
    assert torch.equal(numerics.unpack_int4(packed), q)
    if q.numel():
        even, odd = q.flatten()[:2].tolist()  # the low nibble is the even column
        assert packed.flatten()[0] == (even + 8) + 16 * (odd + 8)


@pytest.mark.parametrize("code", [-9, 8])
def test_int4_refuses_codes_that_do_not_fit(code: int) -> None:
    with pytest.raises(ValueError, match=r"-8\.\.7"):
        numerics.pack_int4(torch.tensor([[0, code]], dtype=torch.int8))


@SETTINGS
@given(weights(), st.sampled_from([4, 8]), st.sampled_from([torch.float32, torch.float16]), st.data())
def test_symmetric_error_and_idempotence(w: Tensor, bits: int, dtype: torch.dtype, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([None, *divisors(w.shape[1])]))
    codes, scale = numerics.quantize_symmetric(w, bits, group, scale_dtype=dtype)
    assert codes.dtype == torch.int8
    assert codes.abs().max() <= numerics.limit(bits)
    assert scale.dtype == dtype
    assert scale.shape == ((w.shape[0],) if group is None else (w.shape[0], w.shape[1] // group))
    back = numerics.dequantize(codes, scale)
    per_value = (scale[:, None] if group is None else scale.repeat_interleave(group, 1)).float()
    assert ((back - w).abs() <= per_value * 0.5 + w.abs() * 1e-3 * (dtype == torch.float16) + 1e-6 * w.abs()).all()
    again, scale_again = numerics.quantize_symmetric(back, bits, group, scale_dtype=dtype)
    assert torch.equal(again, codes)
    assert torch.allclose(scale_again.float(), scale.float(), rtol=1e-6) or not codes.any(dim=1).all()


@SETTINGS
@given(weights(), st.data())
def test_asymmetric_error_and_exact_zero(w: Tensor, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([None, *divisors(w.shape[1])]))
    codes, scale, zero = numerics.quantize_asymmetric(w, group)
    assert int(codes.min()) >= -8
    assert int(codes.max()) <= 7
    back = numerics.dequantize(codes, scale, zero=zero)
    per_value = scale.repeat_interleave(group or w.shape[1], 1)
    assert ((back - w).abs() <= per_value * 1.0001).all()  # half a step from the code, half from the zero point
    assert (back[w == 0] == 0).all()


@SETTINGS
@given(weights(), st.sampled_from([4, 8]))
def test_search_never_loses(w: Tensor, bits: int) -> None:
    importance = torch.rand(w.shape[1]) + 0.1

    def error(search: bool) -> Tensor:
        codes, scale = numerics.quantize_symmetric(w, bits, search=search, importance_I=importance if search else None)
        return ((numerics.dequantize(codes, scale) - w).square() * importance).sum(1)

    assert (error(True) <= error(False) * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_weights(bits: int) -> None:
    w = torch.tensor([[0.0, 0.0], [1e-45, -1e-45], [3e38, -1e38], [1e-30, 5e-31]])
    codes, scale = numerics.quantize_symmetric(w, bits)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert not codes[0].any()
    back = numerics.dequantize(codes, scale)
    assert torch.isfinite(back).all()
    assert ((back - w).abs() <= scale[:, None] * 0.5001).all()


def test_weights_that_cannot_be_quantized() -> None:
    with pytest.raises(ValueError, match="NaN"):
        numerics.quantize_symmetric(torch.tensor([[1.0, math.nan]]), 8)
    with pytest.raises(ValueError, match=r"48 columns of a \[3, 48\]"):
        numerics.quantize_symmetric(torch.ones(3, 48), 4, 64)
    with pytest.raises(ValueError, match="too large"):
        numerics.quantize_symmetric(torch.full((1, 4), 1e6), 4, 4, scale_dtype=torch.float16)


@SETTINGS
@given(weights(), st.sampled_from([4, 8]))
def test_activation_error_bound(x: Tensor, bits: int) -> None:
    q, scale = numerics.quantize_activation(x, "token", bits)
    assert scale.shape == (x.shape[0], 1)
    assert q.abs().max() <= numerics.limit(bits)
    assert ((q * scale - x).abs() <= scale * 0.5001).all()
    alone = torch.cat([numerics.quantize_activation(row[None], "token", bits)[0] for row in x])
    assert torch.equal(alone, q)


def test_activation_special_rows() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-44, 1e-45], [3e38, -3e38], [math.nan, 1.0], [math.inf, 1.0]])
    q, scale = numerics.quantize_activation(x, "token")
    assert not q[0].any()
    assert (scale[:3] > 0).all()
    assert q[2].tolist() == [127, -127]
    assert not torch.isfinite(scale[3:]).any()  # the row's product becomes NaN, and no other row's
    ties = torch.tensor([0.5, 1.5, 2.5, -0.5, 300.0, -300.0])
    q, scale = numerics.quantize_activation(ties, "tensor", scale=torch.tensor(1.0))
    assert q.tolist() == [0, 2, 2, 0, 127, -127]  # half to even, clamped
    with pytest.raises(ValueError, match="act_scale"):
        numerics.quantize_activation(x, "tensor")


def test_percentile() -> None:
    x = torch.arange(-1000.0, 1001.0)
    assert numerics.percentile_absmax(x, 100) == 1000
    assert numerics.percentile_absmax(x, 99.9) == 999
    assert numerics.static_scale(x, 4) == pytest.approx(1000 / 7)
    assert numerics.static_scale(torch.zeros(3)) > 0
    for wrong in (0.0, 101.0):
        with pytest.raises(ValueError, match="range"):
            numerics.percentile_absmax(x, wrong)
    with pytest.raises(ValueError, match="0 values"):
        numerics.percentile_absmax(x[:0], 99.9)


def test_fake_quantization_is_what_packing_gives_and_lets_gradients_through() -> None:
    w = torch.randn(6, 32, requires_grad=True)
    fake = numerics.fake_quantize_weight(w, 4, 16, scale_dtype=torch.float16)
    codes, scale = numerics.quantize_symmetric(w.detach(), 4, 16, scale_dtype=torch.float16)
    assert torch.equal(fake, numerics.dequantize(codes, scale))
    fake.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))

    x = torch.tensor([[0.3, 5.0, -5.0]], requires_grad=True)
    numerics.fake_quantize_activation(x, "tensor", 8, torch.tensor(1.0 / 127)).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0, 0.0]]


def test_sqnr() -> None:
    x = torch.tensor([3.0, 4.0])
    assert numerics.sqnr_db(x, x) == math.inf
    assert numerics.sqnr_db(x, x * 0.9) == pytest.approx(20.0, abs=1e-4)
