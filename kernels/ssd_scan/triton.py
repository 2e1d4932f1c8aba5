"""The scan of Mamba-2 on a GPU: chunks of tokens as products on tensor cores, states carried between them.

Three kernels, as in Mamba-2 (arXiv 2405.21060, sec. 6): every chunk's own state from zero; the states from chunk to
chunk; every chunk's output from the tokens before in it and from the state it starts with. Decays are always exp of a
difference <= 0, sums over tokens fp32. One token alone takes the decode step of ``ssd_state_update``.

Factors of products: bf16 inputs meet as bf16, weights rounded to it; fp16 as tf32, which has its precision and the
range that decays times steps need; fp32 as three products of tf32 (AMD: as fp32). The backward differentiates the
reference, whose chunks are matrix products of torch's own.

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
from mambacompress.kernels.ssd_scan.reference import ssd_scan_reference
from mambacompress.kernels.ssd_state_update.triton import run_update
from mambacompress.kernels.tile_math import LOG2E, factor, narrow, softplus, wide

CHUNK = 64
BLOCK_N = 64  # fp32, whose products take three times the registers, has half of both


@triton.jit
def _steps(p_dt, p_bias, i_b, i_h, o_t, length, dt_batch, dt_token, dt_low, dt_high, SOFTPLUS: tl.constexpr,
           LIMITED: tl.constexpr):
    """The step sizes of a chunk [Q], zero behind the end."""
    b_dt = wide(tl.load(p_dt + i_b * dt_batch + o_t * dt_token + i_h, mask=o_t < length, other=0.0))
    if p_bias is not None:
        b_dt += tl.load(p_bias + i_h)
    if SOFTPLUS:
        b_dt = softplus(b_dt)
    if LIMITED:
        b_dt = tl.minimum(tl.maximum(b_dt, dt_low), dt_high)
    return tl.where(o_t < length, b_dt, 0.0)


@triton.jit
def _chunk_kernel(
    p_x, p_dt, p_A, p_B, p_bias, p_ids, p_local, p_decay, length, heads, head_dim, groups, states, x_batch, x_token,
    dt_batch, dt_token, B_batch, B_token, dt_low, dt_high, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
    BF16: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    i_b, i_h, i_c = tl.program_id(2).to(tl.int64) // heads, tl.program_id(2) % heads, tl.program_id(1)
    i_g, chunks = i_h // (heads // groups), tl.num_programs(1)
    o_t = i_c.to(tl.int64) * Q + tl.arange(0, Q)
    o_p, o_n = tl.arange(0, BLOCK_P), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_t, m_p, m_n = o_t < length, o_p < head_dim, o_n < states
    b_dt = _steps(p_dt, p_bias, i_b, i_h, o_t, length, dt_batch, dt_token, dt_low, dt_high, SOFTPLUS, LIMITED)  # [Q]
    b_da = b_dt * tl.load(p_A + i_h) * LOG2E
    total = tl.sum(b_da)
    b_weight = tl.exp2(tl.cumsum(b_da, reverse=True) - b_da) * b_dt
    alive = 1.0
    if p_ids is not None:
        last = tl.load(p_ids + i_b * length + min(i_c * Q + Q, length) - 1)
        before = tl.load(p_ids + i_b * length + i_c * Q - 1, mask=i_c > 0, other=0)
        b_weight = tl.where(tl.load(p_ids + i_b * length + o_t, mask=m_t, other=-1) == last, b_weight, 0.0)
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
def _carry_kernel(p_local, p_decay, p_initial, p_final, chunks, heads, size, BLOCK: tl.constexpr):
    """Replace every chunk's own state [B, chunks, H, P N] by the one it starts with."""
    i_b, i_h = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1) % heads
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_h = tl.zeros([BLOCK], tl.float32)
    if p_initial is not None:
        b_h = tl.load(p_initial + (i_b * heads + i_h) * size + o, mask=m, other=0.0)
    for c in range(0, chunks):
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
    b_dt = _steps(p_dt, p_bias, i_b, i_h, o_t, length, dt_batch, dt_token, dt_low, dt_high, SOFTPLUS, LIMITED)  # [Q]
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
    y, final = _outputs(x, B)
    half = 2 if x.dtype == torch.float32 else 1
    chunk, block_n = CHUNK // half, min(BLOCK_N // half, max(16, triton.next_power_of_2(states)))
    chunks = triton.cdiv(length, chunk)
    local = torch.empty(batch, chunks, heads, head_dim, states, device=x.device)
    decay = torch.empty(batch, chunks, heads, device=x.device)
    precise = "ieee" if gpu.amd() else "tf32x3"
    shared: dict[str, Any] = {
        "SOFTPLUS": softplus, "LIMITED": (dt_low, dt_high) != (0.0, float("inf")), "BF16": x.dtype == torch.bfloat16,
        "PRECISION": "tf32" if x.dtype == torch.float16 and not gpu.amd() else precise, "Q": chunk,
        "BLOCK_P": max(16, triton.next_power_of_2(head_dim)), "BLOCK_N": block_n, "num_stages": 1,
        "num_warps": 4}
    sizes = (length, heads, head_dim, groups, states, x.stride(0), x.stride(1), dt.stride(0), dt.stride(1),
             B.stride(0), B.stride(1))
    gpu.launch(_chunk_kernel, (triton.cdiv(states, block_n), chunks, batch * heads), x, dt, A, B, dt_bias, ids, local,
               decay, *sizes, dt_low, dt_high, **shared)
    gpu.launch(_carry_kernel, (triton.cdiv(head_dim * states, 512), batch * heads), local, decay, initial, final,
               chunks, heads, head_dim * states, BLOCK=512, num_warps=4)
    gpu.launch(_output_kernel, (chunks, batch * heads), x, dt, A, B, C, D, dt_bias, ids, local, y, *sizes, C.stride(0),
               C.stride(1), dt_low, dt_high, **shared)
    return y, final


def _outputs(x: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, heads, head_dim = x.shape
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),
            torch.empty(batch, heads, head_dim, B.shape[3], dtype=torch.float32, device=x.device))


scan_op = torch.library.custom_op("mambacompress::ssd_scan_triton", run_forward, mutates_args=())


@scan_op.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _outputs(x, B)


def run_backward(dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                 D: Tensor | None, dt_bias: Tensor | None, initial: Tensor | None, ids: Tensor | None, softplus: bool,
                 dt_low: float, dt_high: float) -> tuple[Tensor, ...]:
    """Gradients of the reference, which autograd finds; empty where there is no such input."""
    leaves: list[Any] = [None if t is None else t.detach().requires_grad_()
                         for t in (x, dt, A, B, C, D, dt_bias, initial)]
    with torch.enable_grad():
        outputs = ssd_scan_reference(*leaves[:7], dt_softplus=softplus, dt_limit=(dt_low, dt_high), chunk_size=CHUNK,
                                     initial_state_BHPN=leaves[7], seq_idx_BL=ids)
        found = iter(torch.autograd.grad(outputs, [t for t in leaves if t is not None],
                                         [dy, torch.zeros_like(outputs[1]) if dfinal is None else dfinal]))
    return tuple(x.new_empty(0) if t is None else next(found) for t in leaves)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softplus, ctx.dt_low, ctx.dt_high = inputs
    ctx.save_for_backward(*tensors)


def _propagate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    gradients = run_backward(dy, dfinal, *tensors, ctx.softplus, ctx.dt_low, ctx.dt_high)
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


def offline_calls() -> None:
    """Every shipped variant, on meta tensors: see ``kernels.offline``."""
    one = torch.empty(24, device="meta")
    ids = torch.empty(2, 512, dtype=torch.int32, device="meta")
    for dtype in gpu.FLOATS:
        x, dt = (torch.empty(2, 512, 24, *rest, dtype=dtype, device="meta") for rest in ((64,), ()))
        B, state = x.new_empty(2, 512, 1, 128), torch.empty(2, 24, 64, 128, device="meta")
        run_forward(x, dt, one, B, B, one, one, state, None, True, 0.0, float("inf"))
        run_forward(x, dt, one, B, B, None, one, None, ids, True, 0.001, 0.1)


__all__ = ["offline_calls", "ssd_scan_triton"]
