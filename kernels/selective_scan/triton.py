"""The selective scan on a GPU, forward: a thread a channel, its states in registers, no words between threads.

A program holds a tile of states [N, E]: neighbouring threads are neighbouring channels, so that u, dt, z and y are
coalesced, B and C are the same for all threads, and C . h is a sum inside a thread. A and states lie as [N, E] in
memory, and ``nought`` is 0, but the compiler must not know: of addresses that it knows to be aligned it would make
four channels a thread's, of such that lie side by side in neither direction (some versions of Triton) two channels a
warp's, and every sum a matter of shuffles and shared memory. Tokens come one after another, but what two of them
bring is asked for at once: the loads of one take several times its arithmetic to arrive. Where batch and channels
alone do not fill the chip, the sequence is cut into chunks: every chunk is scanned from zero for its final state and
its decay exp(A sum dt); a small kernel carries states from chunk to chunk; then every chunk is scanned from the state
it starts with. int8 inputs are multiplied by their scales (one, or one a channel or state) in registers. With
``EVERY`` the state is kept at every so many tokens, for the backward (``triton_backward``).

Roofline, per token and channel at N = 16, fp16: 8 bytes (u, dt, z, y; B and C are shared by all channels), 5 with int8
inputs and no z; N exponentials, 2 more for softplus and 2 for the gate, and 4 N + 10 multiply-adds. An H100 has 16
special-function results and 128 FMA a clock and SM: 20 / 16 = 1.25 clocks of exponentials, 0.6 of the rest, and
8 B / (3350 / 132 / 1.7 = 14.9 B a clock and SM) = 0.54 of memory: the exponentials are the bound. ``POLYNOMIAL`` takes
one token in two through some fifteen instructions of other pipes an exponential instead: of 40 special functions in
two tokens 24 are left (1.5 clocks, not 2.5), and 150 other instructions become 390 (3).
[1, 2048, 1536]: 3.1 M elements, 17 us by 1.25 clocks, twice that in chunks.

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
CARRIED = 256  # states of a program that carries them from chunk to chunk
WARPS_TO_FILL = 2048  # of 32 channels each: fewer, and the sequence is cut


@triton.jit
def channels_of(program, per_group, BLOCK_E: tl.constexpr):
    """(group, channels [E], mask [E]) of a program along the channels; no program has channels of two groups."""
    blocks = tl.cdiv(per_group, BLOCK_E)
    i_g = program // blocks
    o_in = (program % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    return i_g, i_g * per_group + o_in, o_in < per_group


@triton.jit
def scale_of(p_scale, offsets, STEP: tl.constexpr, mask):
    """The scales of int8 inputs [...]: one for all where STEP is 0; 1 where there are none."""
    b_scale = tl.full(offsets.shape, 1.0, tl.float32)
    if p_scale is not None:
        b_scale = tl.load(p_scale + offsets * STEP, mask=mask, other=0.0)
    return b_scale


@triton.jit
def vector_of(p_x, offsets, mask, default):
    """A parameter of every channel [E], in fp32; the default where there is none."""
    b_x = tl.full(offsets.shape, default, tl.float32)
    if p_x is not None:
        b_x = tl.load(p_x + offsets, mask=mask, other=0.0)
    return b_x


@triton.jit
def _token(j, inside, p_u, p_dt, p_z, p_B, p_C, p_resets, u_step, dt_step, z_step, B_step, C_step, onward, o_e, m_e,
           o_n, m_n, SUMMARY: tl.constexpr):
    """What the token j steps ahead brings: u, dt, z [E], B, C [N] as they lie in memory, and whether the state goes on
    into it.
    """
    m_t, m_r = m_e & inside, m_n & inside
    b_u = tl.load(p_u + j * u_step + o_e, mask=m_t, other=0)
    b_dt = tl.load(p_dt + j * dt_step + o_e, mask=m_t, other=0)
    b_B = tl.load(p_B + j * B_step + o_n, mask=m_r, other=0)
    b_C, b_z = b_B, b_u
    if not SUMMARY:
        b_C = tl.load(p_C + j * C_step + o_n, mask=m_r, other=0)
        if p_z is not None:
            b_z = tl.load(p_z + j * z_step + o_e, mask=m_t, other=0)
    goes_on = 1.0
    if p_resets is not None:
        goes_on = 1.0 - tl.load(p_resets + j * onward, mask=inside, other=0).to(tl.float32)
    return b_u, b_dt, b_z, b_B, b_C, goes_on


@triton.jit
def _advance(b_h, inside, b_u, b_dt, b_z, b_B, b_C, goes_on, b_A, b_bias, b_D, b_gate, b_su, b_sdt, b_sz, b_sB, b_sC,
             m_e, p_z, p_resets, SOFTPLUS: tl.constexpr, SUMMARY: tl.constexpr, POLYNOMIAL: tl.constexpr,
             SCALED: tl.constexpr):
    """(the state behind the token [N, E], dt as the recurrence takes it [E], y [E])."""
    b_u, b_dt, b_B = wide(b_u), wide(b_dt), wide(b_B)
    if SCALED:
        b_u, b_dt, b_B = b_u * b_su, b_dt * b_sdt, b_B * b_sB
    b_dt += b_bias
    if SOFTPLUS:
        b_dt = softplus(b_dt)
    b_dt = tl.where(m_e & inside, b_dt, 0.0)
    b_x = b_dt[None, :] * b_A
    b_a = exp2_polynomial(b_x) if POLYNOMIAL else tl.exp2(b_x)
    if p_resets is not None:
        b_a *= goes_on
    b_h = b_a * b_h + (b_dt * b_u)[None, :] * b_B[:, None]
    b_y = b_u
    if not SUMMARY:
        b_C = wide(b_C)
        if SCALED:
            b_C = b_C * b_sC
        b_y = tl.sum(b_h * b_C[:, None], 0) + b_u * b_D
        if p_z is not None:
            b_z = wide(b_z)
            if SCALED:
                b_z = b_z * b_sz
            b_y *= b_z * sigmoid(b_z * b_gate)
    return b_h, b_dt, b_y


@gpu.tuned([({"TILE": 512, "POLYNOMIAL": 1}, 1, 1), ({"TILE": 512, "POLYNOMIAL": 0}, 1, 1),
            ({"TILE": 1024, "POLYNOMIAL": 0}, 2, 1)], key=["BLOCK_N", "channels", "LONG", "SUMMARY"])
@triton.jit(do_not_specialize=["nought"])
def _scan_kernel(
    p_u, p_dt, p_A, p_B, p_C, p_D, p_z, p_bias, p_gate, p_initial, p_resets, p_su, p_sdt, p_sB, p_sC, p_sz,
    p_y, p_final, p_decay, p_kept, length, chunk, channels, per_group, states,
    u_batch, u_token, dt_batch, dt_token, B_batch, B_token, C_batch, C_token, z_batch, z_token,
    nought, LONG: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr, EVERY: tl.constexpr, STEP_U: tl.constexpr, STEP_DT: tl.constexpr, STEP_B: tl.constexpr,
    STEP_C: tl.constexpr, STEP_Z: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, POLYNOMIAL: tl.constexpr,
):
    BLOCK_E: tl.constexpr = TILE // BLOCK_N
    AT_ONCE: tl.constexpr = 2 if LONG else 1  # tokens whose loads are under way together
    SCALED: tl.constexpr = p_su is not None or p_sdt is not None or p_sB is not None
    i_b, i_c = tl.program_id(2).to(tl.int64), tl.program_id(1)
    i_g, o_e, m_e = channels_of(tl.program_id(0), per_group, BLOCK_E)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < states
    m_h = m_n[:, None] & m_e[None, :]
    o_h = o_n[:, None] * channels + o_e[None, :] + nought  # [N, E]
    i_bc = i_b * tl.num_programs(1) + i_c
    b_A = tl.load(p_A + o_h, mask=m_h, other=0.0) * LOG2E  # [N, E]
    b_h = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    if p_initial is not None:
        b_h = tl.load(p_initial + i_bc * states * channels + o_h, mask=m_h, other=0.0)
    b_bias, b_D = vector_of(p_bias, o_e, m_e, 0.0), vector_of(p_D, o_e, m_e, 0.0)
    b_gate = vector_of(p_gate, o_e, m_e, 1.0)
    b_su, b_sdt = scale_of(p_su, o_e, STEP_U, m_e), scale_of(p_sdt, o_e, STEP_DT, m_e)
    b_sz, b_sB = scale_of(p_sz, o_e, STEP_Z, m_e), scale_of(p_sB, i_g * states + o_n, STEP_B, m_n)
    b_sC = scale_of(p_sC, i_g * states + o_n, STEP_C, m_n)
    begin = i_c * chunk
    first = (length - 1 - begin) if REVERSE else begin
    onward = -1 if REVERSE else 1
    u_step, dt_step, z_step, B_step, C_step = (onward * u_token, onward * dt_token, onward * z_token, onward * B_token,
                                               onward * C_token)
    y_step = onward * channels
    p_u += i_b * u_batch + first.to(tl.int64) * u_token
    p_dt += i_b * dt_batch + first.to(tl.int64) * dt_token
    p_B += i_b * B_batch + first.to(tl.int64) * B_token + i_g * states
    p_C += i_b * C_batch + first.to(tl.int64) * C_token + i_g * states
    p_y += (i_b * length + first) * channels
    if p_z is not None:
        p_z += i_b * z_batch + first.to(tl.int64) * z_token
    if p_resets is not None:
        p_resets += i_b * length + first
    b_sum = tl.zeros([BLOCK_E], tl.float32)  # of dt
    alive = 1.0
    for i in range(begin, min(begin + chunk, length), AT_ONCE):
        u0, d0, z0, B0, C0, on0 = _token(
            0, True, p_u, p_dt, p_z, p_B, p_C, p_resets, u_step, dt_step, z_step, B_step, C_step, onward,
            o_e, m_e, o_n, m_n, SUMMARY)
        if AT_ONCE == 2:
            u1, d1, z1, B1, C1, on1 = _token(
                1, i + 1 < length, p_u, p_dt, p_z, p_B, p_C, p_resets, u_step, dt_step, z_step, B_step, C_step, onward,
                o_e, m_e, o_n, m_n, SUMMARY)
        if EVERY and i % EVERY == 0:
            o_k = (i_b * tl.cdiv(length, EVERY) + i // EVERY) * states * channels
            tl.store(p_kept + o_k + o_h, b_h, mask=m_h)
        b_h, dt0, y0 = _advance(
            b_h, True, u0, d0, z0, B0, C0, on0, b_A, b_bias, b_D, b_gate, b_su, b_sdt,
            b_sz, b_sB, b_sC, m_e, p_z, p_resets, SOFTPLUS, SUMMARY, POLYNOMIAL, SCALED)
        b_sum += dt0
        alive *= on0
        if AT_ONCE == 2:
            b_h, dt1, y1 = _advance(
                b_h, i + 1 < length, u1, d1, z1, B1, C1, on1, b_A, b_bias, b_D, b_gate, b_su, b_sdt,
                b_sz, b_sB, b_sC, m_e, p_z, p_resets, SOFTPLUS, SUMMARY, False, SCALED)
            b_sum += dt1
            alive *= on1
        if not SUMMARY:
            tl.store(p_y + o_e, narrow(y0, p_y), mask=m_e)
            if AT_ONCE == 2:
                tl.store(p_y + y_step + o_e, narrow(y1, p_y), mask=m_e & (i + 1 < length))
        p_u += AT_ONCE * u_step
        p_dt += AT_ONCE * dt_step
        p_B += AT_ONCE * B_step
        p_C += AT_ONCE * C_step
        p_y += AT_ONCE * y_step
        if p_z is not None:
            p_z += AT_ONCE * z_step
        if p_resets is not None:
            p_resets += AT_ONCE * onward
    if SUMMARY:
        tl.store(p_final + i_bc * states * channels + o_h, b_h, mask=m_h)
        tl.store(p_decay + i_bc * states * channels + o_h, tl.exp2(b_sum[None, :] * b_A) * alive, mask=m_h)
    elif i_c == tl.num_programs(1) - 1:
        tl.store(p_final + i_b * states * channels + o_h, b_h, mask=m_h)


@triton.jit
def carry_kernel(p_local, p_decay, p_initial, p_final, chunks, channels, states, BLOCK: tl.constexpr):
    """Replace the final state of every chunk scanned from zero [B, chunks, N, E] by the state it starts with."""
    i_b = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [N E]
    m = o < states * channels
    b_h = tl.zeros([BLOCK], tl.float32)
    if p_initial is not None:
        b_h = tl.load(p_initial + i_b * states * channels + o, mask=m, other=0.0)
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


def by_states(states_BEN: Tensor | None) -> Any:
    """[B, N, E] without gaps: a view of what ``states_last`` made."""
    return None if states_BEN is None else states_BEN.transpose(1, 2).contiguous()


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

    A_NE, initial_BNE = A.t().contiguous(), by_states(initial)

    def scan(summary: bool, start: Tensor | None, final: Tensor, decay: Tensor | None) -> None:
        gpu.launch(
            _scan_kernel,
            lambda meta: (groups * triton.cdiv(per_group, meta["TILE"] // block_n), chunks, batch),
            u, dt, A_NE, B, C, D, z, dt_bias, z_scale, start, resets, u_scale, dt_scale, B_scale, C_scale, z_scale8, y,
            final, decay, kept, length, chunk, channels, per_group, states, u.stride(0), u.stride(1), dt.stride(0),
            dt.stride(1), B.stride(0), B.stride(1), C.stride(0), C.stride(1), 0 if z is None else z.stride(0),
            0 if z is None else z.stride(1), 0, LONG=chunk > 1, SOFTPLUS=softplus, REVERSE=reverse,
            SUMMARY=summary, EVERY=EVERY if save and not summary else 0, STEP_U=_step(u_scale), STEP_DT=_step(dt_scale),
            STEP_B=_step(B_scale), STEP_C=_step(C_scale), STEP_Z=_step(z_scale8), BLOCK_N=block_n)

    if chunks == 1:
        scan(False, initial_BNE, final, None)
        return y, final, kept
    local, decay = (torch.empty(batch, chunks, states, channels, device=u.device) for _ in range(2))
    scan(True, None, local, decay)
    gpu.launch(carry_kernel, (triton.cdiv(states * channels, CARRIED), batch), local, decay, initial_BNE, final, chunks,
               channels, states, BLOCK=CARRIED)
    scan(False, local, torch.empty_like(final), None)
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


__all__ = ["CARRIED", "EVERY", "by_states", "carry_kernel", "channels_of", "offline_calls", "run_forward", "scale_of",
           "states_last", "vector_of"]
