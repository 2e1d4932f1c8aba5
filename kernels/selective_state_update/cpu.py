"""The native decode step of Mamba-1 with an int8 state: a torch.library op around the C function of cpu.cpp.

Where nothing is traced, the C function is called at once. The op has no gradients: rounding has none.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import native
from mambacompress.kernels.int8_state import Int8State, states_first
from mambacompress.kernels.selective_scan.cpu import _fp32, input_scales


class _Update(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "groups", "states", "softplus", "threads")),
        *((name, native.View) for name in ("u", "dt", "B", "C", "z", "y")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias", "z_scale", "codes", "scale", "step", "new_codes",
                                               "new_scale"))]


def run_update(
    codes: Tensor, scale: Tensor, step: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, z_scale: Tensor | None, u_scale: Tensor | None,
    dt_scale: Tensor | None, B_scale: Tensor | None, C_scale: Tensor | None, z_scale8: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [B, 1, E], new codes, new scale). u, dt, z: [B, 1, E]; B, C: [B, 1, G, N]; step: that of the new state.

    A, D, dt_bias, z_scale and the scales of int8 inputs: fp32, contiguous.
    """
    u, dt, B, C = map(native.dense_rows, (u, dt, B, C))
    z = None if z is None else native.dense_rows(z)
    codes, scale, step = states_first(codes), scale.contiguous(), step.contiguous()
    y, new_codes, new_scale = _outputs(codes, scale, u)
    problem = _Update(
        len(u), *u.shape[2:], *B.shape[2:], softplus, torch.get_num_threads(), native.view(u, scale=u_scale),
        native.view(dt, scale=dt_scale), native.view(B, scale=B_scale), native.view(C, scale=C_scale),
        native.view(z, scale=z_scale8), native.view(y), *map(native.pointer, (
            A, D, dt_bias, z_scale, codes, scale, step, new_codes, new_scale)))
    native.function("mc_update_int8", (ctypes.POINTER(_Update),))(ctypes.byref(problem))
    return y, new_codes, new_scale


def _outputs(codes: Tensor, scale: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, states = codes.shape
    return (torch.empty(u.shape, dtype=u.dtype if u.is_floating_point() else torch.float32, device=u.device),
            torch.empty(batch, states, channels, dtype=torch.int8, device=u.device).transpose(1, 2),
            torch.empty(scale.shape, dtype=torch.float32, device=u.device))


update_op = torch.library.custom_op(
    "mambacompress::selective_state_update_int8", run_update, mutates_args=(), device_types="cpu",
    schema="(Tensor codes, Tensor scale, Tensor step, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
           "Tensor? z, Tensor? dt_bias, Tensor? z_scale, Tensor? u_scale, Tensor? dt_scale, Tensor? B_scale, "
           "Tensor? C_scale, Tensor? z_scale8, bool softplus) -> (Tensor, Tensor, Tensor)")


@update_op.register_fake
def _(codes: Tensor, scale: Tensor, step: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(codes, scale, u)


def update_int8_cpu(
    state: Int8State, u_BE: Tensor, dt_BE: Tensor, A_EN: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_E: Tensor | None,
    z_BE: Tensor | None, dt_bias_E: Tensor | None, *, dt_softplus: bool, z_scale_E: Tensor | None, scales: Any,
) -> tuple[Tensor, Int8State]:
    """``selective_state_update_int8`` in native code."""
    step_B = state.step + 1
    direct = native.runs_directly(u_BE, dt_BE, A_EN, B_BGN, C_BGN, D_E, z_BE, dt_bias_E)
    run: Any = run_update if direct else update_op
    y, codes, scale = run(
        state.codes, state.scale, step_B, u_BE[:, None], dt_BE[:, None], _fp32(A_EN), B_BGN[:, None], C_BGN[:, None],
        _fp32(D_E), None if z_BE is None else z_BE[:, None], _fp32(dt_bias_E), _fp32(z_scale_E),
        *input_scales(scales, u_BE.shape[1:], B_BGN.shape[1:]), dt_softplus)
    return y[:, 0], Int8State(codes, scale, step_B)
