"""The Triton kernels as torch.library ops: schemas tell the truth, fakes have shapes and strides of the real thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambacompress.kernels import gpu
from mambacompress.kernels.int8_state import quantize_state
from mambacompress.kernels.rms_norm import _op as norm_op
from tests.kernels.scans import scan_problem, ssd_problem

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def _cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """(op, arguments) by name; imported late, as Triton is optional."""
    from mambacompress.kernels.causal_conv1d.triton import conv_op
    from mambacompress.kernels.selective_scan.triton_backward import backward_op, run_forward, scan_op
    from mambacompress.kernels.selective_state_update.triton import update_op
    from mambacompress.kernels.ssd_scan.triton_backward import backward_op as ssd_backward_op
    from mambacompress.kernels.ssd_scan.triton_backward import scan_op as ssd_op
    from mambacompress.kernels.ssd_state_update.triton import update_op as ssd_update_op

    device = "cpu" if gpu.interpreted() else "cuda"
    scan = [t.to(device, torch.float32) for t in scan_problem(2, 5, 6, 4).values()]
    u, dt, A, B, C, D, z, bias, initial = scan
    x, dt_H, A_H, B_H, C_H, D_H, bias_H, state_H = (t.to(device, torch.float32)
                                                    for t in ssd_problem(2, 5, 2, 4, 8, 1).values())
    inputs = (u, dt, A, B, C, D, z, bias, None, initial, None)
    ssd = (x, dt_H, A_H, B_H, C_H, D_H, bias_H, state_H)
    kept = run_forward(*inputs, *(None,) * 5, True, False, True)[2]
    small, state = quantize_state(initial), quantize_state(state_H)
    first = (u[:, :1], dt[:, :1], A, B[:, :1], C[:, :1], D, z[:, :1], bias, None)
    return {
        "rms_norm": (norm_op, (u, D, 1e-5, "triton")),
        "conv": (conv_op, (u, torch.randn(6, 4).to(device), D, None, None, None, None, True, 0)),
        "scan": (scan_op, (*inputs, *(None,) * 5, True, False, True)),
        "scan backward": (backward_op, (u, initial, kept, *inputs, True, False)),
        "ssd": (ssd_op, (*ssd, None, True, 0.0, 1e9)),
        "ssd backward": (ssd_backward_op, (x, state_H, *ssd, None, True, 0.0, 1e9)),
        "update": (update_op, (small.codes, small.scale, small.step, *first, *(None,) * 5, True)),
        "ssd update": (ssd_update_op, (state.codes, state.scale, state.step, x[:, :1], dt_H[:, :1], A_H, B_H[:, :1],
                                       C_H[:, :1], D_H, bias_H, True, 0.0, 1e9))}


@pytest.mark.parametrize("name", ["rms_norm", "conv", "scan", "scan backward", "ssd", "ssd backward", "update",
                                  "ssd update"])
def test_ops_are_well_formed(device: str, name: str) -> None:
    op, arguments = _cases()[name]
    torch.library.opcheck(op, arguments, test_utils=CHECKS)
