"""The depthwise convolutions in Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambacompress.kernels.causal_conv1d import causal_conv1d, same_conv1d
from tests.kernels.gpu.parity import FLOATS, assert_gradients, assert_same, both
from tests.kernels.scans import conv_problem, packed_ids


def problem(device: str, dtype: torch.dtype, *sizes: int) -> dict[str, Any]:
    return {name: t.to(device, dtype) for name, t in conv_problem(*sizes).items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("length", "channels", "width"), [(1, 40, 4), (3, 7, 4), (63, 70, 2), (257, 66, 3), (5, 8, 1)])
def test_causal(device: str, dtype: torch.dtype, length: int, channels: int, width: int) -> None:
    p = problem(device, dtype, 2, length, channels, width)
    assert_same(*both(causal_conv1d, **p), dtype)
    ids = packed_ids(2, length).to(device)
    assert_same(*both(causal_conv1d, p["x_BLE"], p["weight_EK"], act_scale_E=p["bias_E"], seq_idx_BL=ids), dtype)
    assert_same(*both(causal_conv1d, **p, seq_idx_BL=ids, activation=False), dtype)
    assert_same(*both(same_conv1d, p["x_BLE"], p["weight_EK"], p["bias_E"]), dtype)


@pytest.mark.parametrize("x_scale", [0.03, "channel"])
def test_int8(device: str, x_scale: Any) -> None:
    x = torch.randint(-127, 128, (2, 9, 40), dtype=torch.int8).to(device)
    weight = torch.randint(-127, 128, (40, 4), dtype=torch.int8).to(device)
    scale, bias = torch.rand(40).to(device) * 1e-2, torch.randn(40).to(device)
    x_scale = torch.rand(40).to(device) if x_scale == "channel" else x_scale
    state = x[:, :3].flip(1)
    options = {"x_scale": x_scale, "weight_scale_E": scale}
    assert_same(*both(causal_conv1d, x, weight, bias, initial_state=state, **options), torch.float32)
    assert_same(*both(same_conv1d, x, weight, bias, **options), torch.float32)
    assert_same(*both(causal_conv1d, x, weight.float(), None, x_scale=x_scale), torch.float32)


def test_inputs_that_are_part_of_a_wider_tensor(device: str) -> None:
    wide = torch.randn(2, 9, 100, device=device)
    assert_same(*both(causal_conv1d, wide[..., 30:70], torch.randn(40, 4, device=device)), torch.float32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "channels"), [(1, 7), (35, 70)])
def test_gradients(device: str, length: int, channels: int, packed: bool) -> None:
    leaves = problem(device, torch.float32, 2, length, channels, 4)
    options = {"seq_idx_BL": packed_ids(2, length).to(device)} if packed else {}
    assert_gradients(causal_conv1d, leaves, **options)
    leaves["act_scale_E"] = torch.randn(channels, device=device)
    assert_gradients(causal_conv1d, leaves, **options)
    del leaves["initial_state"]
    if not packed:
        assert_gradients(same_conv1d, leaves)
    assert_gradients(causal_conv1d, leaves, torch.bfloat16, **options)
    del leaves["act_scale_E"]
    assert_gradients(causal_conv1d, leaves, **options, activation=False)
