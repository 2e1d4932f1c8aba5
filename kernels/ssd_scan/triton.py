"""The scan of Mamba-2 on a GPU, forward: chunks of tokens as products on tensor cores, states carried between them.

Three kernels, as in Mamba-2 (arXiv 2405.21060, sec. 6): every chunk's own state from zero; the states from chunk to
chunk; every chunk's output from the tokens before in it and from the state it starts with. Decays are always exp of a
difference <= 0, sums over tokens fp32. One token alone takes the decode step of ``ssd_state_update``.

Factors of products: bf16 inputs meet as bf16, weights rounded to it; fp16 as tf32, which has its precision and the
range that decays times steps need; fp32 as three products of tf32 (AMD: as fp32). ``triton_backward`` takes the first
two kernels for the gradients of the states, from the last chunk to the first.

Roofline, per token and head at P = 64, N = 128, Q = 64: 4 P N + 2 Q (N + P) = 57 k operations, 2 (2 P + 1) bytes of x,
y and dt, and 4 P N 2 / Q = 1 kB of states. bf16 [8, 2048], 24 heads: 22.5 Gop, 23 us on an H100 at 990 Top/s; 0.5 GB,
150 us at 3.35 TB/s (the states; a part of them stays in L2): memory is the bound.

Legend: B batch, L tokens, H heads, P head_dim, G groups, N d_state, Q tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambacompress.kernels import gpu, native
from mambacompress.kernels.ssd_state_update.triton import run_update
from mambacompress.kernels.tile_math import LOG2E, clamp, factor, narrow, softplus, wide

CHUNK = 64
BLOCK_N = 64  # fp32, whose products take three times the registers, has half of both


@triton.jit
def raw_steps(p_dt, p_bias, i_b, i_h, o_t, length, dt_batch, dt_token):
    """dt + bias of a chunk [Q]."""
    b_dt = wide(tl.load(p_dt + i_b * dt_batch + o_t * dt_token + i_h, mask=o_t < length, other=0.0))
    if p_bias is not None:
        b_dt += tl.load(p_bias + i_h)
    return b_dt


@triton.jit
def steps(p_dt, p_bias, i_b, i_h, o_t, length, dt_batch, dt_token, dt_low, dt_high, SOFTPLUS: tl.constexpr,
          LIMITED: tl.constexpr):
    """The step sizes of a chunk [Q], zero behind the end."""
    b_dt = raw_steps(p_dt, p_bias, i_b, i_h, o_t, length, dt_batch, dt_token)
    if SOFTPLUS:
        b_dt = softplus(b_dt)
    if LIMITED:
        b_dt = clamp(b_dt, dt_low, dt_high)
    return tl.where(o_t < length, b_dt, 0.0)


@triton.jit
def _chunk_kernel(
    p_x, p_dt, p_A, p_B, p_bias, p_ids, p_local, p_decay, length, heads, head_dim, groups, states, x_batch, x_token,
    dt_batch, dt_token, B_batch, B_token, dt_low, dt_high, BACKWARD: tl.constexpr, SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr, BF16: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A chunk's own share of the state at its end; BACKWARD (x is dy, B is C): of the gradient of that at its start."""
    i_b, i_h, i_c = tl.program_id(2).to(tl.int64) // heads, tl.program_id(2) % heads, tl.program_id(1)
    i_g, chunks = i_h // (heads // groups), tl.num_programs(1)
    o_t = i_c.to(tl.int64) * Q + tl.arange(0, Q)
    o_p, o_n = tl.arange(0, BLOCK_P), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_t, m_p, m_n = o_t < length, o_p < head_dim, o_n < states
    b_dt = steps(p_dt, p_bias, i_b, i_h, o_t, length, dt_batch, dt_token, dt_low, dt_high, SOFTPLUS, LIMITED)  # [Q]
    b_da = b_dt * tl.load(p_A + i_h) * LOG2E
    total = tl.sum(b_da)
    b_weight = tl.exp2(tl.cumsum(b_da)) if BACKWARD else tl.exp2(tl.cumsum(b_da, reverse=True) - b_da) * b_dt
    alive = 1.0
    if p_ids is not None:
        last = tl.load(p_ids + i_b * length + min(i_c * Q + Q, length) - 1)
        before = tl.load(p_ids + i_b * length + i_c * Q - 1, mask=i_c > 0, other=0)
        b_ids = tl.load(p_ids + i_b * length + o_t, mask=m_t, other=-1)
        b_weight = tl.where(b_ids == (before if BACKWARD else last), b_weight, 0.0)
        alive = (last == before).to(tl.float32)
    b_x = wide(tl.load(p_x + i_b * x_batch + o_t[None, :] * x_token + i_h * head_dim + o_p[:, None],
                       mask=m_p[:, None] & m_t[None, :], other=0.0))  # [P, Q]
    b_B = wide(tl.load(p_B + i_b * B_batch + o_t[:, None] * B_token + i_g * states + o_n[None, :],
                       mask=m_t[:, None] & m_n[None, :], other=0.0))  # [Q, N]
    b_h = tl.dot(factor(b_x * b_weight[None, :], BF16), factor(b_B, BF16), input_precision=PRECISION)  # [P, N]
    i_bch = (i_b * chunks + i_c) * heads + i_h
    tl.store(p_local + (i_bch * head_dim + o_p[:, None]) * states + o_n[None, :], b_h, mask=m_p[:, None] & m_n[None, :])
    tl.store(p_decay + i_bch, tl.exp2(total) * alive)


@triton.jit
def _carry_kernel(p_local, p_decay, p_initial, p_final, chunks, heads, size, BACKWARD: tl.constexpr,
                  BLOCK: tl.constexpr):
    """Replace every chunk's own state [B, chunks, H, P N] by the one it starts with; BACKWARD: its gradient's share by
    the gradient of the state that the chunk ends with."""
    i_b, i_h = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1) % heads
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_h = tl.zeros([BLOCK], tl.float32)
    if p_initial is not None:
        b_h = tl.load(p_initial + (i_b * heads + i_h) * size + o, mask=m, other=0.0)
    for i in range(0, chunks):
        c = chunks - 1 - i if BACKWARD else i
        i_bch = (i_b * chunks + c) * heads + i_h
        b_local = tl.load(p_local + i_bch * size + o, mask=m, other=0.0)
        tl.store(p_local + i_bch * size + o, b_h, mask=m)
        b_h = b_h * tl.load(p_decay + i_bch) + b_local
    tl.store(p_final + (i_b * heads + i_h) * size + o, b_h, mask=m)


@triton.jit
def _output_kernel(
    p_x, p_dt, p_A, p_B, p_C, p_D, p_bias, p_ids, p_start, p_y, length, heads, head_dim, groups, states, x_batch,
    x_token, dt_batch, dt_token, B_batch, B_token, C_batch, C_token, dt_low, dt_high, SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr, BF16: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_b, i_h, i_c = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1) % heads, tl.program_id(0)
    i_g, chunks = i_h // (heads // groups), tl.num_programs(0)
    o_q, o_p = tl.arange(0, Q), tl.arange(0, BLOCK_P)
    o_t = i_c.to(tl.int64) * Q + o_q
    m_t, m_p = o_t < length, o_p < head_dim
    i_bch = (i_b * chunks + i_c) * heads + i_h
    b_read = tl.zeros([Q, BLOCK_P], tl.float32)  # of the state
    b_pairs = tl.zeros([Q, Q], tl.float32)  # C_i . B_j
    for first in range(0, states, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < states
        b_C = factor(wide(tl.load(p_C + i_b * C_batch + o_t[:, None] * C_token + i_g * states + o_n[None, :],
                                  mask=m_t[:, None] & m_n[None, :], other=0.0)), BF16)  # [Q, N]
        b_B = factor(wide(tl.load(p_B + i_b * B_batch + o_t[None, :] * B_token + i_g * states + o_n[:, None],
                                  mask=m_n[:, None] & m_t[None, :], other=0.0)), BF16)  # [N, Q]
        b_h = factor(tl.load(p_start + (i_bch * head_dim + o_p[None, :]) * states + o_n[:, None],
                             mask=m_n[:, None] & m_p[None, :], other=0.0), BF16)  # [N, P]
        b_pairs = tl.dot(b_C, b_B, b_pairs, input_precision=PRECISION)
        b_read = tl.dot(b_C, b_h, b_read, input_precision=PRECISION)
    b_dt = steps(p_dt, p_bias, i_b, i_h, o_t, length, dt_batch, dt_token, dt_low, dt_high, SOFTPLUS, LIMITED)  # [Q]
    b_sums = tl.cumsum(b_dt * tl.load(p_A + i_h) * LOG2E)
    m_pairs = o_q[:, None] >= o_q[None, :]
    b_from_state = tl.exp2(b_sums)
    if p_ids is not None:
        b_ids = tl.load(p_ids + i_b * length + o_t, mask=m_t, other=-1)
        before = tl.load(p_ids + i_b * length + i_c * Q - 1, mask=i_c > 0, other=0)
        m_pairs = m_pairs & (b_ids[:, None] == b_ids[None, :])
        b_from_state = tl.where(b_ids == before, b_from_state, 0.0)
    b_gap = tl.where(m_pairs, b_sums[:, None] - b_sums[None, :], float("-inf"))
    b_pairs = b_pairs * tl.exp2(b_gap) * b_dt[None, :]
    o_x = o_t[:, None] * x_token + i_h * head_dim + o_p[None, :]
    b_x = wide(tl.load(p_x + i_b * x_batch + o_x, mask=m_t[:, None] & m_p[None, :], other=0.0))  # [Q, P]
    b_y = tl.dot(factor(b_pairs, BF16), factor(b_x, BF16), b_read * b_from_state[:, None], input_precision=PRECISION)
    if p_D is not None:
        b_y += b_x * tl.load(p_D + i_h)
    o_y = ((i_b * length + o_t[:, None]) * heads + i_h) * head_dim + o_p[None, :]
    tl.store(p_y + o_y, narrow(b_y, p_y), mask=m_t[:, None] & m_p[None, :])


def run_forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
                initial: Tensor | None, ids: Tensor | None, softplus: bool, dt_low: float,
                dt_high: float) -> tuple[Tensor, Tensor]:
    """(y, final state). A, D, dt_bias, initial: fp32, contiguous; ids: int32 [B, L], that count the sequences."""
    x, dt, B, C = map(native.dense_rows, (x, dt, B, C))
    batch, length, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    if length == 1 and ids is None:
        y, final, _ = run_update(initial, None, None, x, dt, A, B, C, D, dt_bias, softplus, dt_low, dt_high)
        return y, final
    y, final = outputs(x, B)
    starts = chunk_states(x, dt, A, B, dt_bias, initial, ids, softplus, dt_low, dt_high, final)
    gpu.launch(_output_kernel, (starts.shape[1], batch * heads), x, dt, A, B, C, D, dt_bias, ids, starts, y, length,
               heads, head_dim, groups, states, *strides(x, dt, B, C), dt_low, dt_high,
               **constants(x, states, softplus, dt_low, dt_high))
    return y, final


def chunk_states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor | None, initial: Tensor | None,
                 ids: Tensor | None, softplus: bool, dt_low: float, dt_high: float, final: Tensor,
                 backward: bool = False) -> Tensor:
    """The states that chunks start with [B, chunks, H, P, N]; fills ``final``.

    backward, with dy, C and the gradient of the final state for x, B and ``initial``: the gradients of the states that
    chunks end with; fills ``final`` with that of the initial state.
    """
    batch, length, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    shared = constants(x, states, softplus, dt_low, dt_high)
    chunks = triton.cdiv(length, shared["Q"])
    local = torch.empty(batch, chunks, heads, head_dim, states, device=x.device)
    decay = torch.empty(batch, chunks, heads, device=x.device)
    gpu.launch(_chunk_kernel, (triton.cdiv(states, shared["BLOCK_N"]), chunks, batch * heads), x, dt, A, B, dt_bias,
               ids, local, decay, length, heads, head_dim, groups, states, *strides(x, dt, B), dt_low, dt_high,
               BACKWARD=backward, **shared)
    gpu.launch(_carry_kernel, (triton.cdiv(head_dim * states, 512), batch * heads), local, decay, initial, final,
               chunks, heads, head_dim * states, BACKWARD=backward, BLOCK=512, num_warps=4)
    return local


def constants(x: Tensor, states: int, softplus: bool, dt_low: float, dt_high: float) -> dict[str, Any]:
    """What all kernels of a scan are compiled for."""
    half = 2 if x.dtype == torch.float32 else 1
    precise = "ieee" if gpu.amd() else "tf32x3"
    return {"SOFTPLUS": softplus, "LIMITED": (dt_low, dt_high) != (0.0, float("inf")),
            "BF16": x.dtype == torch.bfloat16,
            "PRECISION": "tf32" if x.dtype == torch.float16 and not gpu.amd() else precise, "Q": CHUNK // half,
            "BLOCK_P": max(16, triton.next_power_of_2(x.shape[3])),
            "BLOCK_N": min(BLOCK_N // half, max(16, triton.next_power_of_2(states))), "num_stages": 1, "num_warps": 4}


def strides(*tensors: Tensor) -> list[int]:
    """Of batch and tokens, of one tensor after the other."""
    return [step for t in tensors for step in (t.stride(0), t.stride(1))]


def outputs(x: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for y and the final state."""
    batch, _, heads, head_dim = x.shape
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),
            torch.empty(batch, heads, head_dim, B.shape[3], dtype=torch.float32, device=x.device))


def offline_calls() -> None:
    """Every shipped variant, on meta tensors: see ``kernels.offline``."""
    from mambacompress.kernels.ssd_scan.triton_backward import run_backward

    one = torch.empty(24, device="meta")
    ids = torch.empty(2, 512, dtype=torch.int32, device="meta")
    for dtype in gpu.FLOATS:
        x, dt = (torch.empty(2, 512, 24, *rest, dtype=dtype, device="meta") for rest in ((64,), ()))
        B, state = x.new_empty(2, 512, 1, 128), torch.empty(2, 24, 64, 128, device="meta")
        run_forward(x, dt, one, B, B, one, one, state, None, True, 0.0, float("inf"))
        run_forward(x, dt, one, B, B, None, one, None, ids, True, 0.001, 0.1)
        run_backward(x, None, x, dt, one, B, B, one, one, state, None, True, 0.0, float("inf"))
        run_backward(x, state, x, dt, one, B, B, None, one, None, ids, True, 0.001, 0.1)


__all__ = ["chunk_states", "constants", "offline_calls", "outputs", "raw_steps", "run_forward", "steps", "strides"]
