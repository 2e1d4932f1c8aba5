"""The int8 state: its rounding, and decode steps on it, native against reference on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mambacompress.kernels.int8_state import TINY, Int8State, dither, quantize_state
from mambacompress.kernels.registry import backend, strict
from mambacompress.kernels.selective_scan import ScanScales
from mambacompress.kernels.selective_state_update import (
    selective_state_update,
    selective_state_update_int8,
    selective_steps_int8,
)
from mambacompress.kernels.ssd_state_update import ssd_state_update, ssd_state_update_int8, ssd_steps_int8
from mambacompress.kernels.tolerances import FORWARD, rms_ratio
from tests.kernels.scans import cast, nan_filled, needs_native, scan_problem, ssd_problem, threads

S6_SIZES = [(1, 5, 16, 1), (2, 48, 5, 3), (3, 34, 16, 2), (2, 70, 24, 1), (2, 33, 1, 1)]
SSD_SIZES = [(1, 2, 8, 16, 1), (2, 6, 5, 9, 2), (3, 4, 7, 33, 4), (2, 1, 3, 64, 1), (2, 3, 1, 1, 3)]


def s6_step(batch: int, channels: int, states: int, groups: int = 1) -> dict[str, Any]:
    p = cast(scan_problem(batch, 1, channels, states, groups), torch.float32)
    state = quantize_state(p.pop("initial_state_BEN"), torch.arange(batch) * 1000)
    return {"state": state, **{name.replace("L", ""): t[:, 0] if "L" in name else t for name, t in p.items()}}


def ssd_step(batch: int, heads: int, head_dim: int, states: int, groups: int) -> dict[str, Any]:
    p = cast(ssd_problem(batch, 1, heads, head_dim, states, groups), torch.float32)
    state = quantize_state(p.pop("initial_state_BHPN"), torch.arange(batch) * 1000)
    return {"state": state, **{name.replace("L", ""): t[:, 0] if "L" in name else t for name, t in p.items()}}


def problems() -> list[Any]:
    found = [pytest.param(selective_state_update_int8, s6_step, size, id=f"s6-{size}") for size in S6_SIZES]
    return [*found, *(pytest.param(ssd_state_update_int8, ssd_step, size, id=f"ssd-{size}") for size in SSD_SIZES)]


Step = Callable[..., tuple[Tensor, Int8State]]
Make = Callable[..., dict[str, Any]]
both_ops = pytest.mark.parametrize(("op", "make", "size"), [
    pytest.param(selective_state_update_int8, s6_step, (3, 37, 16, 1), id="s6"),
    pytest.param(ssd_state_update_int8, ssd_step, (3, 4, 7, 33, 2), id="ssd")])


def equal(a: Int8State, b: Int8State) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 7, 16), (2, 3, 5, 9)], ids=str)
def test_codes_reach_the_whole_range_and_no_state_is_further_away_than_one(shape: tuple[int, ...]) -> None:
    h = torch.randn(shape) * torch.logspace(-8, 8, shape[-2])[:, None]
    state = quantize_state(h, torch.arange(2))
    assert bool((state.codes.abs().amax(-1) == 127).all())
    assert bool(((state.dequantized() - h).abs() <= state.scale[..., None] * 1.0001).all())
    assert state.bytes == h.numel() + 4 * h[..., 0].numel() + 8 * 2


def test_rounding_has_no_bias_and_its_errors_cancel_within_a_few_steps() -> None:
    """Over 100 steps the mean code of a number is that number to within what four errors of one make up."""
    h = torch.rand(1, 64, 16) * 2 - 1
    steps = 100
    mean = sum(quantize_state(h, torch.tensor([t])).dequantized() for t in range(steps)) / steps
    errors = (mean - h) / quantize_state(h).scale[..., None]
    assert float(errors.abs().max()) < 4 / steps
    assert abs(float(errors.mean())) < 0.1 / steps


def test_dither_is_a_fraction_and_fills_the_interval() -> None:
    found = dither(torch.tensor([0, 1, 2**31 - 1]), 512, 16)
    assert bool(((found >= 0) & (found < 1)).all())
    counts = torch.histc(found, 64, 0, 1)
    assert float(counts.min()) > 0.9 * float(counts.mean())


def test_a_slow_state_goes_on_moving() -> None:
    """Decay and input far below half a code a step: to nearest nothing would ever happen."""
    channels, states, steps = 8, 16, 2000
    h = torch.rand(1, channels, states) + 0.5
    state, exact = quantize_state(h), h.clone()
    A, ones = torch.full((channels, states), -1e-3), torch.ones(1, channels)
    B = torch.full((1, 1, states), 4e-4)
    for _ in range(steps):
        _, state = selective_state_update_int8(state, ones, ones, A, B, B, dt_softplus=False)
        _, exact = selective_state_update(exact, ones, ones, A, B, B, dt_softplus=False)
    assert float((exact - h).abs().mean()) > 0.2
    assert float((state.dequantized() - exact).abs().max()) < 4 * float(state.scale.max())


def test_what_a_state_must_look_like() -> None:
    p = s6_step(2, 6, 4)
    state = p.pop("state")
    with pytest.raises(ValueError, match="codes has shape"):
        selective_state_update_int8(Int8State(state.codes[:, :5], state.scale, state.step), **p)
    with pytest.raises(TypeError, match="scale is torch"):
        selective_state_update_int8(Int8State(state.codes, state.scale.double(), state.step), **p)
    with pytest.raises(TypeError, match="u is int8 and has no scale"):
        selective_state_update_int8(state, **{**p, "u_BE": p["u_BE"].to(torch.int8)})


# -- native code -----------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize(("op", "make", "size"), problems())
def test_native_steps_are_the_reference_s(level: str, op: Step, make: Make, size: tuple[int, ...]) -> None:
    """exp and softplus differ in their last bits, and with them few codes, by one; y is as near as in fp32."""
    p = make(*size)
    with nan_filled(), strict(), backend("native"):
        y, new = op(**p)
    with backend("reference"):
        y_ref, new_ref = op(**p)
    assert rms_ratio(y, y_ref) < FORWARD[torch.float32]
    assert rms_ratio(new.scale, new_ref.scale) < FORWARD[torch.float32]
    difference = (new.codes.int() - new_ref.codes.int()).abs()
    assert int(difference.max()) <= 1
    assert float(difference.float().mean()) < 1e-3
    assert torch.equal(new.step, p["state"].step + 1)


@needs_native
@pytest.mark.parametrize(("op", "make", "size"), problems())
def test_codes_are_bit_exact_where_nothing_decays(level: str, op: Step, make: Make, size: tuple[int, ...]) -> None:
    p = {**make(*size), "dt_softplus": False}
    for name in ("A_EN", "A_H"):
        if name in p:
            p[name] = torch.zeros_like(p[name])
    for name in ("u_BE", "x_BHP", "dt_BE", "dt_BH"):  # few bits: a product and its sum round alike, fused or not
        if name in p:
            p[name] = torch.randint(0, 3, p[name].shape).float()
    p |= {name: None for name in p if name.startswith("dt_bias")}
    p["B_BGN"] = torch.randint(-4, 5, p["B_BGN"].shape).float()
    with nan_filled(), backend("native"):
        _, new = op(**p)
    with backend("reference"):
        _, new_ref = op(**p)
    assert equal(new, new_ref)


@needs_native
@both_ops
def test_threads_rows_and_copies_give_the_same_bits(level: str, op: Step, make: Make, size: tuple[int, ...]) -> None:
    p = make(*size)
    with backend("native"):
        y, new = op(**p)
        again = op(**{**p, "state": Int8State(p["state"].codes.contiguous(), *p["state"][1:])})
        with threads(2):
            on_two = op(**p)
        for y_other, other in (again, on_two):
            assert torch.equal(y, y_other)
            assert equal(new, other)
        for row in range(size[0]):
            alone = {name: value[row:row + 1] if isinstance(value, Tensor) and "_B" in name else value
                     for name, value in p.items()}
            y_row, new_row = op(**{**alone, "state": Int8State(*(t[row:row + 1] for t in p["state"]))})
            assert torch.equal(y_row, y[row:row + 1])
            assert equal(new_row, Int8State(*(t[row:row + 1] for t in new)))


@needs_native
@pytest.mark.parametrize("threads_used", [1, 2])
def test_many_tasks_in_parallel(threads_used: int) -> None:
    """Sizes above which a step is shared out among threads."""
    cases: list[tuple[Step, Any, tuple[int, ...]]] = [(selective_state_update_int8, s6_step, (4, 1200, 16, 2)),
                                                      (ssd_state_update_int8, ssd_step, (2, 24, 64, 96, 2))]
    for op, make, size in cases:
        p = make(*size)
        with threads(threads_used), backend("native"):
            y, new = op(**p)
        with backend("reference"):
            y_ref, new_ref = op(**p)
        assert rms_ratio(y, y_ref) < FORWARD[torch.float32]
        assert float((new.codes != new_ref.codes).float().mean()) < 1e-3


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@both_ops
def test_half_precision_inputs(op: Step, make: Make, size: tuple[int, ...], dtype: torch.dtype) -> None:
    keep = ("A", "D", "dt_bias")
    p = {name: value.to(dtype) if isinstance(value, Tensor) and not name.startswith(keep) else value
         for name, value in make(*size).items()}
    with strict(), backend("native"):
        y, new = op(**p)
    with backend("reference"):
        y_ref, new_ref = op(**p)
    assert y.dtype == y_ref.dtype == dtype
    assert rms_ratio(y, y_ref) < 2 * FORWARD[dtype]
    assert float((new.codes != new_ref.codes).float().mean()) < 1e-3


@needs_native
def test_int8_inputs() -> None:
    p = s6_step(2, 37, 16)
    scales = ScanScales(u=torch.rand(37) / 50, dt=0.01, B=torch.rand(1, 16) / 50, C=0.02, z=torch.rand(37) / 50)
    for name in ("u_BE", "dt_BE", "B_BGN", "C_BGN", "z_BE"):
        p[name] = torch.randint(-127, 128, p[name].shape, dtype=torch.int8)
    with strict(), backend("native"):
        y, new = selective_state_update_int8(**p, scales=scales, z_scale_E=torch.ones(37) * 0.7)
    with backend("reference"):
        y_ref, new_ref = selective_state_update_int8(**p, scales=scales, z_scale_E=torch.ones(37) * 0.7)
    assert rms_ratio(y, y_ref) < FORWARD[torch.float32]
    assert float((new.codes != new_ref.codes).float().mean()) < 1e-3


@needs_native
@both_ops
def test_y_is_that_of_the_fp32_step(level: str, op: Step, make: Make, size: tuple[int, ...]) -> None:
    """The same arithmetic, from the same numbers: bit for bit."""
    p = make(*size)
    fp32: Any = selective_state_update if op is selective_state_update_int8 else ssd_state_update
    with backend("native"):
        y, new = op(**p)
        y_fp32, h = fp32(p["state"].dequantized(), *[value for name, value in p.items() if name != "state"])
    assert torch.equal(y, y_fp32)
    assert equal(new, quantize_state(h, p["state"].step + 1))


@needs_native
@both_ops
@pytest.mark.parametrize("native", [False, True], ids=["reference", "native"])
def test_zero_states_stay_zero(level: str, op: Step, make: Make, size: tuple[int, ...], native: bool) -> None:
    p = make(*size)
    zeros = quantize_state(torch.zeros(p["state"].codes.shape))
    assert not bool(zeros.codes.any())
    p |= {"state": zeros, "B_BGN": torch.zeros_like(p["B_BGN"])}
    with backend("native" if native else "reference"):
        _, new = op(**p)
    assert not bool(new.codes.any())
    assert bool((new.scale == torch.tensor(TINY) / 127).all())


@needs_native
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("native", [False, True], ids=["reference", "native"])
def test_nan_and_infinity_are_not_hidden(level: str, value: float, native: bool) -> None:
    s6, ssd = s6_step(2, 19, 16), ssd_step(2, 4, 5, 9, 2)
    s6["u_BE"][1, 3] = ssd["x_BHP"][1, 2, 1] = value
    with backend("native" if native else "reference"):
        y, new = selective_state_update_int8(**s6)
        later, _ = selective_state_update_int8(**{**s6, "u_BE": torch.ones(2, 19), "state": new})
        y_ssd, new_ssd = ssd_state_update_int8(**ssd)
    for found, place in ((new.scale, (1, 3)), (later, (1, 3)), (new_ssd.scale, (1, 2, 1))):
        assert bool(found[place].isnan())
        assert int(found.isfinite().logical_not().sum()) == 1
    assert not bool(y[1, 3].isfinite())
    assert not bool(y_ssd[1, 2, 1].isfinite())
    assert bool(new.dequantized()[1, 3].isnan().all())


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)], ids=["reference", "native"])
def test_a_text_read_at_once_gives_the_bits_of_its_steps(native: bool) -> None:
    s6 = cast(scan_problem(2, 6, 19, 16), torch.float32)
    ssd = cast(ssd_problem(2, 6, 4, 5, 9, 2), torch.float32)
    cases: list[tuple[Any, Any, dict[str, Tensor]]] = [(selective_steps_int8, selective_state_update_int8, s6),
                                                       (ssd_steps_int8, ssd_state_update_int8, ssd)]
    with backend("native" if native else "reference"):
        for steps, step, p in cases:
            first = state = quantize_state(p.pop(next(name for name in p if name.startswith("initial"))))
            y, final = steps(first, **p)
            for t in range(6):
                y_t, state = step(state, **{name.replace("L", ""): x[:, t] if "L" in name else x
                                            for name, x in p.items()})
                assert torch.equal(y_t, y[:, t])
            assert equal(state, final)
            assert final.step.tolist() == [6, 6]


@needs_native
def test_the_custom_ops_are_well_formed() -> None:
    from mambacompress.kernels.selective_state_update.cpu import update_op as s6_op
    from mambacompress.kernels.ssd_state_update.cpu import update_op as ssd_op

    p = s6_step(2, 19, 8)
    torch.library.opcheck(s6_op, (*p["state"], p["u_BE"][:, None], p["dt_BE"][:, None], p["A_EN"], p["B_BGN"][:, None],
                                  p["C_BGN"][:, None], p["D_E"], p["z_BE"][:, None], p["dt_bias_E"], *[None] * 6, True))
    p = ssd_step(2, 4, 5, 9, 2)
    torch.library.opcheck(ssd_op, (*p["state"], p["x_BHP"][:, None], p["dt_BH"][:, None], p["A_H"], p["B_BGN"][:, None],
                                   p["C_BGN"][:, None], p["D_H"], p["dt_bias_H"], True, 0.0, float("inf")))


def test_doctor() -> None:
    from mambacompress.kernels.selective_state_update import check as s6_check
    from mambacompress.kernels.ssd_state_update import check as ssd_check

    for check in (s6_check, ssd_check):
        error, tolerance = check()
        assert error <= tolerance
