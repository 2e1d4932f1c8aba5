"""Native selective scan and convolution against their fp64 references: every instruction set, odd sizes, gradients,
threads."""

from __future__ import annotations

import pytest
import torch

from mambacompress.kernels.registry import backend, strict
from mambacompress.kernels.selective_scan import ScanScales, selective_scan, selective_scan_states
from mambacompress.kernels.tolerances import FORWARD, GRADIENT, rms_ratio
from tests.kernels.scans import (
    assert_close,
    at_level,
    available_levels,
    cast,
    nan_filled,
    needs_native,
    packed_ids,
    run,
    scan_problem,
    threads,
)

pytestmark = needs_native
SIZES = [(1, 1, 5, 16, 1), (2, 3, 17, 16, 1), (2, 63, 48, 5, 3), (1, 257, 34, 16, 2), (2, 33, 70, 24, 1)]
FP32 = ("A_EN", "D_E", "dt_bias_E", "initial_state_BEN", "z_scale_E")


def both(problem: dict[str, torch.Tensor], dtype: torch.dtype, **options: object) -> None:
    """Native in ``dtype`` against the reference in fp64, from the same rounded inputs."""
    rounded = cast(problem, dtype, FP32)
    with nan_filled(), strict(), backend("native"):
        result = run(selective_scan, rounded, **options)
    with backend("reference"):
        reference = run(selective_scan, {k: v.double() for k, v in rounded.items()}, **options)
    assert_close(result, reference, FORWARD[dtype], GRADIENT[dtype])


@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity_and_gradients(level: str, size: tuple[int, int, int, int, int]) -> None:
    with at_level(level):
        both(scan_problem(*size), torch.float32)


@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(level: str, dtype: torch.dtype) -> None:
    with at_level(level):
        both(scan_problem(2, 35, 21, 16), dtype)


@pytest.mark.parametrize("absent", [("z_BLE",), ("D_E",), ("dt_bias_E",), ("initial_state_BEN",),
                                    ("z_BLE", "D_E", "dt_bias_E", "initial_state_BEN")], ids=str)
def test_optional_inputs(absent: tuple[str, ...]) -> None:
    both({k: v for k, v in scan_problem(2, 20, 18, 16).items() if k not in absent}, torch.float32)


@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize("options", [{"reverse": True}, {"packed": True}, {"packed": True, "reverse": True},
                                     {"dt_softplus": False}, {"z_scale": True}], ids=str)
def test_options(level: str, options: dict[str, bool]) -> None:
    problem = scan_problem(2, 40, 19, 16)
    passed: dict[str, object] = {k: v for k, v in options.items() if k in ("reverse", "dt_softplus")}
    if not options.get("dt_softplus", True):
        problem["dt_BLE"] = problem["dt_BLE"].abs() + 0.5  # dt is then already a step size: positive
    if "packed" in options:
        passed["seq_idx_BL"] = packed_ids(2, 40)
    if "z_scale" in options:
        problem["z_scale_E"] = torch.rand(19, dtype=torch.float64) + 0.5
    with at_level(level):
        both(problem, torch.float32, **passed)


@pytest.mark.parametrize("window", [1, 4, 5, 16, 100])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_windows(window: int, packed: bool, reverse: bool) -> None:
    both(scan_problem(2, 40, 19, 16), torch.float32, window=window, reverse=reverse,
         seq_idx_BL=packed_ids(2, 40) if packed else None)


def test_views_of_larger_tensors_need_no_copy_and_give_the_same() -> None:
    """u and z are halves of one projection, dt, B and C slices of another, as in a mixer."""
    p = cast(scan_problem(2, 20, 18, 16), torch.float32)
    xz = torch.cat([p["u_BLE"], p["z_BLE"]], -1)
    rows = torch.cat([p["dt_BLE"], p["B_BLGN"].flatten(2), p["C_BLGN"].flatten(2)], -1)
    u, z = xz.chunk(2, -1)
    dt, B, C = rows.split([18, 16, 16], -1)
    B, C = (rows.unflatten(-1, (1, 16)) for rows in (B, C))
    views = {**p, "u_BLE": u, "z_BLE": z, "dt_BLE": dt, "B_BLGN": B, "C_BLGN": C}
    for a, b in zip(selective_scan(**views), selective_scan(**p), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("level", available_levels())
def test_one_and_two_threads_give_the_same_bits(level: str) -> None:
    problem = cast(scan_problem(3, 65, 530, 16), torch.float32)
    results = []
    for count in (1, 2):
        with at_level(level), threads(count), backend("native"):
            results.append(run(selective_scan, problem))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("level", available_levels())
def test_prefill_and_steps_give_the_same_bits_at_every_level(level: str) -> None:
    p = cast(scan_problem(2, 37, 21, 16), torch.float32)
    tokens = ("u_BLE", "dt_BLE", "B_BLGN", "C_BLGN", "z_BLE")
    with at_level(level), backend("native"):
        y, final = selective_scan(**p)
        state = p["initial_state_BEN"]
        for t in range(37):
            y_t, state = selective_scan(**{**{k: v[:, t:t + 1] if k in tokens else v for k, v in p.items()},
                                           "initial_state_BEN": state})
            assert torch.equal(y_t[:, 0], y[:, t])
    assert torch.equal(state, final)


def test_slow_and_instant_decay() -> None:
    """A state that hardly forgets over 4,000 tokens is as exact as fp32 torch keeps it; A = -inf forgets at once."""
    length = 4000
    problem = cast(scan_problem(1, length, 4, 16), torch.float32)
    problem["A_EN"] = torch.full((4, 16), -1e-3)
    problem["A_EN"][1] = -torch.inf
    problem["dt_BLE"] = torch.full((1, length, 4), 0.02)
    with backend("native"):
        y, _ = selective_scan(**problem, dt_softplus=False)
    with backend("reference"):
        same, _ = selective_scan(**problem, dt_softplus=False)
        want, _ = selective_scan(**{k: v.double() for k, v in problem.items()}, dt_softplus=False)
    assert rms_ratio(y, want) <= 2 * rms_ratio(same, want)
    assert rms_ratio(y[..., 1], want[..., 1]) < FORWARD[torch.float32]


@pytest.mark.parametrize("window", [None, 4])
def test_a_scale_without_a_gate_has_no_gradient_and_windows_pass_it_on(window: int | None) -> None:
    problem = {**scan_problem(2, 20, 18, 16), "z_scale_E": torch.rand(18, dtype=torch.float64) + 0.5}
    both(problem, torch.float32, window=window)
    del problem["z_BLE"]
    with strict(), backend("native"):
        assert "dz_scale_E" not in run(selective_scan, cast(problem, torch.float32), window=window)


@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"packed": True}], ids=str)
def test_states_on_request(level: str, size: tuple[int, int, int, int, int], options: dict[str, bool]) -> None:
    """Output and final state do not change by a bit; the states are the reference's, in the order of the tokens."""
    p = cast(scan_problem(*size), torch.float32)
    passed: dict[str, object] = {"reverse": "reverse" in options}
    if "packed" in options:
        passed["seq_idx_BL"] = packed_ids(size[0], size[1])
    with nan_filled(), strict(), backend("native"), at_level(level):
        y, final, states = selective_scan_states(**p, **passed)
        assert all(torch.equal(a, b) for a, b in zip((y, final), selective_scan(**p, **passed), strict=True))
    assert torch.equal(states[:, 0 if options.get("reverse") else -1], final)
    with backend("reference"):
        wanted = selective_scan_states(**{k: v.double() for k, v in p.items()}, **passed)[2]
    assert rms_ratio(states, wanted) < FORWARD[torch.float32]


def test_states_of_windows_and_their_gradients_are_the_references() -> None:
    p = scan_problem(2, 11, 6, 4)
    for window in (None, 3):
        y, _, states = selective_scan_states(**p, window=window)
        read = (states * p["C_BLGN"]).sum(-1) + p["D_E"] * p["u_BLE"]
        assert rms_ratio(read * torch.nn.functional.silu(p["z_BLE"]), y) < FORWARD[torch.float64]
    leaf = p["u_BLE"].float().requires_grad_()
    states = selective_scan_states(**{**cast(p, torch.float32), "u_BLE": leaf})[2]
    states.square().sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("level", available_levels())
def test_int8_inputs_have_the_gradients_of_what_they_stand_for(level: str) -> None:
    p = cast(scan_problem(2, 20, 18, 16), torch.float32)
    scales = {name: torch.rand(shape) * 0.02 for name, shape in (("u", 18), ("dt", 18), ("B", (1, 16)), ("C", (1, 16)),
                                                                 ("z", 18))}
    tensors = {"u": "u_BLE", "dt": "dt_BLE", "B": "B_BLGN", "C": "C_BLGN", "z": "z_BLE"}
    codes = {name: torch.randint(-127, 128, p[key].shape, dtype=torch.int8) for name, key in tensors.items()}
    learned = {name: p[name].requires_grad_() for name in ("A_EN", "D_E", "dt_bias_E", "initial_state_BEN")}
    with at_level(level), strict(), backend("native"):
        with torch.no_grad():
            plain, _ = selective_scan(**{**p, **{key: codes[name] for name, key in tensors.items()}},
                                      scales=ScanScales(**scales))
        y, _ = selective_scan(**{**p, **{key: codes[name] for name, key in tensors.items()}},
                              scales=ScanScales(**scales))
        same, _ = selective_scan(**{**p, **{key: codes[name] * scales[name] for name, key in tensors.items()}})
        gradients = torch.autograd.grad(y.sum(), list(learned.values()))
        wanted = torch.autograd.grad(same.sum(), list(learned.values()))
    assert torch.equal(y, plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


def test_nan_is_not_hidden() -> None:
    p = cast(scan_problem(1, 8, 16, 16), torch.float32)
    p["dt_BLE"][0, 3, 2] = torch.nan
    with backend("native"):
        y, final = selective_scan(**p)
    assert torch.isnan(y[0, 3:, 2]).all()
    assert torch.isnan(final[0, 2]).all()
    assert torch.isfinite(y[0, :, 3:]).all()
    assert torch.isfinite(y[0, :3]).all()


def test_the_custom_op_is_well_formed() -> None:
    from mambacompress.kernels.selective_scan.cpu import scan_op, states_op

    p = cast(scan_problem(2, 5, 6, 4), torch.float32)
    arguments = (p["u_BLE"], p["dt_BLE"], p["A_EN"], p["B_BLGN"], p["C_BLGN"], p["D_E"], p["z_BLE"], p["dt_bias_E"],
                 None,
                 p["initial_state_BEN"], None, None, None, None, None, None, True, False, True)
    torch.library.opcheck(scan_op, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(states_op, arguments[:-1], test_utils=("test_schema", "test_faketensor"))
