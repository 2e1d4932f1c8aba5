"""Decode steps from int8 states in Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambacompress.kernels import registry
from mambacompress.kernels.int8_state import Int8State, quantize_state
from mambacompress.kernels.selective_scan import ScanScales
from mambacompress.kernels.selective_state_update import selective_state_update_int8
from mambacompress.kernels.ssd_state_update import ssd_state_update_int8
from tests.kernels.gpu.parity import FLOATS, assert_same, both
from tests.kernels.scans import scan_problem, ssd_problem


def first_tokens(problem: dict[str, Any], device: str, dtype: torch.dtype, state: str) -> tuple[Int8State, list[Any]]:
    """The state as int8, and the arguments of a step behind it, in their order."""
    h = problem.pop(state).float()
    steps = torch.tensor([5, 2**33 + 7])
    quantized = Int8State(*(t.to(device) for t in quantize_state(h, steps)))
    return quantized, [(x[:, 0] if "BL" in name else x).to(device, dtype) for name, x in problem.items()]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("channels", "states", "groups"), [(40, 16, 1), (7, 5, 1), (24, 8, 2)])
def test_selective(device: str, dtype: torch.dtype, channels: int, states: int, groups: int) -> None:
    problem = scan_problem(2, 1, channels, states, groups)
    state, arguments = first_tokens(problem, device, dtype, "initial_state_BEN")
    assert_same(*both(selective_state_update_int8, state, *arguments), dtype)
    assert_same(*both(selective_state_update_int8, state, *arguments[:5], dt_softplus=False), dtype)


def test_selective_with_int8_inputs(device: str) -> None:
    state, arguments = first_tokens(scan_problem(2, 1, 24, 8), device, torch.float32, "initial_state_BEN")
    for place in (0, 1, 3, 4, 6):
        arguments[place] = torch.randint(-127, 128, arguments[place].shape, dtype=torch.int8).to(device)
    scales = ScanScales(0.01, torch.rand(24).to(device) * 0.02, torch.rand(8).to(device) * 0.02, 0.02, 0.01)
    assert_same(*both(selective_state_update_int8, state, *arguments, scales=scales), torch.float32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("limits", [(0.0, float("inf")), (0.05, 0.2)])
def test_ssd(device: str, dtype: torch.dtype, limits: tuple[float, float]) -> None:
    state, arguments = first_tokens(ssd_problem(2, 1, 6, 7, 20, 2), device, dtype, "initial_state_BHPN")
    assert_same(*both(ssd_state_update_int8, state, *arguments, dt_limit=limits), dtype)


def test_a_state_that_is_no_number_stays_so(device: str) -> None:
    state, arguments = first_tokens(scan_problem(2, 1, 7, 4), device, torch.float32, "initial_state_BEN")
    state.scale[0, 3] = float("nan")
    arguments[0][1, 2] = float("inf")
    with registry.backend("triton"), torch.no_grad():
        _, new = selective_state_update_int8(state, *arguments)
    assert new.scale.isnan().nonzero().tolist() == [[0, 3], [1, 2]]
