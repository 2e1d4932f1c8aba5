"""Readable torch for the depthwise convolutions: a sum of K shifted products, oldest tap first.

y_t = bias + sum_k weight[:, k] * x_{t-K+1+k}, then y * sigmoid(act_scale * y). Computed in fp32 (fp64 where x is fp64).
Inputs before the first token come from ``initial_state``; a tap that reaches into another packed sequence reads zero.
``same`` padding is the causal convolution read (K - 1) - (K - 1) // 2 tokens later, with zeros behind the end, as in
torch's ``padding="same"``.

int8: the products are of codes, so that their sum is exact; it is multiplied by ``scale`` (input's times weight's, one
a channel) before the bias is added.

Legend: B batch, L tokens, E channels, K width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambacompress.kernels.selective_scan.reference import compute_dtype, same_as_previous, silu_scaled


def causal_conv1d_reference(
    x_BLE: Tensor, weight_EK: Tensor, bias_E: Tensor | None = None, *, activation: bool = True,
    act_scale_E: Tensor | None = None, initial_state: Tensor | None = None, seq_idx_BL: Tensor | None = None,
    x_scale: Tensor | float | None = None, weight_scale_E: Tensor | None = None,
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
    scale_E = scale_of_sums(x_scale, weight_scale_E, channels, x_BLE.device)
    if scale_E is not None:
        y = y * scale_E.to(dtype)
    if bias_E is not None:
        y = y + bias_E.to(dtype)
    if activation:
        y = silu_scaled(y, act_scale_E)
    y = y.to(x_BLE.dtype if x_BLE.is_floating_point() else dtype)
    return y, last_inputs(x_BLE, initial_state, before, seq_idx_BL)


def same_conv1d_reference(
    x_BLE: Tensor, weight_EK: Tensor, bias_E: Tensor | None = None, *, activation: bool = True,
    act_scale_E: Tensor | None = None, x_scale: Tensor | float | None = None, weight_scale_E: Tensor | None = None,
) -> Tensor:
    """See ``same_conv1d``."""
    ahead = tokens_ahead(weight_EK.shape[1])
    later = torch.cat([x_BLE, x_BLE.new_zeros(x_BLE.shape[0], ahead, x_BLE.shape[2])], 1)
    y, _ = causal_conv1d_reference(later, weight_EK, bias_E, activation=activation, act_scale_E=act_scale_E,
                                   x_scale=x_scale, weight_scale_E=weight_scale_E)
    return y[:, ahead:]


def tokens_ahead(width: int) -> int:
    """How many tokens behind its own an output of the ``same`` convolution reads."""
    return (width - 1) - (width - 1) // 2


def scale_of_sums(x_scale: Tensor | float | None, weight_scale_E: Tensor | None, channels: int,
                  device: torch.device) -> Tensor | None:
    """fp32 [E]: what a sum of products of codes is multiplied by; None where nothing is int8."""
    if x_scale is None and weight_scale_E is None:
        return None
    scale = torch.ones(channels, device=device) if weight_scale_E is None else weight_scale_E.float()
    return scale if x_scale is None else scale * torch.as_tensor(x_scale, dtype=torch.float32, device=device)


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
