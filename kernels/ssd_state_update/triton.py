"""One decode step of Mamba-2 on a GPU, from an fp32 or an int8 state.

A program holds some rows p of one head's state, [P, N], N states side by side in memory; y is a sum over N inside a
warp.

Roofline at P = 64, N = 128: a head reads and writes 64 kB of fp32 state, or 16.5 kB of codes and scales; inputs are
1 kB. All of it is memory: batch 64, 24 heads in fp32 is 101 MB, 30 us on an H100 at 3.35 TB/s; int8 26 MB, 8 us.

Legend: B batch, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambacompress.kernels import gpu, native
from mambacompress.kernels.int8_state import Int8State
from mambacompress.kernels.tile_math import (
    LOG2E,
    dither,
    int8_state_codes,
    int8_state_scale,
    narrow,
    softplus,
    wide,
)

TILE = 4096  # states of a program of four warps


@triton.jit
def _update_kernel(
    p_state, p_scale, p_step, p_x, p_dt, p_A, p_B, p_C, p_D, p_bias, p_y, p_new, p_new_scale, heads, head_dim, groups,
    states, x_batch, dt_batch, B_batch, C_batch, s_batch, s_head, s_row, s_state, dt_low, dt_high,
    SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    i_b, i_h = tl.program_id(2).to(tl.int64), tl.program_id(1)
    o_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_n = tl.arange(0, BLOCK_N)
    m_p, m_n = o_p < head_dim, o_n < states
    m_h = m_p[:, None] & m_n[None, :]
    o_row = (i_b * heads + i_h) * head_dim + o_p  # [P]
    o_old = i_b * s_batch + i_h * s_head + o_p[:, None] * s_row + o_n[None, :] * s_state
    b_h = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if p_state is not None:
        b_h = wide(tl.load(p_state + o_old, mask=m_h, other=0))  # [P, N]
        if p_scale is not None:
            b_h *= tl.load(p_scale + o_row, mask=m_p, other=0.0)[:, None]
    i_g = i_h // (heads // groups)
    b_x = wide(tl.load(p_x + i_b * x_batch + i_h * head_dim + o_p, mask=m_p, other=0))  # [P]
    b_B = wide(tl.load(p_B + i_b * B_batch + i_g * states + o_n, mask=m_n, other=0))  # [N]
    b_C = wide(tl.load(p_C + i_b * C_batch + i_g * states + o_n, mask=m_n, other=0))  # [N]
    dt = tl.load(p_dt + i_b * dt_batch + i_h).to(tl.float32)
    if p_bias is not None:
        dt += tl.load(p_bias + i_h)
    if SOFTPLUS:
        dt = softplus(dt)
    if LIMITED:
        dt = tl.minimum(tl.maximum(dt, dt_low), dt_high)
    b_h = b_h * tl.exp2(dt * tl.load(p_A + i_h) * LOG2E) + (b_x * dt)[:, None] * b_B[None, :]
    b_y = tl.sum(b_h * b_C[None, :], 1)  # [P]
    if p_D is not None:
        b_y += b_x * tl.load(p_D + i_h)
    tl.store(p_y + o_row, narrow(b_y, p_y), mask=m_p)
    o_new = o_row[:, None] * states + o_n[None, :]
    if p_new_scale is None:
        tl.store(p_new + o_new, b_h, mask=m_h)
    else:
        b_h = tl.where(m_h, b_h, 0.0)
        b_scale = int8_state_scale(b_h, 1)  # [P]
        b_dither = dither(tl.load(p_step + i_b), (i_h * head_dim + o_p)[:, None], o_n[None, :])
        tl.store(p_new + o_new, int8_state_codes(b_h * (1.0 / b_scale)[:, None], b_dither), mask=m_h)
        tl.store(p_new_scale + o_row, b_scale, mask=m_p)


def run_update(state: Tensor | None, scale: Tensor | None, step: Tensor | None, x: Tensor, dt: Tensor, A: Tensor,
               B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, softplus: bool, dt_low: float,
               dt_high: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y [B, 1, H, P], the new state or its codes, the new scale; empty for fp32).

    x: [B, 1, H, P]; dt: [B, 1, H]; B, C: [B, 1, G, N]. state: fp32, codes with ``scale`` and the ``step`` of the new
    state, or None for zeros. A, D, dt_bias: fp32, contiguous.
    """
    x, dt, B, C = map(native.dense_rows, (x, dt, B, C))
    batch, _, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    y, new, new_scale = outputs = _outputs(scale, x, B)
    block_n = triton.next_power_of_2(states)
    block_p = min(triton.next_power_of_2(head_dim), max(1, TILE // block_n))
    gpu.launch(
        _update_kernel, (triton.cdiv(head_dim, block_p), heads, batch), state,
        None if scale is None else scale.contiguous(), None if step is None else step.contiguous(), x, dt, A, B, C, D,
        dt_bias, y, new, None if scale is None else new_scale, heads, head_dim, groups, states, x.stride(0),
        dt.stride(0), B.stride(0), C.stride(0), *((0,) * 4 if state is None else state.stride()), dt_low, dt_high,
        SOFTPLUS=softplus, LIMITED=(dt_low, dt_high) != (0.0, float("inf")), BLOCK_P=block_p, BLOCK_N=block_n,
        num_warps=4)
    return outputs


def _outputs(scale: Tensor | None, x: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, head_dim = x.shape
    dtype = torch.float32 if scale is None else torch.int8
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),
            torch.empty(batch, heads, head_dim, B.shape[3], dtype=dtype, device=x.device),
            torch.empty((0,) if scale is None else scale.shape, dtype=torch.float32, device=x.device))


update_op = torch.library.custom_op("mambacompress::ssd_state_update_triton", run_update, mutates_args=())


@update_op.register_fake
def _(state: Tensor | None, scale: Tensor | None, step: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor,
      *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(scale, x, B)


def _fp32(x: Tensor | None) -> Any:
    return None if x is None else x.float().contiguous()


def update_int8_triton(
    state: Int8State, x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_H: Tensor | None,
    dt_bias_H: Tensor | None, *, dt_softplus: bool, dt_limit: tuple[float, float],
) -> tuple[Tensor, Int8State]:
    """``ssd_state_update_int8`` in Triton."""
    step_B = state.step + 1
    run: Any = run_update if native.runs_directly(x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, dt_bias_H) else update_op
    y, codes, scale = run(state.codes, state.scale, step_B, x_BHP[:, None], dt_BH[:, None], _fp32(A_H), B_BGN[:, None],
                          C_BGN[:, None], _fp32(D_H), _fp32(dt_bias_H), dt_softplus, *map(float, dt_limit))
    return y[:, 0], Int8State(codes, scale, step_B)


def offline_calls() -> None:
    """Every shipped variant, on meta tensors: see ``kernels.offline``."""
    one = torch.empty(24, device="meta")
    scale, step = torch.empty(2, 24, 64, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    for dtype in gpu.FLOATS:
        x, dt = (torch.empty(2, 1, 24, *rest, dtype=dtype, device="meta") for rest in ((64,), ()))
        B = x.new_empty(2, 1, 1, 128)
        state = torch.empty(2, 24, 64, 128, device="meta")
        for limits in ((0.0, float("inf")), (0.001, 0.1)):
            run_update(state, None, None, x, dt, one, B, B, one, one, True, *limits)
            run_update(state.to(torch.int8), scale, step, x, dt, one, B, B, one, one, True, *limits)


__all__ = ["offline_calls", "run_update", "update_int8_triton", "update_op"]
