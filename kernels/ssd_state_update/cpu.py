"""The native decode step of Mamba-2 with an int8 state: a torch.library op around the C function of cpu.cpp.

Where nothing is traced, the C function is called at once. The op has no gradients: rounding has none.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import native
from mambacompress.kernels.int8_state import Int8State
from mambacompress.kernels.ssd_scan.cpu import _fp32


class _Update(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "head_dim", "groups", "states", "softplus", "threads")),
        *((name, native.View) for name in ("x", "dt", "B", "C", "y")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias", "codes", "scale", "step", "new_codes",
                                               "new_scale")),
        ("dt_low", ctypes.c_double), ("dt_high", ctypes.c_double)]


def run_update(codes: Tensor, scale: Tensor, step: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
               D: Tensor | None, dt_bias: Tensor | None, softplus: bool, dt_low: float,
               dt_high: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y [B, 1, H, P], new codes, new scale). x: [B, 1, H, P]; dt: [B, 1, H]; B, C: [B, 1, G, N]; step: that of the new
    state. A, D, dt_bias: fp32, contiguous."""
    x, dt, B, C = map(native.dense_rows, (x, dt, B, C))
    codes, scale, step = codes.contiguous(), scale.contiguous(), step.contiguous()
    y, new_codes, new_scale = outputs = _outputs(codes, scale, x)
    problem = _Update(
        len(x), *x.shape[2:], *B.shape[2:], softplus, torch.get_num_threads(), *map(native.view, (x, dt, B, C, y)),
        *map(native.pointer, (A, D, dt_bias, codes, scale, step, new_codes, new_scale)), dt_low, dt_high)
    native.function("mc_ssd_update_int8", (ctypes.POINTER(_Update),))(ctypes.byref(problem))
    return outputs


def _outputs(codes: Tensor, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),
            torch.empty(codes.shape, dtype=torch.int8, device=x.device),
            torch.empty(scale.shape, dtype=torch.float32, device=x.device))


update_op = torch.library.custom_op(
    "mambacompress::ssd_state_update_int8", run_update, mutates_args=(), device_types="cpu",
    schema="(Tensor codes, Tensor scale, Tensor step, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
           "Tensor? dt_bias, bool softplus, float dt_low, float dt_high) -> (Tensor, Tensor, Tensor)")


@update_op.register_fake
def _(codes: Tensor, scale: Tensor, step: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(codes, scale, x)


def update_int8_cpu(
    state: Int8State, x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_H: Tensor | None,
    dt_bias_H: Tensor | None, *, dt_softplus: bool, dt_limit: tuple[float, float],
) -> tuple[Tensor, Int8State]:
    """``ssd_state_update_int8`` in native code."""
    step_B = state.step + 1
    direct = native.runs_directly(x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, dt_bias_H)
    run: Any = run_update if direct else update_op
    y, codes, scale = run(state.codes, state.scale, step_B, x_BHP[:, None], dt_BH[:, None], _fp32(A_H), B_BGN[:, None],
                          C_BGN[:, None], _fp32(D_H), _fp32(dt_bias_H), dt_softplus, *map(float, dt_limit))
    return y[:, 0], Int8State(codes, scale, step_B)
