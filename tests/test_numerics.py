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
from mambacompress.models.packed import ActivationFormat, PackedLinear, WeightFormat
from mambacompress.numerics import Grid

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
@given(weights(), st.sampled_from([4, 8]), st.data())
def test_symmetric_error_and_idempotence(w: Tensor, bits: int, data: st.DataObject) -> None:
    grid = Grid(bits, data.draw(st.sampled_from([None, *divisors(w.shape[1])])))
    codes, scales = numerics.round_to_nearest(w, grid)
    assert codes.dtype == torch.int8
    assert grid.lowest <= int(codes.min()) <= int(codes.max()) <= grid.highest
    assert scales.shape == (w.shape[0], w.shape[1] // (grid.group_size or w.shape[1]))
    assert torch.equal(scales.to(grid.scale_dtype).float(), scales)
    back = grid.dequantize(codes, scales)
    step = scales.abs().repeat_interleave(w.shape[1] // scales.shape[1], 1)
    slack = 1 if bits == 4 else 0.5  # 4 bits end at +7: a value opposite to the group's largest may lose a whole step
    assert ((back - w).abs() <= step * slack + w.abs() * 1e-3 * (bits == 4) + 1e-6 * w.abs()).all()
    again, scales_again = numerics.round_to_nearest(back, grid)
    assert torch.allclose(grid.dequantize(again, scales_again), back, rtol=1e-3 if bits == 4 else 1e-6)


@SETTINGS
@given(weights(), st.data())
def test_asymmetric_error_and_exact_zero(w: Tensor, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([None, *divisors(w.shape[1])]))
    codes, scale, zero = numerics.quantize_asymmetric(w, Grid(4, group))
    assert int(codes.min()) >= -8
    assert int(codes.max()) <= 7
    back = numerics.dequantize(codes, scale, zero=zero)
    per_value = scale.repeat_interleave(group or w.shape[1], 1)
    assert ((back - w).abs() <= per_value * 1.0001).all()  # half a step from the code, half from the zero point
    assert (back[w == 0] == 0).all()


@SETTINGS
@given(weights(), st.sampled_from([4, 8]))
def test_search_never_loses(w: Tensor, bits: int) -> None:
    importance, grid = torch.rand(w.shape[1]) + 0.1, Grid(bits)

    def error(scales: Tensor) -> Tensor:
        return ((grid.dequantize(grid.round(w, scales), scales) - w).square() * importance).sum(1)

    found, widest = numerics.searched_scales(w, grid, importance), numerics.widest_scales(w, grid)
    assert (error(found) <= error(widest) * (1 + 1e-5) + 1e-12).all()


def test_extreme_weights() -> None:
    w = torch.tensor([[0.0, 0.0], [1e-45, -1e-45], [3e38, -1e38], [1e-30, 5e-31]])
    codes, scales = numerics.round_to_nearest(w, Grid(8))
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()
    assert not codes[0].any()
    back = Grid(8).dequantize(codes, scales)
    assert torch.isfinite(back).all()
    assert ((back - w).abs() <= scales * 0.5001).all()


def test_weights_that_cannot_be_quantized() -> None:
    with pytest.raises(ValueError, match="NaN"):
        numerics.round_to_nearest(torch.tensor([[1.0, math.nan]]), Grid(8))
    with pytest.raises(ValueError, match=r"48 columns of a \[3, 48\]"):
        numerics.round_to_nearest(torch.ones(3, 48), Grid(4, 64))


@SETTINGS
@given(weights(), st.sampled_from([4, 8]))
def test_activation_error_bound(x: Tensor, bits: int) -> None:
    q, scale = numerics.quantize_activation(x, "token", bits)
    assert scale.shape == (x.shape[0], 1)
    assert q.abs().max() <= (127 if bits == 8 else 7)
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


def test_fake_quantization_is_what_packing_gives_and_lets_gradients_through() -> None:
    w = torch.randn(6, 32, requires_grad=True)
    fake = numerics.fake_quantize_weight(w, Grid(4, 16))
    packed = PackedLinear.from_float(w, weights=WeightFormat(4, 16), activations=ActivationFormat())
    assert torch.equal(fake, packed.dequantize())
    fake.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))

    x = torch.tensor([[0.3, 5.0, -5.0]], requires_grad=True)
    numerics.fake_quantize_activation(x, "tensor", 8, torch.tensor(1.0 / 127)).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0, 0.0]]


def test_sqnr() -> None:
    x = torch.tensor([3.0, 4.0])
    assert numerics.sqnr_db(x, x) == math.inf
    assert numerics.sqnr_db(x, x * 0.9) == pytest.approx(20.0, abs=1e-4)
