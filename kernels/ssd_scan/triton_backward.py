"""The scan of Mamba-2 on a GPU, backward, as torch.library ops with fakes and autograd: chunks again.

The states that chunks start with are made once more, and the gradients of those they end with are carried from the last
chunk to the first, by the kernels of the forward. Then, a program a chunk and head: gradients of x and of the step
sizes; a program a chunk, group and block of states: those of B and C, summed over the group's heads in registers. Sums
over chunks and batches (of A, D, the bias) are torch's: no atomics, the same bits every time.

With s the running sum of dt A in a chunk, a pair i > j reads z_ij = exp(s_i - s_j) (C_i . B_j) dt_j (dy_i . x_j). Its
gradient goes to all dt A between the two: a sum of z over rows and one over columns are taken of the same z, so that
what cancels does so to fp32; what reads the state at the start goes to the dt A before, what the state at the end reads
to those after. Factors of products are those of the forward.

Roofline, per token and head at P = 64, N = 128, Q = 64: 140 k operations (the forward's 57 k), 6 passes over x or dy,
over states and their gradients, 4 P N / Q = 0.5 kB each, 5 passes (made, carried, read twice). bf16 [8, 2048], 24
heads: 55 Gop, 56 us on an H100; 2.3 GB, 0.7 ms at 3.35 TB/s: memory is the bound, and the states are most of it.

Legend: B batch, L tokens, H heads, P head_dim, G groups, N d_state, Q tokens of a chunk; i reads, j is read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambacompress.kernels import gpu, native
from mambacompress.kernels.ssd_scan.cpu import INPUTS, gradients_like
from mambacompress.kernels.ssd_scan.triton import (
    chunk_states,
    constants,
    outputs,
    raw_steps,
    run_forward,
    steps,
    strides,
)
from mambacompress.kernels.tile_math import LOG2E, factor, narrow, sigmoid, softplus, wide

WARPS = 8  # three to five tiles of fp32 are summed at once: with four warps they do not fit the registers


@triton.jit
def _rows(p, row, o_r, o_c, m_r, m_c, BF16: tl.constexpr):
    """A tile [R, C] as a factor of products; p: of its first element, row: elements from row to row."""
    b = tl.load(p + o_r[:, None] * row + o_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0)
    return factor(wide(b), BF16)


@triton.jit
def _overlaps(p_x, x_token, p_dy, dy_token, m_t, head_dim, BF16: tl.constexpr, PRECISION: tl.constexpr,
              Q: tl.constexpr, BLOCK_P: tl.constexpr):
    """x_j . dy_i [Qj, Qi], a part of their channels at a time."""
    PART: tl.constexpr = min(32, BLOCK_P)
    o_q = tl.arange(0, Q)
    b_z = tl.zeros([Q, Q], tl.float32)
    for first in range(0, head_dim, PART):
        o_p = first + tl.arange(0, PART)
        b_x = _rows(p_x, x_token, o_q, o_p, m_t, o_p < head_dim, BF16)  # [Q, P]
        b_dy = _rows(p_dy, dy_token, o_q, o_p, m_t, o_p < head_dim, BF16)  # [Q, P]
        b_z = tl.dot(b_x, tl.trans(b_dy), b_z, input_precision=PRECISION)
    return b_z


@triton.jit
def _chunk_decays(p_ids, b_da, i_b, i_c, o_t, length, Q: tl.constexpr):
    """Of a chunk: exp(s_i - s_j) [Qj, Qi], from the start to every token [Q], from every token to the end [Q], and from
    start to end; zero where the state restarts between."""
    o_q = tl.arange(0, Q)
    b_sums, total = tl.cumsum(b_da), tl.sum(b_da)
    m_pairs = o_q[:, None] <= o_q[None, :]
    b_from_start, b_to_end, through = tl.exp2(b_sums), tl.exp2(tl.cumsum(b_da, reverse=True) - b_da), tl.exp2(total)
    if p_ids is not None:
        b_ids = tl.load(p_ids + i_b * length + o_t, mask=o_t < length, other=-1)
        last = tl.load(p_ids + i_b * length + min(i_c * Q + Q, length) - 1)
        before = tl.load(p_ids + i_b * length + i_c * Q - 1, mask=i_c > 0, other=0)
        m_pairs = m_pairs & (b_ids[:, None] == b_ids[None, :])
        b_from_start = tl.where(b_ids == before, b_from_start, 0.0)
        b_to_end = tl.where(b_ids == last, b_to_end, 0.0)
        through *= (last == before).to(tl.float32)
    b_pairs = tl.exp2(tl.where(m_pairs, b_sums[None, :] - b_sums[:, None], float("-inf")))
    return b_pairs, b_from_start, b_to_end, through


@triton.jit
def _input_kernel(
    p_dy, p_x, p_dt, p_A, p_B, p_C, p_D, p_bias, p_ids, p_start, p_dend, p_dx, p_ddt, p_steps, p_dA, p_dD, p_dbias,
    length, heads, head_dim, groups, states, dy_batch, dy_token, x_batch, x_token, dt_batch, dt_token, B_batch, B_token,
    C_batch, C_token, dt_low, dt_high, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, BF16: tl.constexpr,
    PRECISION: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    i_b, i_h, i_c = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1) % heads, tl.program_id(0)
    i_g, chunks = i_h // (heads // groups), tl.num_programs(0)
    o_q, o_p = tl.arange(0, Q), tl.arange(0, BLOCK_P)
    o_t = i_c.to(tl.int64) * Q + o_q
    m_t, m_p = o_t < length, o_p < head_dim
    i_bch = (i_b * chunks + i_c) * heads + i_h
    first_t = i_c.to(tl.int64) * Q
    p_x += i_b * x_batch + first_t * x_token + i_h * head_dim
    p_dy += i_b * dy_batch + first_t * dy_token + i_h * head_dim
    p_B += i_b * B_batch + first_t * B_token + i_g * states
    p_C += i_b * C_batch + first_t * C_token + i_g * states
    p_start += i_bch * head_dim * states
    p_dend += i_bch * head_dim * states
    b_read = tl.zeros([Q, BLOCK_P], tl.float32)  # of the state at the start
    for first in range(0, states, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        b_h = _rows(p_start, 1, o_n, o_p * states, o_n < states, m_p, BF16)  # [N, P]
        b_C = _rows(p_C, C_token, o_q, o_n, m_t, o_n < states, BF16)  # [Q, N]
        b_read = tl.dot(b_C, b_h, b_read, input_precision=PRECISION)
    b_read_dy = tl.sum(wide(_rows(p_dy, dy_token, o_q, o_p, m_t, m_p, BF16)) * b_read, 1)  # [Q]
    b_pairs = tl.zeros([Q, Q], tl.float32)  # B_j . C_i
    b_dr = tl.zeros([Q, BLOCK_P], tl.float32)  # of dt x, the state's share
    b_kept = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, states, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < states
        b_B = _rows(p_B, B_token, o_q, o_n, m_t, m_n, BF16)  # [Q, N]
        b_C = _rows(p_C, C_token, o_q, o_n, m_t, m_n, BF16)  # [Q, N]
        b_pairs = tl.dot(b_B, tl.trans(b_C), b_pairs, input_precision=PRECISION)
        o_h, m_h = o_p[None, :] * states + o_n[:, None], m_n[:, None] & m_p[None, :]
        b_dh = tl.load(p_dend + o_h, mask=m_h, other=0.0)  # [N, P]
        b_kept += tl.sum(tl.load(p_start + o_h, mask=m_h, other=0.0) * b_dh, 0)
        b_dr = tl.dot(b_B, factor(b_dh, BF16), b_dr, input_precision=PRECISION)
    b_z = _overlaps(p_x, x_token, p_dy, dy_token, m_t, head_dim, BF16, PRECISION, Q, BLOCK_P)
    b_dt = steps(p_dt, p_bias, i_b, i_h, o_t, length, dt_batch, dt_token, dt_low, dt_high, SOFTPLUS, LIMITED)  # [Q]
    tl.store(p_steps + (i_b * length + o_t) * heads + i_h, b_dt, mask=m_t)
    decay = tl.load(p_A + i_h)
    b_decays, b_from_start, b_to_end, through = _chunk_decays(p_ids, b_dt * decay * LOG2E, i_b, i_c, o_t, length, Q)
    b_x = _rows(p_x, x_token, o_q, o_p, m_t, m_p, BF16)  # [Q, P]
    b_dr *= b_to_end[:, None]
    b_end = tl.sum(wide(b_x) * b_dr, 1) * b_dt  # what the state at the end reads of every token
    b_ds = b_read_dy * b_from_start  # what every token reads of the state at the start
    b_pairs *= b_decays
    b_z = tl.where(o_q[:, None] < o_q[None, :], b_z * b_pairs * b_dt[:, None], 0.0)
    b_ds += tl.sum(b_z, 0) - tl.sum(b_z, 1)
    b_dda = tl.cumsum(b_ds, reverse=True) + tl.cumsum(b_end) - b_end + through * tl.sum(b_kept)
    b_dy = _rows(p_dy, dy_token, o_q, o_p, m_t, m_p, BF16)  # [Q, P]
    b_dr = tl.dot(factor(b_pairs, BF16), b_dy, b_dr, input_precision=PRECISION)
    b_ddt = tl.sum(wide(b_x) * b_dr, 1) + decay * b_dda
    b_dx = b_dr * b_dt[:, None]
    if p_D is not None:
        b_dx += wide(b_dy) * tl.load(p_D + i_h)
    p_dx += ((i_b * length + first_t) * heads + i_h) * head_dim
    tl.store(p_dx + o_q[:, None] * (heads * head_dim) + o_p[None, :], narrow(b_dx, p_dx),
             mask=m_t[:, None] & m_p[None, :])
    b_raw = raw_steps(p_dt, p_bias, i_b, i_h, o_t, length, dt_batch, dt_token)
    if LIMITED:
        b_step = softplus(b_raw) if SOFTPLUS else b_raw
        b_ddt = tl.where((b_step >= dt_low) & (b_step <= dt_high), b_ddt, 0.0)
    if SOFTPLUS:
        b_ddt *= sigmoid(b_raw)
    b_ddt = tl.where(m_t, b_ddt, 0.0)
    tl.store(p_ddt + (i_b * length + o_t) * heads + i_h, narrow(b_ddt, p_ddt), mask=m_t)
    tl.store(p_dA + i_bch, tl.sum(b_dt * b_dda))
    tl.store(p_dD + i_bch, tl.sum(tl.sum(wide(b_x) * wide(b_dy), 1)))
    tl.store(p_dbias + i_bch, tl.sum(b_ddt))


@triton.jit
def _group_kernel(
    p_dy, p_x, p_steps, p_A, p_B, p_C, p_ids, p_start, p_dend, p_dB, p_dC, length, heads, head_dim, groups, states,
    dy_batch, dy_token, x_batch, x_token, B_batch, B_token, C_batch, C_token, BF16: tl.constexpr,
    PRECISION: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    i_b, i_g, i_c = tl.program_id(2).to(tl.int64) // groups, tl.program_id(2) % groups, tl.program_id(1)
    per_group, chunks = heads // groups, tl.num_programs(1)
    o_q, o_p, o_n = tl.arange(0, Q), tl.arange(0, BLOCK_P), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_t = i_c.to(tl.int64) * Q
    m_t, m_p, m_n = first_t + o_q < length, o_p < head_dim, o_n < states
    p_x += i_b * x_batch + first_t * x_token
    p_dy += i_b * dy_batch + first_t * dy_token
    p_steps += (i_b * length + first_t) * heads
    p_B += i_b * B_batch + first_t * B_token + i_g * states
    p_C += i_b * C_batch + first_t * C_token + i_g * states
    first_h = (i_b * chunks + i_c) * heads * head_dim * states
    p_start += first_h
    p_dend += first_h
    b_dpairs = tl.zeros([Q, Q], tl.float32)  # of B_j . C_i
    for i_h in range(i_g * per_group, (i_g + 1) * per_group):
        b_z = _overlaps(p_x + i_h * head_dim, x_token, p_dy + i_h * head_dim, dy_token, m_t, head_dim, BF16, PRECISION,
                        Q, BLOCK_P)
        b_dt = tl.load(p_steps + o_q * heads + i_h, mask=m_t, other=0.0)  # [Q]
        b_da = b_dt * tl.load(p_A + i_h) * LOG2E
        b_decays, _, _, _ = _chunk_decays(p_ids, b_da, i_b, i_c, first_t + o_q, length, Q)
        b_dpairs += b_z * b_decays * b_dt[:, None]
    b_factors = factor(b_dpairs, BF16)
    b_C = _rows(p_C, C_token, o_q, o_n, m_t, m_n, BF16)  # [Q, N]
    b_dB = tl.dot(b_factors, b_C, input_precision=PRECISION)
    b_B = _rows(p_B, B_token, o_q, o_n, m_t, m_n, BF16)  # [Q, N]
    b_dC = tl.dot(tl.trans(b_factors), b_B, input_precision=PRECISION)
    for i_h in range(i_g * per_group, (i_g + 1) * per_group):
        b_dt = tl.load(p_steps + o_q * heads + i_h, mask=m_t, other=0.0)  # [Q]
        b_da = b_dt * tl.load(p_A + i_h) * LOG2E
        _, b_from_start, b_to_end, _ = _chunk_decays(p_ids, b_da, i_b, i_c, first_t + o_q, length, Q)
        o_h = i_h * head_dim * states
        b_x = wide(_rows(p_x + i_h * head_dim, x_token, o_q, o_p, m_t, m_p, BF16)) * (b_dt * b_to_end)[:, None]
        b_dh = _rows(p_dend + o_h, states, o_p, o_n, m_p, m_n, BF16)  # [P, N]
        b_dB = tl.dot(factor(b_x, BF16), b_dh, b_dB, input_precision=PRECISION)
        b_dy = wide(_rows(p_dy + i_h * head_dim, dy_token, o_q, o_p, m_t, m_p, BF16)) * b_from_start[:, None]
        b_h = _rows(p_start + o_h, states, o_p, o_n, m_p, m_n, BF16)  # [P, N]
        b_dC = tl.dot(factor(b_dy, BF16), b_h, b_dC, input_precision=PRECISION)
    first_out = ((i_b * length + first_t) * groups + i_g) * states
    o_out, m_out = first_out + o_q[:, None] * (groups * states) + o_n[None, :], m_t[:, None] & m_n[None, :]
    tl.store(p_dB + o_out, narrow(b_dB, p_dB), mask=m_out)
    tl.store(p_dC + o_out, narrow(b_dC, p_dC), mask=m_out)


def run_backward(dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                 D: Tensor | None, dt_bias: Tensor | None, initial: Tensor | None, ids: Tensor | None, softplus: bool,
                 dt_low: float, dt_high: float) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D, dt_bias and initial; empty where there is no such input."""
    dy, x, dt, B, C = map(native.dense_rows, (dy, x, dt, B, C))
    dfinal = None if dfinal is None else dfinal.contiguous()
    batch, length, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    _, final = outputs(x, B)
    dinitial = torch.empty_like(final)
    options = (ids, softplus, dt_low, dt_high)
    starts = chunk_states(x, dt, A, B, dt_bias, initial, *options, final)
    dends = chunk_states(dy, dt, A, C, dt_bias, dfinal, *options, dinitial, backward=True)
    dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
    dA, dD, dbias = torch.empty(3, batch, starts.shape[1], heads, device=x.device)
    taken = torch.empty(dt.shape, device=x.device)  # the step sizes, from the first kernel for the second
    sizes = (length, heads, head_dim, groups, states)
    shared = constants(x, states, softplus, dt_low, dt_high) | {"num_warps": WARPS}
    block_n = shared.pop("BLOCK_N")
    gpu.launch(_input_kernel, (starts.shape[1], batch * heads), dy, x, dt, A, B, C, D, dt_bias, ids, starts, dends, dx,
               ddt, taken, dA, dD, dbias, *sizes, *strides(dy, x, dt, B, C), dt_low, dt_high,
               BLOCK_N=min(32, block_n), **shared)
    del shared["SOFTPLUS"], shared["LIMITED"]
    block_n = 16 if x.dtype == torch.float32 else block_n
    gpu.launch(_group_kernel, (triton.cdiv(states, block_n), starts.shape[1], batch * groups), dy, x, taken, A, B, C,
               ids, starts, dends, dB, dC, *sizes, *strides(dy, x, B, C), BLOCK_N=block_n, **shared)
    nothing = [torch.empty(0, device=x.device) for _ in range(3)]
    return (dx, ddt, dA.sum((0, 1)), dB, dC, nothing[0] if D is None else dD.sum((0, 1)),
            nothing[1] if dt_bias is None else dbias.sum((0, 1)), nothing[2] if initial is None else dinitial)


scan_op = torch.library.custom_op("mambacompress::ssd_scan_triton", run_forward, mutates_args=())


@scan_op.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return outputs(x, B)


backward_op = torch.library.custom_op(
    "mambacompress::ssd_scan_triton_backward", run_backward, mutates_args=(),
    schema=f"(Tensor dy, Tensor? dfinal, {INPUTS}) -> ({', '.join(['Tensor'] * 8)})")


@backward_op.register_fake
def _(dy: Tensor, dfinal: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    return gradients_like(*inputs[:8])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softplus, ctx.dt_low, ctx.dt_high = inputs
    ctx.save_for_backward(*tensors)


def _propagate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    gradients = backward_op(dy, dfinal, *tensors, ctx.softplus, ctx.dt_low, ctx.dt_high)
    return (*(None if t is None else g for t, g in zip(tensors, gradients, strict=False)), *(None,) * 4)


scan_op.register_autograd(_propagate, setup_context=_save_for_backward)


def _fp32(x: Tensor | None) -> Any:
    return None if x is None else x.float().contiguous()


def ssd_scan_triton(x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, D_H: Tensor | None,
                    dt_bias_H: Tensor | None, *, dt_softplus: bool, dt_limit: tuple[float, float],
                    initial_state_BHPN: Tensor | None, resets_BL: Tensor | None) -> tuple[Tensor, Tensor]:
    """``ssd_scan``; resets_BL: bool, true where the state restarts."""
    direct = native.runs_directly(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, dt_bias_H, initial_state_BHPN)
    run: Any = run_forward if direct else scan_op
    ids_BL = None if resets_BL is None else resets_BL.cumsum(1).int()
    return run(x_BLHP, dt_BLH, _fp32(A_H), B_BLGN, C_BLGN, _fp32(D_H), _fp32(dt_bias_H), _fp32(initial_state_BHPN),
               ids_BL, dt_softplus, float(dt_limit[0]), float(dt_limit[1]))


__all__ = ["run_backward", "ssd_scan_triton"]
