"""The depthwise convolution on a GPU: a tile of tokens and channels a program, taps from cache, activation fused.

Sums run over the taps in the reference's order, in fp32; sums of int8 products are whole numbers below 2^24 and so
exact. The backward recomputes the sum before the activation: one kernel gives its gradient and the parameters', as
partial sums of every tile that torch adds up in a fixed order, a second one the inputs'.

Roofline. Forward: x and y once, the weights stay in L2; 2 K + 5 operations an element. fp16 [1, 2048, 5120] is 42 MB,
13 us at 3.35 TB/s on an H100, against 0.14 GFLOP: memory is the bound. Backward: x and dy read, dx written, the
gradient before the activation written and read in fp32: 14 bytes an element, 147 MB, 44 us.

Legend: B batch, L tokens, E channels, K width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambacompress.kernels import gpu, native
from mambacompress.kernels.tile_math import narrow, sigmoid, wide


@triton.jit
def _tap(p_x, p_initial, p_ids, i_b, o_t, o_s, o_e, m_e, length, x_batch, x_token, i_batch, i_token, before):
    """x at tokens o_s, [L, E] fp32, as the outputs at o_t read it: from the state before the first token, zero beyond
    the end and in another packed sequence."""
    m_s = (o_s >= 0) & (o_s < length)
    b_x = wide(tl.load(p_x + i_b * x_batch + o_s[:, None] * x_token + o_e[None, :], mask=m_s[:, None] & m_e, other=0))
    if p_initial is not None:
        m_i = (o_s < 0) & (o_s >= -before)
        b_x += wide(tl.load(p_initial + i_b * i_batch + (o_s + before)[:, None] * i_token + o_e[None, :],
                            mask=m_i[:, None] & m_e, other=0))
    if p_ids is not None:
        b_own = tl.load(p_ids + i_b * length + o_t, mask=(o_t >= 0) & (o_t < length), other=-1)  # [L]
        b_there = tl.load(p_ids + i_b * length + o_s, mask=m_s, other=0)
        b_x = tl.where((b_own == b_there)[:, None], b_x, 0.0)
    return b_x


@triton.jit
def _sum_of_taps(p_x, p_weight, p_bias, p_initial, p_ids, p_scale, i_b, o_t, o_e, m_e, length, x_batch, x_token,
                 i_batch, i_token, ahead, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr):
    """The convolution before its activation, [L, E]."""
    b_sum = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
    for k in tl.static_range(WIDTH):
        b_x = _tap(p_x, p_initial, p_ids, i_b, o_t, o_t + (k - WIDTH + 1) + ahead, o_e, m_e, length, x_batch, x_token,
                   i_batch, i_token, WIDTH - 1)
        b_sum += b_x * tl.load(p_weight + o_e * WIDTH + k, mask=m_e, other=0.0)[None, :]
    if p_scale is not None:
        b_sum = b_sum * tl.load(p_scale + o_e, mask=m_e, other=0.0)[None, :]
    if p_bias is not None:
        b_sum += tl.load(p_bias + o_e, mask=m_e, other=0.0)[None, :]
    return b_sum


@triton.jit
def _forward_kernel(
    p_x, p_weight, p_bias, p_act_scale, p_initial, p_ids, p_scale, p_y, length, channels, x_batch, x_token, i_batch,
    i_token, ahead, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):
    i_b = tl.program_id(2).to(tl.int64)
    o_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    o_t = tl.program_id(1).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    m_e = o_e < channels
    b_y = _sum_of_taps(p_x, p_weight, p_bias, p_initial, p_ids, p_scale, i_b, o_t, o_e, m_e, length, x_batch, x_token,
                       i_batch, i_token, ahead, WIDTH, BLOCK_L, BLOCK_E)
    if ACTIVATION:
        b_slope = b_y
        if p_act_scale is not None:
            b_slope = b_y * tl.load(p_act_scale + o_e, mask=m_e, other=0.0)[None, :]
        b_y = b_y * sigmoid(b_slope)
    p_out = p_y + (i_b * length + o_t[:, None]) * channels + o_e[None, :]  # [L, E]
    tl.store(p_out, narrow(b_y, p_y), mask=(o_t < length)[:, None] & m_e)


@triton.jit
def _parameter_gradients_kernel(
    p_x, p_weight, p_bias, p_act_scale, p_initial, p_ids, p_dy, p_dsum, p_dweight, p_dbias, p_dact, length, channels,
    x_batch, x_token, i_batch, i_token, ahead, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    i_b = tl.program_id(2).to(tl.int64)
    o_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    o_t = tl.program_id(1).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    m_e = o_e < channels
    m_out = (o_t < length)[:, None] & m_e
    o_out = (i_b * length + o_t[:, None]) * channels + o_e[None, :]  # [L, E]
    b_d = wide(tl.load(p_dy + o_out, mask=m_out, other=0.0))
    i_tile = i_b * tl.num_programs(1) + tl.program_id(1)
    if ACTIVATION:
        b_sum = _sum_of_taps(p_x, p_weight, p_bias, p_initial, p_ids, None, i_b, o_t, o_e, m_e, length, x_batch,
                             x_token, i_batch, i_token, ahead, WIDTH, BLOCK_L, BLOCK_E)
        b_scale = tl.full([BLOCK_E], 1.0, tl.float32)
        if p_act_scale is not None:
            b_scale = tl.load(p_act_scale + o_e, mask=m_e, other=0.0)
        b_sigma = sigmoid(b_sum * b_scale[None, :])
        b_slope = b_sigma * (1.0 - b_sigma) * b_sum
        tl.store(p_dact + i_tile * channels + o_e, tl.sum(b_d * b_sum * b_slope, 0), mask=m_e)
        b_d = b_d * (b_sigma + b_scale[None, :] * b_slope)
    tl.store(p_dsum + o_out, b_d, mask=m_out)
    tl.store(p_dbias + i_tile * channels + o_e, tl.sum(b_d, 0), mask=m_e)
    for k in tl.static_range(WIDTH):
        b_x = _tap(p_x, p_initial, p_ids, i_b, o_t, o_t + (k - WIDTH + 1) + ahead, o_e, m_e, length, x_batch, x_token,
                   i_batch, i_token, WIDTH - 1)
        tl.store(p_dweight + (i_tile * channels + o_e) * WIDTH + k, tl.sum(b_d * b_x, 0), mask=m_e)


@triton.jit
def _input_gradient_kernel(
    p_dsum, p_weight, p_ids, p_dx, p_dinitial, length, channels, ahead, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    i_b = tl.program_id(2).to(tl.int64)
    o_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    o_s = tl.program_id(1).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L) - (WIDTH - 1)  # the state's tokens come first
    m_e = o_e < channels
    b_dx = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
    for k in tl.static_range(WIDTH):
        o_t = o_s - (k - WIDTH + 1) - ahead
        m_t = (o_t >= 0) & (o_t < length)
        if p_ids is not None:
            b_there = tl.load(p_ids + i_b * length + o_s, mask=(o_s >= 0) & (o_s < length), other=0)
            m_t = m_t & (tl.load(p_ids + i_b * length + o_t, mask=m_t, other=-1) == b_there)
        b_d = tl.load(p_dsum + (i_b * length + o_t[:, None]) * channels + o_e[None, :], mask=m_t[:, None] & m_e,
                      other=0.0)
        b_dx += b_d * tl.load(p_weight + o_e * WIDTH + k, mask=m_e, other=0.0)[None, :]
    m_s = (o_s >= 0) & (o_s < length)
    tl.store(p_dx + (i_b * length + o_s[:, None]) * channels + o_e[None, :], narrow(b_dx, p_dx),
             mask=m_s[:, None] & m_e)
    if p_dinitial is not None:
        o_i = i_b * (WIDTH - 1) + o_s + WIDTH - 1
        tl.store(p_dinitial + o_i[:, None] * channels + o_e[None, :], narrow(b_dx, p_dinitial),
                 mask=(o_s < 0)[:, None] & m_e)


def _tiles(length: int, channels: int) -> tuple[dict[str, int], tuple[int, int]]:
    """Block sizes, and programs along channels and tokens."""
    tokens = min(32, triton.next_power_of_2(length))
    block = min(64 if tokens > 4 else 256, triton.next_power_of_2(channels))
    return {"BLOCK_L": tokens, "BLOCK_E": block}, (triton.cdiv(channels, block), triton.cdiv(length, tokens))


def _strides(initial: Tensor | None) -> tuple[int, int]:
    return (0, 0) if initial is None else (initial.stride(0), initial.stride(1))


def run_forward(x: Tensor, weight: Tensor, bias: Tensor | None, act_scale: Tensor | None, initial: Tensor | None,
                ids: Tensor | None, scale: Tensor | None, activation: bool, ahead: int) -> Tensor:
    """y in x's dtype, fp32 for int8; weight, bias, act_scale, scale: fp32, contiguous; ids: int32 [B, L]."""
    x = native.dense_rows(x)
    initial = None if initial is None or not initial.numel() else native.dense_rows(initial)
    batch, length, channels = x.shape
    y = _output(x)
    blocks, (along_e, along_l) = _tiles(length, channels)
    gpu.launch(_forward_kernel, (along_e, along_l, batch), x, weight, bias, act_scale, initial, ids, scale, y, length,
               channels, x.stride(0), x.stride(1), *_strides(initial), ahead, WIDTH=weight.shape[1],
               ACTIVATION=activation, **blocks)
    return y


def _output(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype if x.is_floating_point() else torch.float32, device=x.device)


conv_op = torch.library.custom_op("mambacompress::causal_conv1d_triton", run_forward, mutates_args=())


@conv_op.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return _output(x)


def run_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act_scale: Tensor | None,
                 initial: Tensor | None, ids: Tensor | None, activation: bool,
                 ahead: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, act_scale and initial."""
    x, dy = native.dense_rows(x), dy.contiguous()
    state = None if initial is None or not initial.numel() else native.dense_rows(initial)
    batch, length, channels = x.shape
    width = weight.shape[1]
    blocks, (along_e, along_l) = _tiles(length, channels)
    dsum, dx = torch.empty(x.shape, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dinitial = torch.empty(0 if initial is None else initial.shape, dtype=x.dtype, device=x.device)
    tiles = batch * along_l
    dweight, dbias = weight.new_empty(tiles, channels, width), weight.new_empty(tiles, channels)
    dact = weight.new_empty(tiles, channels)
    gpu.launch(_parameter_gradients_kernel, (along_e, along_l, batch), x, weight, bias, act_scale, state, ids, dy,
               dsum, dweight, dbias, dact, length, channels, x.stride(0), x.stride(1), *_strides(state), ahead,
               WIDTH=width, ACTIVATION=activation, **blocks)
    blocks, (along_e, along_l) = _tiles(length + width - 1, channels)
    gpu.launch(_input_gradient_kernel, (along_e, along_l, batch), dsum, weight, ids, dx,
               None if state is None else dinitial, length, channels, ahead, WIDTH=width, **blocks)
    return dx, dweight.sum(0), dbias.sum(0), dact.sum(0) if activation else torch.zeros_like(dbias[0]), dinitial


backward_op = torch.library.custom_op("mambacompress::causal_conv1d_triton_backward", run_backward, mutates_args=())


@backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act_scale: Tensor | None, initial: Tensor | None,
      *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels = weight.shape[0]
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight), weight.new_empty(channels),
            weight.new_empty(channels), x.new_empty(0 if initial is None else initial.shape))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, scale, ctx.activation, ctx.ahead = inputs
    if scale is not None:
        raise RuntimeError("the convolution in Triton has no gradients for int8 inputs or weights")
    ctx.save_for_backward(*tensors)


def _propagate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, act_scale, initial, ids = ctx.saved_tensors
    dx, dweight, dbias, dact_scale, dinitial = backward_op(dy, x, weight, bias, act_scale, initial, ids,
                                                           ctx.activation, ctx.ahead)
    return (dx, dweight, None if bias is None else dbias, None if act_scale is None else dact_scale,
            None if initial is None else dinitial, *(None,) * 4)


conv_op.register_autograd(_propagate, setup_context=_save_for_backward)


def _fp32(x: Tensor | None) -> Any:
    return None if x is None else x.float().contiguous()


def causal_conv1d_triton(x_BLE: Tensor, weight_EK: Tensor, bias_E: Tensor | None, *, activation: bool,
                         act_scale_E: Tensor | None, initial_state: Tensor | None, resets_BL: Tensor | None,
                         scale_E: Tensor | None = None, ahead: int = 0) -> Tensor:
    """The activated output [B, L, E]; resets_BL: bool, true where a sequence starts."""
    initial_state = None if initial_state is None else initial_state.to(x_BLE.dtype)
    ids_BL = None if resets_BL is None else resets_BL.cumsum(1).int()
    direct = native.runs_directly(x_BLE, weight_EK, bias_E, act_scale_E, initial_state)
    run: Any = run_forward if direct else conv_op
    return run(x_BLE, _fp32(weight_EK), _fp32(bias_E), _fp32(act_scale_E), initial_state, ids_BL, _fp32(scale_E),
               activation, ahead)


def offline_calls() -> None:
    """Every shipped variant, on meta tensors: see ``kernels.offline``."""
    for dtype in gpu.DTYPES:
        for length in (1, 2048):
            x = torch.empty(2, length, 1536, dtype=dtype, device="meta")
            weight, bias = torch.empty(1536, 4, device="meta"), torch.empty(1536, device="meta")
            state, ids = x.new_empty(2, 3, 1536), torch.empty(2, length, dtype=torch.int32, device="meta")
            run_forward(x, weight, bias, None, state, None, bias if dtype == torch.int8 else None, True, 0)
            run_forward(x, weight, bias, bias, None, ids, None, True, 0)
            if dtype != torch.int8 and length > 1:
                run_backward(x, x, weight, bias, bias, state, ids, True, 0)
                run_backward(x, x, weight, None, None, None, None, False, 2)


__all__ = ["causal_conv1d_triton", "offline_calls"]
