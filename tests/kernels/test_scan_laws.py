"""Laws of selective_scan that hold for any implementation: continuation, packing, windows, reversal, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from mambacompress.kernels.registry import backend
from mambacompress.kernels.selective_scan import ScanScales, selective_scan, selective_scan_reference
from mambacompress.kernels.selective_state_update import selective_state_update
from mambacompress.kernels.tolerances import FORWARD, rms_ratio
from tests.kernels.scans import needs_native, packed_ids, randn, runs_of, scan_problem

TOKENS = ("u_BLE", "dt_BLE", "B_BLGN", "C_BLGN", "z_BLE")


def cut(problem: dict[str, torch.Tensor], part: slice, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {**{k: v[:, part] if k in TOKENS else v for k, v in problem.items()}, **changes}


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for the last bit: torch computes exp of a vector and of its tail differently (native code does not)."""
    assert rms_ratio(a, b) < (1e-14 if a.dtype == torch.float64 else 2e-7)


def test_it_is_the_recurrence() -> None:
    """Against scalar arithmetic, number by number."""
    p = scan_problem(1, 4, 2, 3)
    y, final = selective_scan(**p)
    for e in range(2):
        h = [float(v) for v in p["initial_state_BEN"][0, e]]
        for t in range(4):
            dt = math.log1p(math.exp(float(p["dt_BLE"][0, t, e] + p["dt_bias_E"][e])))
            u, z = float(p["u_BLE"][0, t, e]), float(p["z_BLE"][0, t, e])
            h = [math.exp(dt * float(p["A_EN"][e, n])) * h[n] + dt * float(p["B_BLGN"][0, t, 0,
                                                                                       n]) * u for n in range(3)]
            out = sum(h[n] * float(p["C_BLGN"][0, t, 0, n]) for n in range(3)) + float(p["D_E"][e]) * u
            assert float(y[0, t, e]) == pytest.approx(out * z / (1 + math.exp(-z)), rel=1e-12)
        assert final[0, e].tolist() == pytest.approx(h, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"window": 3}, {"dt_softplus": False}])
def test_gradcheck_of_the_reference(options: dict[str, object]) -> None:
    p = scan_problem(2, 5, 4, 3, groups=2)
    if "dt_softplus" in options:  # without softplus, dt is already a step size
        p["dt_BLE"], p["dt_bias_E"] = p["dt_BLE"].abs() * 0.3 + 0.1, p["dt_bias_E"] * 0.1
    p = {k: v.requires_grad_() for k, v in p.items()}
    names = list(p)
    assert torch.autograd.gradcheck(lambda *t: selective_scan_reference(**dict(zip(names, t, strict=True)), **options),
                                    tuple(p.values()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_cut_continues_where_it_stopped(dtype: torch.dtype) -> None:
    p = {k: v.to(dtype) for k, v in scan_problem(2, 23, 17, 16).items()}
    y, final = selective_scan(**p)
    for at in (1, 7, 16, 22):
        y_a, state = selective_scan(**cut(p, slice(at)))
        y_b, end = selective_scan(**cut(p, slice(at, None), initial_state_BEN=state))
        assert_same(torch.cat([y_a, y_b], 1), y)
        assert_same(end, final)


@needs_native
def test_steps_equal_the_scan_bit_for_bit() -> None:
    p = {k: v.float() for k, v in scan_problem(3, 19, 33, 16, groups=3).items()}
    y, final = selective_scan(**p)
    state = p["initial_state_BEN"]
    for t in range(19):
        y_t, state = selective_state_update(state, p["u_BLE"][:, t], p["dt_BLE"][:, t], p["A_EN"], p["B_BLGN"][:, t],
                                            p["C_BLGN"][:, t], p["D_E"], p["z_BLE"][:, t], p["dt_bias_E"])
        assert torch.equal(y_t, y[:, t])
    assert torch.equal(state, final)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences_equal_separate_ones(window: int | None) -> None:
    p = {k: v.float() for k, v in scan_problem(2, 31, 5, 4).items()}
    ids = packed_ids(2, 31)
    y, final = selective_scan(**p, seq_idx_BL=ids, window=window)
    for b in range(2):
        for i, part in enumerate(runs_of(ids[b])):
            row = {k: v[b:b + 1] if v.dim() > 2 else v for k, v in p.items()}
            start = row["initial_state_BEN"] if i == 0 else None
            y_part, end = selective_scan(**cut(row, part, initial_state_BEN=start), window=window)
            assert_same(y[b:b + 1, part], y_part)
        assert_same(final[b:b + 1], end)


def test_reverse_is_the_scan_of_the_flipped_sequence() -> None:
    p = {k: v.float() for k, v in scan_problem(2, 21, 18, 16).items()}
    ids = packed_ids(2, 21)
    flipped = {k: v.flip(1) if k in TOKENS else v for k, v in p.items()}
    y, final = selective_scan(**p, reverse=True, seq_idx_BL=ids)
    y_flipped, final_flipped = selective_scan(**flipped, seq_idx_BL=ids.flip(1))
    assert torch.equal(y, y_flipped.flip(1))
    assert torch.equal(final, final_flipped)


def test_a_window_of_one_is_the_plain_scan() -> None:
    p = scan_problem(2, 9, 4, 3)
    (y, final), (plain, plain_final) = selective_scan(**p, window=1), selective_scan(**p)
    assert rms_ratio(y, plain) < FORWARD[torch.float64]
    assert torch.equal(final, plain_final)


@pytest.mark.parametrize("window", [9, 50])
def test_a_window_over_everything_is_forward_plus_backward(window: int) -> None:
    """forward + backward - (b . C + D u): what a token adds itself, and the skip, count once."""
    p = {k: v for k, v in scan_problem(2, 9, 4, 3).items() if k not in ("z_BLE", "initial_state_BEN")}
    y, _ = selective_scan(**p, window=window)
    forward, backward = selective_scan(**p)[0], selective_scan(**p, reverse=True)[0]
    dt = torch.nn.functional.softplus(p["dt_BLE"] + p["dt_bias_E"])
    own = dt * p["u_BLE"] * (p["B_BLGN"] * p["C_BLGN"]).sum((-1, -2))[..., None] + p["D_E"] * p["u_BLE"]
    assert rms_ratio(y, forward + backward - own) < FORWARD[torch.float64]


def test_windows_are_the_double_loop() -> None:
    """hR_t = a_t hR_{t+1} + b_t inside the window of t, H_t = hL_t + hR_t - b_t."""
    p = {k: v for k, v in scan_problem(1, 11, 2, 3).items() if k != "z_BLE"}
    y, _ = selective_scan(**p, window=4)
    dt = torch.nn.functional.softplus(p["dt_BLE"] + p["dt_bias_E"])[0]
    a, b = torch.exp(dt[..., None] * p["A_EN"]), (dt * p["u_BLE"][0])[..., None] * p["B_BLGN"][0]
    left = [a[0] * p["initial_state_BEN"][0] + b[0]]
    for t in range(1, 11):
        left.append(a[t] * left[-1] + b[t])
    for t in range(11):
        right = torch.zeros_like(b[0])
        for s in range(min(t // 4 * 4 + 4, 11) - 1, t - 1, -1):
            right = a[s] * right + b[s]
        want = ((left[t] + right - b[t]) * p["C_BLGN"][0, t]).sum(-1) + p["D_E"] * p["u_BLE"][0, t]
        assert torch.allclose(y[0, t], want, rtol=1e-12)


def test_gate_scale_is_silu_of_a_scaled_channel() -> None:
    """z s sigmoid(s z) / s: smoothing's S2 leaves the gate's value up to the factor."""
    p = scan_problem(1, 5, 4, 3)
    s = torch.rand(4, dtype=torch.float64) + 0.5
    scaled = {**p, "z_BLE": p["z_BLE"] / s}
    assert rms_ratio(selective_scan(**scaled, z_scale_E=s)[0] * s, selective_scan(**p)[0]) < FORWARD[torch.float64]


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_int8_inputs_are_their_dequantized_values(name: str) -> None:
    p = {k: v.float() for k, v in scan_problem(2, 20, 18, 16).items()}
    names = {"u": "u_BLE", "dt": "dt_BLE", "B": "B_BLGN", "C": "C_BLGN", "z": "z_BLE"}
    scales = {"u": 0.03, "dt": torch.rand(18) * 0.02 + 0.01, "B": torch.tensor(0.02), "C": 0.025, "z": 0.04}
    q = {full: torch.clamp(torch.round(p[full] / scales[short]), -127, 127).to(torch.int8) for short,
         full in names.items()}
    with backend(name):
        y, final = selective_scan(**{**p, **q}, scales=ScanScales(**scales))
    floats = {full: q[full].float() * scales[short] for short, full in names.items()}
    want_y, want_final = selective_scan(**{**p, **floats})
    assert y.dtype == torch.float32
    assert rms_ratio(y, want_y) < 1e-6
    assert rms_ratio(final, want_final) < 1e-6


def test_errors_name_the_tensor() -> None:
    p = scan_problem(2, 5, 4, 3)
    with pytest.raises(ValueError, match=r"D has shape \(5,\), expected \(4,\)"):
        selective_scan(**{**p, "D_E": randn(5)})
    with pytest.raises(ValueError, match="divide into 3 groups"):
        selective_scan(**{**p, "B_BLGN": randn(2, 5, 3, 3), "C_BLGN": randn(2, 5, 3, 3)})
    with pytest.raises(ValueError, match="window must be at least 1"):
        selective_scan(**p, window=0)
    with pytest.raises(TypeError, match=r"u is int8 and has no scale; pass scales=ScanScales\(u=...\)"):
        selective_scan(**{**p, "u_BLE": p["u_BLE"].to(torch.int8)})


def test_an_empty_sequence_leaves_the_state() -> None:
    p = {k: v.float() for k, v in scan_problem(2, 5, 4, 3).items()}
    y, final = selective_scan(**cut(p, slice(0)))
    assert y.shape == (2, 0, 4)
    assert torch.equal(final, p["initial_state_BEN"])
