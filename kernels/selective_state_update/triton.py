"""One decode step of Mamba-1 on a GPU from an int8 state; from an fp32 state ``selective_scan`` runs its one token.

A thread is a channel, as in the scan: codes are [B, N, E] in memory, so a row of them is one load, and the largest
state of a channel is found without words between threads.

Roofline at N = 16: a channel reads 16 codes, a scale and 3 inputs and writes 16 codes, a scale and y: 48 bytes in fp16
(fp32 states: 136), plus A (64, from L2 after the first row). Batch 64, 1536 channels: 4.7 MB, 1.4 us at an H100's
3.35 TB/s. At batch 1 the launch is longer than that by far: hence the CUDA graph of ``generate``.

Legend: B batch, E channels, G groups, N states.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambacompress.kernels import gpu, native
from mambacompress.kernels.int8_state import Int8State, states_first
from mambacompress.kernels.selective_scan.cpu import input_scales
from mambacompress.kernels.selective_scan.triton import channels_of, scale_of, vector_of
from mambacompress.kernels.tile_math import (
    LOG2E,
    dither,
    int8_state_codes,
    int8_state_scale,
    narrow,
    sigmoid,
    softplus,
    wide,
)

TILE = 512


@triton.jit(do_not_specialize=["nought"])
def _update_kernel(
    p_codes, p_scale, p_step, p_u, p_dt, p_A, p_B, p_C, p_D, p_z, p_bias, p_gate, p_su, p_sdt, p_sB, p_sC, p_sz, p_y,
    p_new_codes, p_new_scale, channels, per_group, states, u_batch, dt_batch, B_batch, C_batch, z_batch, nought,
    SOFTPLUS: tl.constexpr, STEP_U: tl.constexpr, STEP_DT: tl.constexpr, STEP_B: tl.constexpr, STEP_C: tl.constexpr,
    STEP_Z: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    i_g, o_e, m_e = channels_of(tl.program_id(0), per_group, BLOCK_E)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < states
    m_h = m_n[:, None] & m_e[None, :]
    o_A = o_n[:, None] * channels + o_e[None, :] + nought  # [N, E]
    o_h = i_b * states * channels + o_A
    b_A = tl.load(p_A + o_A, mask=m_h, other=0.0) * LOG2E  # [N, E]
    b_scale = tl.load(p_scale + i_b * channels + o_e, mask=m_e, other=0.0)  # [E]
    b_h = wide(tl.load(p_codes + o_h, mask=m_h, other=0)) * b_scale[None, :]  # [N, E]
    b_u = wide(tl.load(p_u + i_b * u_batch + o_e, mask=m_e, other=0))  # [E]
    b_dt = wide(tl.load(p_dt + i_b * dt_batch + o_e, mask=m_e, other=0))  # [E]
    b_B = wide(tl.load(p_B + i_b * B_batch + i_g * states + o_n, mask=m_n, other=0))  # [N]
    b_C = wide(tl.load(p_C + i_b * C_batch + i_g * states + o_n, mask=m_n, other=0))  # [N]
    b_u *= scale_of(p_su, o_e, STEP_U, m_e)
    b_dt = b_dt * scale_of(p_sdt, o_e, STEP_DT, m_e) + vector_of(p_bias, o_e, m_e, 0.0)
    b_B *= scale_of(p_sB, i_g * states + o_n, STEP_B, m_n)
    b_C *= scale_of(p_sC, i_g * states + o_n, STEP_C, m_n)
    if SOFTPLUS:
        b_dt = softplus(b_dt)
    b_h = tl.exp2(b_dt[None, :] * b_A) * b_h + (b_dt * b_u)[None, :] * b_B[:, None]
    b_y = tl.sum(b_h * b_C[:, None], 0) + b_u * vector_of(p_D, o_e, m_e, 0.0)  # [E]
    if p_z is not None:
        b_z = wide(tl.load(p_z + i_b * z_batch + o_e, mask=m_e, other=0)) * scale_of(p_sz, o_e, STEP_Z, m_e)  # [E]
        b_y *= b_z * sigmoid(b_z * vector_of(p_gate, o_e, m_e, 1.0))
    tl.store(p_y + i_b * channels + o_e, narrow(b_y, p_y), mask=m_e)
    b_h = tl.where(m_h, b_h, 0.0)
    b_scale = int8_state_scale(b_h, 0)
    b_dither = dither(tl.load(p_step + i_b), o_e[None, :], o_n[:, None])  # [N, E]
    tl.store(p_new_codes + o_h, int8_state_codes(b_h * (1.0 / b_scale)[None, :], b_dither), mask=m_h)
    tl.store(p_new_scale + i_b * channels + o_e, b_scale, mask=m_e)


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
    codes = states_first(codes)
    batch, channels, states = codes.shape
    groups = B.shape[2]
    y, new_codes, new_scale = outputs = _outputs(codes, scale, u)
    block_n = triton.next_power_of_2(states)
    block_e = max(1, TILE // block_n)
    steps = [0 if s is None or s.numel() == 1 else 1 for s in (u_scale, dt_scale, B_scale, C_scale, z_scale8)]
    gpu.launch(
        _update_kernel, (groups * triton.cdiv(channels // groups, block_e), batch), codes, scale.contiguous(),
        step.contiguous(), u, dt, A.t().contiguous(), B, C, D, z, dt_bias, z_scale, u_scale, dt_scale, B_scale, C_scale,
        z_scale8, y, new_codes, new_scale, channels, channels // groups, states, u.stride(0), dt.stride(0), B.stride(0),
        C.stride(0), 0 if z is None else z.stride(0), 0, SOFTPLUS=softplus, STEP_U=steps[0], STEP_DT=steps[1],
        STEP_B=steps[2], STEP_C=steps[3], STEP_Z=steps[4], BLOCK_N=block_n, BLOCK_E=block_e, num_warps=1)
    return outputs


def _outputs(codes: Tensor, scale: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, states = codes.shape
    return (torch.empty(u.shape, dtype=u.dtype if u.is_floating_point() else torch.float32, device=u.device),
            torch.empty(batch, states, channels, dtype=torch.int8, device=u.device).transpose(1, 2),
            torch.empty(scale.shape, dtype=torch.float32, device=u.device))


update_op = torch.library.custom_op("mambacompress::selective_state_update_int8_triton", run_update, mutates_args=())


@update_op.register_fake
def _(codes: Tensor, scale: Tensor, step: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(codes, scale, u)


def _fp32(x: Tensor | None) -> Any:
    return None if x is None else x.float().contiguous()


def update_int8_triton(
    state: Int8State, u_BE: Tensor, dt_BE: Tensor, A_EN: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_E: Tensor | None,
    z_BE: Tensor | None, dt_bias_E: Tensor | None, *, dt_softplus: bool, z_scale_E: Tensor | None, scales: Any,
) -> tuple[Tensor, Int8State]:
    """``selective_state_update_int8`` in Triton."""
    step_B = state.step + 1
    direct = native.runs_directly(u_BE, dt_BE, A_EN, B_BGN, C_BGN, D_E, z_BE, dt_bias_E)
    run: Any = run_update if direct else update_op
    numbers = [None if s is None else s.to(u_BE.device) for s in input_scales(scales, u_BE.shape[1:], B_BGN.shape[1:])]
    y, codes, scale = run(
        state.codes, state.scale, step_B, u_BE[:, None], dt_BE[:, None], _fp32(A_EN), B_BGN[:, None], C_BGN[:, None],
        _fp32(D_E), None if z_BE is None else z_BE[:, None], _fp32(dt_bias_E), _fp32(z_scale_E), *numbers, dt_softplus)
    return y[:, 0], Int8State(codes, scale, step_B)


def offline_calls() -> None:
    """Every shipped variant, on meta tensors: see ``kernels.offline``."""
    one, A = torch.empty(1536, device="meta"), torch.empty(1536, 16, device="meta")
    codes = torch.empty(2, 16, 1536, dtype=torch.int8, device="meta").transpose(1, 2)
    scale, step = torch.empty(2, 1536, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    for dtype in gpu.DTYPES:
        u = torch.empty(2, 1, 1536, dtype=dtype, device="meta")
        B = u.new_empty(2, 1, 1, 16)
        scales: Any = (one, one, A[0], A[0], one) if dtype == torch.int8 else (None,) * 5
        run_update(codes, scale, step, u, u, A, B, B, one, u, one, one, *scales, True)


__all__ = ["offline_calls", "update_int8_triton"]
