"""The selective scan in Triton: every variant, from any state, in chunks, backward; and its polynomial exponential."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambacompress.kernels import registry
from mambacompress.kernels.selective_scan import ScanScales, selective_scan
from tests.kernels.gpu.elementwise import run_exp2_polynomial
from tests.kernels.gpu.parity import FLOATS, assert_gradients, assert_same, both
from tests.kernels.scans import packed_ids, scan_problem


def problem(device: str, dtype: torch.dtype, *sizes: int, **more: int) -> dict[str, Any]:
    return {name: t.to(device, dtype) for name, t in scan_problem(*sizes, **more).items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("length", "channels", "states", "groups"), [(1, 40, 16, 1), (3, 7, 5, 1), (19, 24, 8, 2)])
def test_forward(device: str, dtype: torch.dtype, length: int, channels: int, states: int, groups: int) -> None:
    p = problem(device, dtype, 2, length, channels, states, groups=groups)
    assert_same(*both(selective_scan, **p), dtype)
    for name in ("D_E", "z_BLE", "dt_bias_E", "initial_state_BEN"):
        del p[name]
    p["dt_BLE"] = p["dt_BLE"].abs()  # without softplus: a negative step grows
    assert_same(*both(selective_scan, **p, dt_softplus=False, reverse=True), dtype)


def test_long_sequences_in_chunks(device: str) -> None:
    """257 tokens of few channels are cut into chunks; packed sequences end inside them."""
    p = problem(device, torch.float32, 1, 257, 7, 16)
    assert_same(*both(selective_scan, **p), torch.float32)
    ids = packed_ids(1, 257).to(device)
    assert_same(*both(selective_scan, **p, seq_idx_BL=ids, reverse=True), torch.float32)


def test_packed_sequences_gate_scale_and_slices(device: str) -> None:
    p = problem(device, torch.float32, 2, 63, 20, 4)
    wide = torch.randn(2, 63, 50, device=device)
    p |= {"u_BLE": wide[..., 3:23], "z_BLE": wide[..., 30:]}
    options = {"seq_idx_BL": packed_ids(2, 63).to(device), "z_scale_E": torch.rand(20, device=device) + 0.5}
    assert_same(*both(selective_scan, **p, **options), torch.float32)


@pytest.mark.parametrize("window", [1, 5, 40])
def test_windows(device: str, window: int) -> None:
    p = problem(device, torch.float32, 1, 21, 12, 4)
    assert_same(*both(selective_scan, **p, window=window), torch.float32)


@pytest.mark.parametrize("whole", [False, True])
def test_int8_inputs(device: str, whole: bool) -> None:
    """Scales a channel or state, and one for all."""
    p = problem(device, torch.float32, 2, 9, 24, 8, groups=2)
    names = {"u": "u_BLE", "dt": "dt_BLE", "B": "B_BLGN", "C": "C_BLGN", "z": "z_BLE"}
    p |= {name: torch.randint(-127, 128, p[name].shape, dtype=torch.int8).to(device) for name in names.values()}
    sizes = {"u": (24,), "dt": (24,), "B": (2, 8), "C": (8,), "z": (24,)}
    scales = ScanScales(**{name: 0.01 if whole else torch.rand(shape).to(device) * 0.02
                           for name, shape in sizes.items()})
    assert_same(*both(selective_scan, **p, scales=scales), torch.float32)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "channels", "states", "groups"), [(1, 7, 5, 1), (37, 24, 8, 2)])
def test_gradients(device: str, length: int, channels: int, states: int, groups: int, reverse: bool) -> None:
    leaves = problem(device, torch.float32, 2, length, channels, states, groups=groups)
    leaves["z_scale_E"] = torch.rand(channels, device=device) + 0.5
    ids = packed_ids(2, length).to(device)
    assert_gradients(selective_scan, leaves, reverse=reverse, seq_idx_BL=ids if reverse else None)


def test_gradients_of_the_bare_recurrence_and_in_bf16(device: str) -> None:
    leaves = problem(device, torch.float32, 1, 18, 6, 4)
    for name in ("D_E", "z_BLE", "dt_bias_E", "initial_state_BEN"):
        del leaves[name]
    assert_gradients(selective_scan, leaves, dt_softplus=False)
    assert_gradients(selective_scan, leaves, torch.bfloat16)


@pytest.mark.parametrize(("length", "reverse"), [(257, False), (75, True)])
def test_gradients_across_chunks(device: str, length: int, reverse: bool) -> None:
    ids = packed_ids(1, length).to(device)
    assert_gradients(selective_scan, problem(device, torch.float32, 1, length, 3, 4), reverse=reverse,
                     seq_idx_BL=ids if reverse else None)


def test_prefill_and_decode_agree(device: str) -> None:
    p = problem(device, torch.float32, 1, 6, 12, 4)
    with registry.backend("triton"), torch.no_grad():
        whole, final = selective_scan(**p)
        state, parts = p.pop("initial_state_BEN"), []
        for t in range(6):
            step = {n: x[:, t:t + 1] if n.endswith(("BLE", "BLGN")) else x for n, x in p.items()}
            y, state = selective_scan(**step, initial_state_BEN=state)
            parts.append(y)
    assert_same([torch.cat(parts, 1), state], [whole, final], torch.float32)


def test_compiles_into_a_graph(device: str) -> None:
    p = problem(device, torch.float32, 1, 5, 12, 4)

    def block(u: torch.Tensor) -> torch.Tensor:
        y, final = selective_scan(**(p | {"u_BLE": u * 2}))
        return y.relu().sum() + final.sum()

    u = torch.randn(1, 5, 12, device=device, requires_grad=True)
    with registry.backend("triton"):
        expected = torch.autograd.grad(block(u), u)[0]
        got = torch.autograd.grad(torch.compile(block, backend="aot_eager", fullgraph=True)(u), u)[0]
    torch.testing.assert_close(got, expected)


def test_the_polynomial_exponential(device: str) -> None:
    """2^x to fp32's last places for every x <= 0, zero far below."""
    x = torch.cat([torch.linspace(-125.5, 0, 4093), torch.tensor([-1e4, -float("inf"), float("nan")])]).to(device)
    y = torch.empty_like(x)
    run_exp2_polynomial(x, y)
    exact = torch.exp2(x.double())
    assert float(((y[:-3] - exact[:-3]) / exact[:-3]).abs().max()) < 3e-7
    assert y[-3:-1].tolist() == [0.0, 0.0]
    assert y[-1].isnan()


def test_what_is_no_number_reaches_the_output(device: str) -> None:
    for name in ("u_BLE", "dt_BLE"):
        p = problem(device, torch.float32, 1, 6, 5, 4)
        p[name][0, 3, 2] = float("nan")
        (y, final), (want_y, want_final) = both(selective_scan, **p)
        assert torch.equal(y.isnan(), want_y.isnan())
        assert torch.equal(final.isnan(), want_final.isnan())
        assert y[0, 4, 2].isnan()
