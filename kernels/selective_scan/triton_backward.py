"""The selective scan on a GPU, backward, as torch.library ops with fakes and autograd.

From the last kept state to the first: a program scans its 16 tokens forward again and puts the state before each into
a scratch of its own (it stays in L2), then walks back over them with the gradient of the state in registers. Where
batch and channels alone do not fill the chip, the sequence is cut into chunks, as forward: every chunk is walked back
from a gradient of zero for what it hands to the one before and for its decay, the carry is the forward's, its chunks
counted from the end, and then every chunk begins with the gradient it is handed. Sums over channels (of B and C) are
written a block of channels, sums over batches (of A, D, the bias, the gate's scale) a batch and chunk, and added up by
torch: no atomics, the same bits every time.

Roofline at N = 16, fp16, per token and channel: 3 N exponentials (one forward again, one back, and N for the kept
states' own scan), 8 N + 40 multiply-adds, 12 bytes of inputs and gradients and 2 * 64 of scratch from L2: again the
exponentials bound it, 48 / 16 = 3 clocks an SM, [8, 2048, 1536] 25 M elements: 0.34 ms on an H100, a third more in
chunks. Far from it a token costs its latency, some 3 us of one warp: many short chunks are what helps then.

Legend: B batch, L tokens, E channels, G groups, N states.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambacompress.kernels import gpu, native
from mambacompress.kernels.selective_scan.cpu import input_scales
from mambacompress.kernels.selective_scan.triton import (
    CARRIED,
    EVERY,
    _outputs,
    by_states,
    carry_kernel,
    channels_of,
    run_forward,
    states_last,
    vector_of,
)
from mambacompress.kernels.tile_math import LN2, LOG2E, narrow, sigmoid, softplus, wide

TILE = 512  # states of a program: one warp, 16 a thread
SHORTEST_CHUNK = 2 * EVERY
PROGRAMS_TO_FILL = 2048


@triton.jit
def _brings(i, inside, p_u, p_dt, p_B, p_C, p_dy, p_z, p_resets, o_e, m_e, o_n, m_n, length, channels, u_token,
            dt_token, B_token, C_token, z_token, REVERSE: tl.constexpr):
    """What token i brings, as it lies in memory: u, dt, dy, z [E], B, C [N], whether the state goes on into it; of
    what has no pointer another of them.
    """
    t = tl.cast(i, tl.int64)
    if REVERSE:
        t = length - 1 - t
    m_t, m_r = m_e & inside, m_n & inside
    b_dt = tl.load(p_dt + t * dt_token + o_e, mask=m_t, other=0.0)
    b_u, b_dy, b_z = b_dt, b_dt, b_dt
    if p_u is not None:
        b_u = tl.load(p_u + t * u_token + o_e, mask=m_t, other=0.0)
    if p_dy is not None:
        b_dy = tl.load(p_dy + t * channels + o_e, mask=m_t, other=0.0)
    if p_z is not None:
        b_z = tl.load(p_z + t * z_token + o_e, mask=m_t, other=0.0)
    b_B = tl.zeros(o_n.shape, tl.float32)
    b_C = b_B
    if p_B is not None:
        b_B = tl.load(p_B + t * B_token + o_n, mask=m_r, other=0.0)
    if p_C is not None:
        b_C = tl.load(p_C + t * C_token + o_n, mask=m_r, other=0.0)
    goes_on = 1.0
    if p_resets is not None:
        goes_on = 1.0 - tl.load(p_resets + t, mask=inside, other=0).to(tl.float32)
    return b_u, b_dt, b_dy, b_z, b_B, b_C, goes_on


@triton.jit
def _dt_and_decay(b_dt, goes_on, inside, b_bias, m_e, b_A, SOFTPLUS: tl.constexpr):
    """dt before and after softplus [E], and exp(dt A), zero where the state restarts, [N, E]; A: times log2(e)."""
    b_pre = wide(b_dt) + b_bias
    b_dt = softplus(b_pre) if SOFTPLUS else b_pre
    b_dt = tl.where(m_e & inside, b_dt, 0.0)
    return b_pre, b_dt, tl.exp2(b_dt[None, :] * b_A) * goes_on


@triton.jit(do_not_specialize=["nought"])
def _handed_kernel(
    p_dy, p_dt, p_A, p_C, p_z, p_bias, p_gate, p_resets, p_local, p_decay, length, chunk, channels, per_group, states,
    dt_batch, dt_token, C_batch, C_token, z_batch, z_token, nought, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """What a chunk hands to the one before it, [N, E], given a gradient of zero by the one behind; its decay."""
    i_b, i_c = tl.program_id(2).to(tl.int64), tl.program_id(1)  # chunks from the end
    i_g, o_e, m_e = channels_of(tl.program_id(0), per_group, BLOCK_E)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < states
    m_h = m_n[:, None] & m_e[None, :]
    o_h = o_n[:, None] * channels + o_e[None, :] + nought  # [N, E]
    b_A = tl.load(p_A + o_h, mask=m_h, other=0.0) * LOG2E  # [N, E]
    b_bias, b_gate = vector_of(p_bias, o_e, m_e, 0.0), vector_of(p_gate, o_e, m_e, 1.0)
    p_dt += i_b * dt_batch
    p_C += i_b * C_batch + i_g * states
    p_dy += i_b * length * channels
    if p_z is not None:
        p_z += i_b * z_batch
    if p_resets is not None:
        p_resets += i_b * length
    b_dh = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    b_sum = tl.zeros([BLOCK_E], tl.float32)  # of dt
    alive = 1.0
    begin = (tl.num_programs(1) - 1 - i_c) * chunk
    last = min(begin + chunk, length) - 1
    next_u, next_dt, next_dy, next_z, next_B, next_C, next_on = _brings(
        last, last >= begin, None, p_dt, None, p_C, p_dy, p_z, p_resets, o_e, m_e, o_n, m_n, length, channels, 0,
        dt_token, 0, C_token, z_token, REVERSE)
    for back in range(0, last + 1 - begin):
        b_dt, b_dy, b_z, b_C, goes_on = next_dt, next_dy, next_z, wide(next_C), next_on
        i = last - 1 - back
        next_u, next_dt, next_dy, next_z, next_B, next_C, next_on = _brings(  # noqa: RUF059
            i, i >= begin, None, p_dt, None, p_C, p_dy, p_z, p_resets, o_e, m_e, o_n, m_n, length, channels, 0,
            dt_token, 0, C_token, z_token, REVERSE)
        _, b_dt, b_a = _dt_and_decay(b_dt, goes_on, True, b_bias, m_e, b_A, SOFTPLUS)
        b_dy = wide(b_dy)
        if p_z is not None:
            b_z = wide(b_z)
            b_dy = b_dy * b_z * sigmoid(b_z * b_gate)
        b_dh = b_a * (b_dh + b_C[:, None] * b_dy[None, :])
        b_sum += b_dt
        alive *= goes_on
    b_decay = tl.exp2(b_sum[None, :] * b_A) * alive
    o_mine = (i_b * tl.num_programs(1) + i_c) * states * channels + o_h
    tl.store(p_local + o_mine, b_dh, mask=m_h)
    tl.store(p_decay + o_mine, b_decay, mask=m_h)


@triton.jit(do_not_specialize=["nought"])
def _backward_kernel(
    p_dy, p_dnext, p_kept, p_scratch, p_u, p_dt, p_A, p_B, p_C, p_D, p_z, p_bias, p_gate, p_resets,
    p_du, p_ddt, p_dA, p_dB, p_dC, p_dD, p_dz, p_dbias, p_dgate, p_dinitial, length, chunk, channels, per_group, states,
    u_batch, u_token, dt_batch, dt_token, B_batch, B_token, C_batch, C_token, z_batch, z_token, nought,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, EVERY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):
    i_b, i_c = tl.program_id(2).to(tl.int64), tl.program_id(1)  # chunks from the end
    i_bc = i_b * tl.num_programs(1) + i_c
    i_g, o_e, m_e = channels_of(tl.program_id(0), per_group, BLOCK_E)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < states
    m_h = m_n[:, None] & m_e[None, :]
    o_h = o_n[:, None] * channels + o_e[None, :] + nought  # [N, E]
    blocks = tl.cdiv(per_group, BLOCK_E)
    groups = channels // per_group
    o_rows = (((tl.program_id(0) % blocks) * tl.num_programs(2) + i_b) * length * groups + i_g) * states + o_n  # [N]
    p_mine = (p_scratch + (i_bc * tl.num_programs(0) + tl.program_id(0)) * EVERY * BLOCK_N * BLOCK_E
              + o_n[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :] + nought)  # [N, E]
    b_A = tl.load(p_A + o_h, mask=m_h, other=0.0) * LOG2E  # [N, E]
    b_bias, b_D = vector_of(p_bias, o_e, m_e, 0.0), vector_of(p_D, o_e, m_e, 0.0)
    b_scale = vector_of(p_gate, o_e, m_e, 1.0)
    p_u += i_b * u_batch
    p_dt += i_b * dt_batch
    p_B += i_b * B_batch + i_g * states
    p_C += i_b * C_batch + i_g * states
    p_dy += i_b * length * channels
    if p_z is not None:
        p_z += i_b * z_batch
    if p_resets is not None:
        p_resets += i_b * length
    b_dh = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    if p_dnext is not None:
        b_dh = tl.load(p_dnext + i_bc * states * channels + o_h, mask=m_h, other=0.0)
    b_dA = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    b_dD = tl.zeros([BLOCK_E], tl.float32)
    b_dbias = tl.zeros([BLOCK_E], tl.float32)
    b_dgate = tl.zeros([BLOCK_E], tl.float32)
    begin = (tl.num_programs(1) - 1 - i_c) * chunk
    tiles = tl.cdiv(min(chunk, length - begin), EVERY)
    for back in range(0, tiles):
        first = begin + (tiles - 1 - back) * EVERY
        o_kept = (i_b * tl.cdiv(length, EVERY) + first // EVERY) * states * channels
        b_h = tl.load(p_kept + o_kept + o_h, mask=m_h, other=0.0)
        next_u, next_dt, next_dy, next_z, next_B, next_C, next_on = _brings(
            first, first < length, p_u, p_dt, p_B, None, None, None, p_resets, o_e, m_e, o_n, m_n, length, channels,
            u_token, dt_token, B_token, 0, 0, REVERSE)
        for j in range(0, EVERY):
            i = first + j
            b_u, b_dt, b_B, goes_on = wide(next_u), next_dt, wide(next_B), next_on
            next_u, next_dt, next_dy, next_z, next_B, next_C, next_on = _brings(
                i + 1, i + 1 < length, p_u, p_dt, p_B, None, None, None, p_resets, o_e, m_e, o_n, m_n, length, channels,
                u_token, dt_token, B_token, 0, 0, REVERSE)
            tl.store(p_mine + j * BLOCK_N * BLOCK_E, b_h)
            _, b_dt, b_a = _dt_and_decay(b_dt, goes_on, i < length, b_bias, m_e, b_A, SOFTPLUS)
            b_h = b_a * b_h + (b_dt * b_u)[None, :] * b_B[:, None]
        tl.debug_barrier()
        last = first + EVERY - 1
        next_u, next_dt, next_dy, next_z, next_B, next_C, next_on = _brings(
            last, last < length, p_u, p_dt, p_B, p_C, p_dy, p_z, p_resets, o_e, m_e, o_n, m_n, length, channels,
            u_token, dt_token, B_token, C_token, z_token, REVERSE)
        for k in range(0, EVERY):
            j = EVERY - 1 - k
            i = first + j
            t = tl.cast(i, tl.int64)
            if REVERSE:
                t = length - 1 - t
            m_t = m_e & (i < length)
            m_r = m_n & (i < length)
            b_before = tl.load(p_mine + j * BLOCK_N * BLOCK_E)  # [N, E]
            b_u, b_dt, b_dy, b_z = wide(next_u), next_dt, wide(next_dy), wide(next_z)
            b_B, b_C, goes_on = wide(next_B), wide(next_C), next_on
            next_u, next_dt, next_dy, next_z, next_B, next_C, next_on = _brings(
                i - 1, (j > 0) & (i - 1 < length), p_u, p_dt, p_B, p_C, p_dy, p_z, p_resets, o_e, m_e, o_n, m_n, length,
                channels, u_token, dt_token, B_token, C_token, z_token, REVERSE)
            b_pre, b_dt, b_a = _dt_and_decay(b_dt, goes_on, i < length, b_bias, m_e, b_A, SOFTPLUS)
            b_h = b_a * b_before + (b_dt * b_u)[None, :] * b_B[:, None]
            o_out = (i_b * length + t) * channels + o_e
            if p_z is not None:
                b_sigma = sigmoid(b_z * b_scale)
                b_slope = b_sigma * (1.0 - b_sigma) * b_z
                b_dgated = b_dy * (tl.sum(b_h * b_C[:, None], 0) + b_D * b_u)
                tl.store(p_dz + o_out, narrow(b_dgated * (b_sigma + b_scale * b_slope), p_dz), mask=m_t)
                b_dgate += b_dgated * b_slope * b_z
                b_dy = b_dy * b_z * b_sigma
            b_dD += b_dy * b_u
            tl.store(p_dC + o_rows + t * groups * states, tl.sum(b_h * b_dy[None, :], 1), mask=m_r)
            b_dh += b_C[:, None] * b_dy[None, :]
            tl.store(p_dB + o_rows + t * groups * states, tl.sum(b_dh * (b_dt * b_u)[None, :], 1), mask=m_r)
            b_from_input = tl.sum(b_dh * b_B[:, None], 0)  # [E]
            tl.store(p_du + o_out, narrow(b_from_input * b_dt + b_dy * b_D, p_du), mask=m_t)
            b_decayed = b_dh * b_a
            b_slow = b_decayed * b_before
            b_ddt = tl.sum(b_slow * b_A, 0) * LN2 + b_from_input * b_u
            if SOFTPLUS:
                b_ddt = b_ddt * sigmoid(b_pre)
            b_ddt = tl.where(m_t, b_ddt, 0.0)
            tl.store(p_ddt + o_out, narrow(b_ddt, p_ddt), mask=m_t)
            b_dbias += b_ddt
            b_dA += b_slow * b_dt[None, :]
            b_dh = b_decayed
        tl.debug_barrier()
    tl.store(p_dA + i_bc * states * channels + o_h, b_dA, mask=m_h)
    if i_c == tl.num_programs(1) - 1:
        tl.store(p_dinitial + i_b * states * channels + o_h, b_dh, mask=m_h)
    tl.store(p_dD + i_bc * channels + o_e, b_dD, mask=m_e)
    tl.store(p_dbias + i_bc * channels + o_e, b_dbias, mask=m_e)
    tl.store(p_dgate + i_bc * channels + o_e, b_dgate, mask=m_e)


def chunk_length(programs: int, length: int) -> int:
    """Tokens of a chunk, whole tiles; ``programs``: of one chunk."""
    chunks = min(triton.cdiv(PROGRAMS_TO_FILL, programs), length // SHORTEST_CHUNK)
    return triton.cdiv(triton.cdiv(length, max(1, chunks)), EVERY) * EVERY


def run_backward(
    dy: Tensor, dfinal: Tensor | None, kept: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, z_scale: Tensor | None, initial: Tensor | None,
    resets: Tensor | None, softplus: bool, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias, z_scale and initial; empty where there is no such input."""
    u, dt, B, C = map(native.dense_rows, (u, dt, B, C))
    z, dy = None if z is None else native.dense_rows(z), dy.contiguous()
    batch, length, channels = u.shape
    groups, states = B.shape[2:]
    per_group, block_n = channels // groups, triton.next_power_of_2(states)
    block_e = max(1, TILE // block_n)
    blocks = triton.cdiv(per_group, block_e)
    chunk = chunk_length(blocks * groups * batch, length)
    grid = (blocks * groups, triton.cdiv(length, chunk), batch)
    du, ddt = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (u, dt))
    dz = torch.empty((0,) if z is None else z.shape, dtype=u.dtype if z is None else z.dtype, device=u.device)
    dA = torch.empty(batch * grid[1], states, channels, device=u.device)
    dB, dC = (torch.empty(blocks, *B.shape, device=u.device) for _ in range(2))
    dD, dbias, dgate = (torch.empty(batch * grid[1], channels, device=u.device) for _ in range(3))
    dinitial = states_last(batch, channels, states, u.device)
    scratch = torch.empty(grid[0] * grid[1] * batch * EVERY * block_n * block_e, device=u.device)
    z_strides = (0, 0) if z is None else z.stride()[:2]
    A_NE, dnext = A.t().contiguous(), by_states(dfinal)
    if grid[1] > 1:
        local, decay = (torch.empty(batch, grid[1], states, channels, device=u.device) for _ in range(2))
        gpu.launch(_handed_kernel, grid, dy, dt, A_NE, C, z, dt_bias, z_scale, resets, local, decay, length, chunk,
                   channels, per_group, states, *dt.stride()[:2], *C.stride()[:2], *z_strides, 0, SOFTPLUS=softplus,
                   REVERSE=reverse, BLOCK_N=block_n, BLOCK_E=block_e, num_warps=1)
        gpu.launch(carry_kernel, (triton.cdiv(states * channels, CARRIED), batch), local, decay, dnext, dinitial,
                   grid[1], channels, states, BLOCK=CARRIED)
        dnext = local
    gpu.launch(
        _backward_kernel, grid, dy, dnext, kept, scratch, u, dt, A_NE, B, C, D, z, dt_bias, z_scale, resets, du, ddt,
        dA, dB, dC, dD, dz, dbias, dgate, dinitial, length, chunk, channels, per_group, states, *u.stride()[:2],
        *dt.stride()[:2], *B.stride()[:2], *C.stride()[:2], *z_strides, 0, SOFTPLUS=softplus, REVERSE=reverse,
        EVERY=EVERY, BLOCK_N=block_n, BLOCK_E=block_e, num_warps=1)
    nothing = [torch.empty(0, device=u.device) for _ in range(4)]
    return (du, ddt, dA.sum(0).t().contiguous(), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype),
            nothing[0] if D is None else dD.sum(0), dz, nothing[1] if dt_bias is None else dbias.sum(0),
            nothing[2] if z_scale is None or z is None else dgate.sum(0), nothing[3] if initial is None else dinitial)


scan_op = torch.library.custom_op("mambacompress::selective_scan_triton", run_forward, mutates_args=())


@scan_op.register_fake
def _(u: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(u, A, rest[-1])


backward_op = torch.library.custom_op("mambacompress::selective_scan_triton_backward", run_backward, mutates_args=())


@backward_op.register_fake
def _(dy: Tensor, dfinal: Tensor | None, kept: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
      D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, z_scale: Tensor | None, initial: Tensor | None,
      *rest: Any) -> tuple[Tensor, ...]:
    given = (u, dt, A, B, C, D, z, dt_bias, None if z is None else z_scale)
    last = u.new_empty(0) if initial is None else states_last(u.shape[0], *A.shape, u.device)
    return (*(u.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in given),
            last)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softplus, ctx.reverse, _ = inputs
    ctx.save_for_backward(output[2], *tensors[:11])


def _propagate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
    kept, *tensors = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    gradients = backward_op(dy, dfinal, kept, *tensors, ctx.softplus, ctx.reverse)
    inputs = [*tensors[:8], None if tensors[6] is None else tensors[8], tensors[9]]
    return (*(None if t is None else gradient for t, gradient in zip(inputs, gradients, strict=True)), *(None,) * 9)


scan_op.register_autograd(_propagate, setup_context=_save_for_backward)


def _fp32(x: Tensor | None) -> Any:
    return None if x is None else x.float().contiguous()


def selective_scan_triton(
    u_BLE: Tensor, dt_BLE: Tensor, A_EN: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, D_E: Tensor | None,
    z_BLE: Tensor | None, dt_bias_E: Tensor | None, *, dt_softplus: bool, z_scale_E: Tensor | None,
    initial_state_BEN: Tensor | None, reverse: bool, resets_BL: Tensor | None, scales: Any,
) -> tuple[Tensor, Tensor]:
    """``selective_scan``; resets_BL: bool, true where the state restarts, in the order of the scan."""
    direct = native.runs_directly(u_BLE, dt_BLE, A_EN, B_BLGN, C_BLGN, D_E, z_BLE, dt_bias_E, z_scale_E,
                                  initial_state_BEN)
    run: Any = run_forward if direct else scan_op
    numbers = [None if s is None else s.to(u_BLE.device)
               for s in input_scales(scales, u_BLE.shape[2:], B_BLGN.shape[2:])]
    y, final, _ = run(
        u_BLE, dt_BLE, _fp32(A_EN), B_BLGN, C_BLGN, _fp32(D_E), z_BLE, _fp32(dt_bias_E), _fp32(z_scale_E),
        None if initial_state_BEN is None else initial_state_BEN.float(), resets_BL, *numbers, dt_softplus, reverse,
        not direct)
    return y, final


__all__ = ["run_backward", "selective_scan_triton"]
