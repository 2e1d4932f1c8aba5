"""Readable torch for the selective scan: one token after another, any device, any float dtype, differentiable.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t          y_t = C_t . h_t + D u_t          (Mamba, arXiv 2312.00752, Alg. 2)

Computed in fp32 (fp64 where an input is fp64), whatever the inputs' dtype. The locally bi-directional form (LBMamba,
arXiv 2506.15976) adds, inside windows of K tokens, the state of a scan that runs backward, hR_t = a_t hR_{t+1} + b_t,
and reads H_t = hL_t + hR_t - b_t. Windows start at the first token of each packed sequence.

Legend: B batch, L tokens, E channels, N d_state, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 where any input is, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def dequantize(x: Tensor, scale: Tensor | float | None, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``, times its scale."""
    x = x.to(dtype)
    if scale is None:
        return x
    return x * (scale.to(dtype) if isinstance(scale, Tensor) else scale)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) without overflow; exact in its tail, unlike F.softplus beyond its threshold."""
    return torch.where(x > 20, x, torch.log1p(torch.exp(torch.clamp(x, max=20)))).to(x.dtype)


def silu_scaled(z: Tensor, scale: Tensor | None) -> Tensor:
    """z * sigmoid(scale * z)."""
    return F.silu(z) if scale is None else z * torch.sigmoid(z * scale.to(z.dtype))


def same_as_previous(seq_idx_BL: Tensor) -> Tensor:
    """[B, L] bool: token t belongs to the sequence of token t-1 (the first one continues the initial state)."""
    same = torch.ones_like(seq_idx_BL, dtype=torch.bool)
    same[:, 1:] = seq_idx_BL[:, 1:] == seq_idx_BL[:, :-1]
    return same


def selective_scan_reference(
    u_BLE: Tensor, dt_BLE: Tensor, A_EN: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, D_E: Tensor | None = None,
    z_BLE: Tensor | None = None, dt_bias_E: Tensor | None = None, *, dt_softplus: bool = True,
    z_scale_E: Tensor | None = None, initial_state_BEN: Tensor | None = None, reverse: bool = False,
    window: int | None = None, seq_idx_BL: Tensor | None = None, scales: Any = None,
) -> tuple[Tensor, Tensor]:
    """See ``selective_scan``: the same arguments, the same results."""
    return selective_scan_states_reference(
        u_BLE, dt_BLE, A_EN, B_BLGN, C_BLGN, D_E, z_BLE, dt_bias_E, dt_softplus=dt_softplus, z_scale_E=z_scale_E,
        initial_state_BEN=initial_state_BEN, reverse=reverse, window=window, seq_idx_BL=seq_idx_BL, scales=scales,
        keep=False)[:2]


def selective_scan_states_reference(
    u_BLE: Tensor, dt_BLE: Tensor, A_EN: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, D_E: Tensor | None = None,
    z_BLE: Tensor | None = None, dt_bias_E: Tensor | None = None, *, dt_softplus: bool = True,
    z_scale_E: Tensor | None = None, initial_state_BEN: Tensor | None = None, reverse: bool = False,
    window: int | None = None, seq_idx_BL: Tensor | None = None, scales: Any = None, keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``selective_scan_states``; without ``keep`` the states are left out (and empty)."""
    dtype = compute_dtype(u_BLE, dt_BLE, A_EN, B_BLGN, C_BLGN, initial_state_BEN)
    out_dtype = u_BLE.dtype if u_BLE.is_floating_point() else dtype
    u, dt, B, C = (dequantize(t, getattr(scales, name, None), dtype) for name, t in
                   (("u", u_BLE), ("dt", dt_BLE), ("B", B_BLGN), ("C", C_BLGN)))
    z = None if z_BLE is None else dequantize(z_BLE, getattr(scales, "z", None), dtype)
    A = A_EN.to(dtype)
    if dt_bias_E is not None:
        dt = dt + dt_bias_E.to(dtype)
    if dt_softplus:
        dt = softplus(dt)
    batch, length, channels = u.shape
    states, groups = A.shape[1], B.shape[2]
    per_group = channels // groups
    if reverse:
        u, dt, B, C = (t.flip(1) for t in (u, dt, B, C))
        seq_idx_BL = None if seq_idx_BL is None else seq_idx_BL.flip(1)
    h = (u.new_zeros(batch, channels, states) if initial_state_BEN is None else initial_state_BEN.to(dtype))
    if seq_idx_BL is None:
        resets: list[Tensor | None] = [None] * length
    else:
        resets = [same[:, None, None] for same in same_as_previous(seq_idx_BL).to(dtype).unbind(1)]

    B_l, C_l = (t.repeat_interleave(per_group, 2).unbind(1) if groups > 1 else t.unbind(1) for t in (B, C))
    states_L: list[Tensor] = []
    y_l: list[Tensor] = []
    decay_l: list[Tensor] = []
    input_l: list[Tensor] = []
    for u_t, dt_t, B_t, C_t, goes_on in zip(u.unbind(1), dt.unbind(1), B_l, C_l, resets, strict=True):
        decay = torch.exp(dt_t[..., None] * A)
        new = (dt_t * u_t)[..., None] * B_t
        h = decay * (h if goes_on is None else h * goes_on) + new
        if window is None:
            y_l.append((h * C_t).sum(-1))
        if window is not None or keep:
            states_L.append(h)
        if window is not None:
            decay_l.append(decay)
            input_l.append(new)
    if window is not None:
        states_L = _add_backward(states_L, decay_l, input_l, window, seq_idx_BL)
        y_l = [(state * C_t).sum(-1) for state, C_t in zip(states_L, C_l, strict=True)]
    y = torch.stack(y_l, 1) if y_l else u.new_zeros(batch, 0, channels)
    if D_E is not None:
        y = y + u * D_E.to(dtype)
    if reverse:
        y = y.flip(1)
    if z is not None:
        y = y * silu_scaled(z, None if z_scale_E is None else z_scale_E)
    every = torch.stack(states_L, 1) if keep and states_L else u.new_zeros(batch, 0, channels, states)
    return y.to(out_dtype), h, every.flip(1) if reverse else every


def _add_backward(states: list[Tensor], decays: list[Tensor], inputs: list[Tensor], window: int,
                  seq_idx_BL: Tensor | None) -> list[Tensor]:
    """H_t = hL_t + hR_t - b_t for every token, hR restarting at the end of every window."""
    length = len(states)
    device = states[0].device if states else None
    position_L = torch.arange(length, device=device)
    if seq_idx_BL is None:
        place_BL = position_L[None].expand(states[0].shape[0] if states else 1, -1)
        ends_sequence = torch.zeros_like(place_BL, dtype=torch.bool)
    else:
        starts = ~same_as_previous(seq_idx_BL)
        first_BL = torch.where(starts, position_L, torch.zeros_like(position_L)).cummax(1).values
        place_BL = position_L - first_BL
        ends_sequence = torch.zeros_like(starts)
        ends_sequence[:, :-1] = starts[:, 1:]
    goes_on_BL = ~(((place_BL + 1) % window == 0) | ends_sequence)
    both = list(states)
    right: Tensor | None = None
    for t in range(length - 1, -1, -1):
        if right is None:
            right = inputs[t]
        else:
            right = decays[t] * right * goes_on_BL[:, t, None, None].to(right.dtype) + inputs[t]
        both[t] = states[t] + right - inputs[t]
    return both
