"""Readable torch for the causal depthwise convolution: a sum of K shifted products, oldest tap first.

y_t = bias + sum_k weight[:, k] * x_{t-K+1+k}, then y * sigmoid(act_scale * y). Computed in fp32 (fp64 where x is fp64).
Inputs before the first token come from ``initial_state``; a tap that reaches into another packed sequence reads zero.

Legend: B batch, L tokens, E channels, K width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambacompress.kernels.selective_scan.reference import compute_dtype, same_as_previous, silu_scaled


def causal_conv1d_reference(
    x_BLE: Tensor, weight_EK: Tensor, bias_E: Tensor | None = None, *, activation: bool = True,
    act_scale_E: Tensor | None = None, initial_state: Tensor | None = None, seq_idx_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``causal_conv1d``."""
    dtype = compute_dtype(x_BLE, weight_EK)
    batch, length, channels = x_BLE.shape
    before = weight_EK.shape[1] - 1
    if initial_state is None:
        initial_state = x_BLE.new_zeros(batch, before, channels)
    padded = torch.cat([initial_state.to(x_BLE.dtype), x_BLE], 1)  # [B, K-1+L, E]
    weight = weight_EK.to(dtype)
    sequence = None
    if seq_idx_BL is not None:  # ids that count sequences: an id that comes back later is another sequence
        ids = (~same_as_previous(seq_idx_BL)).long().cumsum(1)
        sequence = torch.cat([ids.new_zeros(batch, before), ids], 1)
    y = x_BLE.new_zeros(batch, length, channels, dtype=dtype)
    for k in range(before + 1):
        tap = padded[:, k:k + length].to(dtype)
        if sequence is not None:
            mine = sequence[:, k:k + length] == sequence[:, before:]
            tap = tap * mine[..., None].to(dtype)
        y = y + tap * weight[:, k]
    if bias_E is not None:
        y = y + bias_E.to(dtype)
    if activation:
        y = silu_scaled(y, act_scale_E)
    return y.to(x_BLE.dtype), last_inputs(x_BLE, initial_state, before, seq_idx_BL)


def last_inputs(x_BLE: Tensor, initial_state: Tensor | None, count: int, seq_idx_BL: Tensor | None) -> Tensor:
    """The last ``count`` inputs [B, count, E]; zeros where they belong to another packed sequence than the last
    token."""
    batch, length, channels = x_BLE.shape
    if length >= count:
        final = x_BLE[:, length - count:].clone()
    else:
        before = x_BLE.new_zeros(batch, count, channels) if initial_state is None else initial_state.to(x_BLE.dtype)
        final = torch.cat([before[:, length:], x_BLE], 1)
    if seq_idx_BL is None or not length:
        return final
    ids = (~same_as_previous(seq_idx_BL)).long().cumsum(1)
    ids = torch.cat([ids.new_zeros(batch, count), ids], 1)[:, length:]
    return final * (ids == ids[:, -1:])[..., None].to(final.dtype) if count else final
