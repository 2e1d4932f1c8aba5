"""The selective scan on a GPU, forward: a thread a channel, its states in registers, no words between threads.

A program holds a tile of states [N, E]: neighbouring threads are neighbouring channels, so that u, dt, z and y are
coalesced, B and C are the same for all threads, and C . h is a sum inside a thread. (``one`` is 1, but the compiler
must not know: of addresses it can vectorize it would make four states a thread's, and every sum a matter of shuffles
and shared memory.) Tokens come one after another. Where batch and channels alone do not fill the chip, the sequence is
cut into chunks: every chunk is scanned from zero for its final state and its decay exp(A sum dt); a small kernel
carries states from chunk to chunk; then every chunk is scanned from the state it starts with. int8 inputs are
multiplied by their scales (one, or one a channel or state) in registers. With ``EVERY`` the state is kept at every so
many tokens, for the backward (``triton_backward``).

Roofline, per token and channel at N = 16, fp16: 8 bytes (u, dt, z, y; B and C are shared by all channels), 5 with int8
inputs and no z; N exponentials, 2 more for softplus and 2 for the gate, and 4 N + 10 multiply-adds. An H100 has 16
special-function results and 128 FMA a clock and SM: 20 / 16 = 1.25 clocks of exponentials, 0.6 of the rest, and
8 B / (3350 / 132 / 1.7 = 14.9 B a clock and SM) = 0.54 of memory: the exponentials are the bound. ``POLYNOMIAL`` takes
one token in so many through nine FMA-pipe instructions an exponential instead: with one in four, 16 exponentials less
of 80 against 144 FMA more in 300. [1, 2048, 1536]: 3.1 M elements, 17 us by 1.25 clocks, twice that in chunks.

Legend: B batch, L tokens, E channels, G groups, N states.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambacompress.kernels import gpu, native
from mambacompress.kernels.tile_math import LOG2E, exp2_polynomial, narrow, sigmoid, softplus, wide

EVERY = 16  # tokens between two kept states
SHORTEST_CHUNK = 64
WARPS_TO_FILL = 1024  # of 32 channels each: fewer, and the sequence is cut


@triton.jit
def channels_of(program, per_group, BLOCK_E: tl.constexpr):
    """(group, channels [E], mask [E]) of a program along the channels; no program has channels of two groups."""
    blocks = tl.cdiv(per_group, BLOCK_E)
    i_g = program // blocks
    o_in = (program % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    return i_g, i_g * per_group + o_in, o_in < per_group


@triton.jit
def scale_of(p_scale, offsets, STEP: tl.constexpr, mask):
    """The scales of int8 inputs [...]: one for all where STEP is 0."""
    return tl.load(p_scale + offsets * STEP, mask=mask, other=0.0)


@triton.jit
def step_size(b_dt, p_bias, o_e, m_e, SOFTPLUS: tl.constexpr):
    """dt as the recurrence takes it, [E]."""
    if p_bias is not None:
        b_dt += tl.load(p_bias + o_e, mask=m_e, other=0.0)
    if SOFTPLUS:
        b_dt = softplus(b_dt)
    return b_dt


@gpu.tuned([({"TILE": 512, "POLYNOMIAL": 4}, 1, 1), ({"TILE": 512, "POLYNOMIAL": 0}, 1, 1),
            ({"TILE": 2048, "POLYNOMIAL": 4}, 4, 1)], key=["BLOCK_N", "channels", "LONG", "SUMMARY"])
@triton.jit(do_not_specialize=["one", "h_channel", "h_state"])
def _scan_kernel(
    p_u, p_dt, p_A, p_B, p_C, p_D, p_z, p_bias, p_gate, p_initial, p_resets, p_su, p_sdt, p_sB, p_sC, p_sz,
    p_y, p_final, p_decay, p_kept, length, chunk, channels, per_group, states,
    u_batch, u_token, dt_batch, dt_token, B_batch, B_token, C_batch, C_token, z_batch, z_token,
    h_batch, h_chunk, h_channel, h_state, one, LONG: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr, EVERY: tl.constexpr, STEP_U: tl.constexpr, STEP_DT: tl.constexpr, STEP_B: tl.constexpr,
    STEP_C: tl.constexpr, STEP_Z: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, POLYNOMIAL: tl.constexpr,
):
    BLOCK_E: tl.constexpr = TILE // BLOCK_N
    UNROLL: tl.constexpr = 4 if POLYNOMIAL else 1
    i_b, i_c = tl.program_id(2).to(tl.int64), tl.program_id(1)
    i_g, o_e, m_e = channels_of(tl.program_id(0), per_group, BLOCK_E)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < states
    m_h = m_n[:, None] & m_e[None, :]
    o_h = o_n[:, None] * channels + o_e[None, :] * one  # [N, E]
    i_bc = i_b * tl.num_programs(1) + i_c
    b_A = tl.load(p_A + o_e[None, :] * states + o_n[:, None] * one, mask=m_h, other=0.0) * LOG2E  # [N, E]
    b_h = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    if p_initial is not None:
        b_h = tl.load(p_initial + i_b * h_batch + i_c * h_chunk + o_e[None, :] * h_channel + o_n[:, None] * h_state,
                      mask=m_h, other=0.0)
    b_sum = tl.zeros([BLOCK_E], tl.float32)  # of dt
    alive = 1.0
    for first in range(i_c * chunk, min((i_c + 1) * chunk, length), UNROLL):
        for j in tl.static_range(UNROLL):
            i = first + j
            t = tl.cast(i, tl.int64)
            if REVERSE:
                t = length - 1 - t
            m_t = m_e & (i < length)
            b_u = wide(tl.load(p_u + i_b * u_batch + t * u_token + o_e, mask=m_t, other=0))  # [E]
            b_dt = wide(tl.load(p_dt + i_b * dt_batch + t * dt_token + o_e, mask=m_t, other=0))  # [E]
            m_r = m_n & (i < length)
            b_B = wide(tl.load(p_B + i_b * B_batch + t * B_token + i_g * states + o_n, mask=m_r, other=0))  # [N]
            if p_su is not None:
                b_u *= scale_of(p_su, o_e, STEP_U, m_e)
            if p_sdt is not None:
                b_dt *= scale_of(p_sdt, o_e, STEP_DT, m_e)
            if p_sB is not None:
                b_B *= scale_of(p_sB, i_g * states + o_n, STEP_B, m_n)
            b_dt = tl.where(m_t, step_size(b_dt, p_bias, o_e, m_e, SOFTPLUS), 0.0)
            b_x = b_dt[None, :] * b_A
            b_a = exp2_polynomial(b_x) if POLYNOMIAL and j == 0 else tl.exp2(b_x)
            if p_resets is not None:
                goes_on = 1.0 - tl.load(p_resets + i_b * length + t, mask=i < length, other=0).to(tl.float32)
                b_a *= goes_on
                alive *= goes_on
            if EVERY and i % EVERY == 0:
                o_k = (i_b * tl.cdiv(length, EVERY) + i // EVERY) * states * channels
                tl.store(p_kept + o_k + o_h, b_h, mask=m_h & (i < length))
            b_h = b_a * b_h + (b_dt * b_u)[None, :] * b_B[:, None]
            if SUMMARY:
                b_sum += b_dt
            else:
                b_C = wide(tl.load(p_C + i_b * C_batch + t * C_token + i_g * states + o_n, mask=m_r, other=0))  # [N]
                if p_sC is not None:
                    b_C *= scale_of(p_sC, i_g * states + o_n, STEP_C, m_n)
                b_y = tl.sum(b_h * b_C[:, None], 0)
                if p_D is not None:
                    b_y += b_u * tl.load(p_D + o_e, mask=m_e, other=0.0)
                if p_z is not None:
                    b_z = wide(tl.load(p_z + i_b * z_batch + t * z_token + o_e, mask=m_t, other=0))  # [E]
                    if p_sz is not None:
                        b_z *= scale_of(p_sz, o_e, STEP_Z, m_e)
                    b_slope = b_z
                    if p_gate is not None:
                        b_slope = b_z * tl.load(p_gate + o_e, mask=m_e, other=0.0)
                    b_y *= b_z * sigmoid(b_slope)
                tl.store(p_y + (i_b * length + t) * channels + o_e, narrow(b_y, p_y), mask=m_t)
    if SUMMARY:
        tl.store(p_final + i_bc * states * channels + o_h, b_h, mask=m_h)
        tl.store(p_decay + i_bc * states * channels + o_h, tl.exp2(b_sum[None, :] * b_A) * alive, mask=m_h)
    elif i_c == tl.num_programs(1) - 1:
        tl.store(p_final + i_b * states * channels + o_h, b_h, mask=m_h)


@triton.jit
def carry_kernel(p_local, p_decay, p_initial, p_final, chunks, channels, states, h_batch, h_channel, h_state,
                 BLOCK: tl.constexpr):
    """Replace the final state of every chunk scanned from zero [B, chunks, N, E] by the state it starts with."""
    i_b = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [N E]
    m = o < states * channels
    b_h = tl.zeros([BLOCK], tl.float32)
    if p_initial is not None:
        b_h = tl.load(p_initial + i_b * h_batch + (o % channels) * h_channel + (o // channels) * h_state, mask=m,
                      other=0.0)
    for c in range(0, chunks):
        o_c = (i_b * chunks + c) * states * channels + o
        b_local = tl.load(p_local + o_c, mask=m, other=0.0)
        b_decay = tl.load(p_decay + o_c, mask=m, other=0.0)
        tl.store(p_local + o_c, b_h, mask=m)
        b_h = b_decay * b_h + b_local
    tl.store(p_final + i_b * states * channels + o, b_h, mask=m)


def chunk_length(batch: int, length: int, channels: int) -> int:
    """Tokens of a chunk: the whole sequence where batch and channels fill the chip, or where it is short."""
    warps = batch * triton.cdiv(channels, 32)
    chunks = min(WARPS_TO_FILL // warps, length // SHORTEST_CHUNK)
    if chunks < 4:  # every token is scanned twice: with fewer chunks little is gained
        return length
    return triton.cdiv(triton.cdiv(length, chunks), EVERY) * EVERY


def states_last(batch: int, channels: int, states: int, device: torch.device) -> Tensor:
    """Memory for states [B, E, N] in which neighbouring channels lie side by side."""
    return torch.empty(batch, states, channels, dtype=torch.float32, device=device).transpose(1, 2)


def _outputs(u: Tensor, A: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    states = A.shape[1]
    kept = (batch, triton.cdiv(length, EVERY), states, channels) if save else (0,)
    return (torch.empty(u.shape, dtype=u.dtype if u.is_floating_point() else torch.float32, device=u.device),
            states_last(batch, channels, states, u.device), torch.empty(kept, dtype=torch.float32, device=u.device))


def _step(scale: Tensor | None) -> int:
    return 0 if scale is None or scale.numel() == 1 else 1


def run_forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    z_scale: Tensor | None, initial: Tensor | None, resets: Tensor | None, u_scale: Tensor | None,
    dt_scale: Tensor | None, B_scale: Tensor | None, C_scale: Tensor | None, z_scale8: Tensor | None, softplus: bool,
    reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, kept states; empty unless ``save``).

    A, D, dt_bias, z_scale and scales: fp32, contiguous; initial: fp32.
    """
    u, dt, B, C = map(native.dense_rows, (u, dt, B, C))
    z = None if z is None else native.dense_rows(z)
    batch, length, channels = u.shape
    groups, states = B.shape[2:]
    y, final, kept = _outputs(u, A, save)
    chunk = chunk_length(batch, length, channels)
    chunks = triton.cdiv(length, chunk)
    per_group, block_n = channels // groups, triton.next_power_of_2(states)

    def scan(summary: bool, start: Tensor | None, strides: tuple[int, ...], final: Tensor,
             decay: Tensor | None) -> None:
        gpu.launch(
            _scan_kernel,
            lambda meta: (groups * triton.cdiv(per_group, meta["TILE"] // block_n), chunks, batch),
            u, dt, A, B, C, D, z, dt_bias, z_scale, start, resets, u_scale, dt_scale, B_scale, C_scale, z_scale8, y,
            final, decay, kept, length, chunk, channels, per_group, states, u.stride(0), u.stride(1), dt.stride(0),
            dt.stride(1), B.stride(0), B.stride(1), C.stride(0), C.stride(1), 0 if z is None else z.stride(0),
            0 if z is None else z.stride(1), *strides, 1, LONG=chunk > 1, SOFTPLUS=softplus, REVERSE=reverse,
            SUMMARY=summary, EVERY=EVERY if save and not summary else 0, STEP_U=_step(u_scale), STEP_DT=_step(dt_scale),
            STEP_B=_step(B_scale), STEP_C=_step(C_scale), STEP_Z=_step(z_scale8), BLOCK_N=block_n)

    h_batch, h_channel, h_state = (0, 0, 0) if initial is None else initial.stride()
    if chunks == 1:
        scan(False, initial, (h_batch, 0, h_channel, h_state), final, None)
        return y, final, kept
    local, decay = (torch.empty(batch, chunks, states, channels, device=u.device) for _ in range(2))
    scan(True, None, (0, 0, 0, 0), local, decay)
    gpu.launch(carry_kernel, (triton.cdiv(states * channels, 256), batch), local, decay, initial, final, chunks,
               channels, states, h_batch, h_channel, h_state, BLOCK=256)
    scan(False, local, (local.stride(0), local.stride(1), 1, channels), torch.empty_like(final), None)
    return y, final, kept


def offline_calls() -> None:
    """Every shipped variant, on meta tensors: see ``kernels.offline``."""
    from mambacompress.kernels.selective_scan.triton_backward import run_backward

    one, A = torch.empty(1536, device="meta"), torch.empty(1536, 16, device="meta")
    initial = states_last(2, 1536, 16, one.device)

    def inputs(dtype: torch.dtype, length: int) -> tuple[Any, ...]:
        u = torch.empty(2, length, 1536, dtype=dtype, device="meta")
        B = u.new_empty(2, length, 1, 16)
        return u, u, A, B, B, one, u, one

    for dtype, length in ((torch.float16, 1), (torch.float16, 4096), (torch.int8, 1), (torch.int8, 4096),
                          (torch.float32, 1)):
        scales: Any = (one, one, A[0], A[0], one) if dtype == torch.int8 else (None,) * 5
        run_forward(*inputs(dtype, length), None, initial, None, *scales, True, False, False)
    training = inputs(torch.bfloat16, 4096)
    _, _, kept = run_forward(*training, one, None, None, *(None,) * 5, True, True, True)
    run_backward(training[0], initial, kept, *training, one, initial, None, True, False)


__all__ = ["EVERY", "carry_kernel", "channels_of", "offline_calls", "run_forward", "states_last"]
