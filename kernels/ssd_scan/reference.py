"""Readable torch for the scan of Mamba-2: chunks of tokens as matrix products, states passed from chunk to chunk.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T    y_t = h_t C_t + D x_t    (Mamba-2, arXiv 2405.21060, sec. 6)

A is one number a head. Inside a chunk, token i reads token j <= i with weight exp(s_i - s_j) (C_i . B_j) dt_j, where s
is the running sum of dt A; what came before the chunk is read through its state. Decays are always exp of a difference
<= 0, so nothing overflows. Computed in fp32 (fp64 where an input is). ``ssd_scan_sequential`` is the same law token by
token.

Legend: B batch, L tokens, H heads, P head_dim, G groups, N d_state, Q tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambacompress.kernels.selective_scan.reference import compute_dtype, same_as_previous, softplus


def step_sizes(dt_BLH: Tensor, dt_bias_H: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float],
               dtype: torch.dtype) -> Tensor:
    """dt = clamp(softplus(dt + bias), *dt_limit)."""
    dt = dt_BLH.to(dtype)
    if dt_bias_H is not None:
        dt = dt + dt_bias_H.to(dtype)
    if dt_softplus:
        dt = softplus(dt)
    low, high = dt_limit
    return dt if (low, high) == (0.0, float("inf")) else dt.clamp(low, high)


def _prepared(x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, dt_bias_H: Tensor | None,
              dt_softplus: bool, dt_limit: tuple[float, float],
              state_BHPN: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, the step sizes, B and C a head [B, L, H, N] and the initial state, all in the dtype computed in."""
    dtype = compute_dtype(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, state_BHPN)
    batch, _, heads, head_dim = x_BLHP.shape
    x = x_BLHP.to(dtype)
    dt = step_sizes(dt_BLH, dt_bias_H, dt_softplus, dt_limit, dtype)
    B, C = (t.to(dtype).repeat_interleave(heads // B_BLGN.shape[2], 2) for t in (B_BLGN, C_BLGN))
    state = x.new_zeros(batch, heads, head_dim, B.shape[-1]) if state_BHPN is None else state_BHPN.to(dtype)
    return x, dt, B, C, state


def ssd_scan_reference(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None, *, dt_softplus: bool = True, dt_limit: tuple[float, float] = (0.0, float("inf")),
    chunk_size: int = 256, initial_state_BHPN: Tensor | None = None, seq_idx_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``ssd_scan``."""
    x, dt, B, C, state = _prepared(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, dt_bias_H, dt_softplus, dt_limit,
                                   initial_state_BHPN)
    dtype = x.dtype
    batch, length = x.shape[:2]
    segment = (torch.zeros(batch, length, dtype=torch.long, device=x.device) if seq_idx_BL is None
               else (~same_as_previous(seq_idx_BL)).long().cumsum(1))
    last = segment.new_zeros(batch, 1)  # the sequence the state belongs to
    parts = []
    for start in range(0, length, chunk_size):
        chunk = slice(start, min(start + chunk_size, length))
        x_BQHP, dt_BQH, B_BQHN, C_BQHN, segment_BQ = x[:, chunk], dt[:, chunk], B[:, chunk], C[:, chunk], segment[:,
                                                                                                                  chunk]
        sums_BHQ = (dt_BQH * A_H.to(dtype)).transpose(1, 2).cumsum(-1)
        tokens = sums_BHQ.shape[-1]
        causal_QQ = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        reads_BQQ = causal_QQ & (segment_BQ[:, :, None] == segment_BQ[:, None, :])
        gap_BHQQ = (sums_BHQ[..., :, None] - sums_BHQ[..., None, :]).masked_fill(~reads_BQQ[:, None], -torch.inf)
        weights_BHQQ = torch.einsum("bihn,bjhn->bhij", C_BQHN, B_BQHN) * torch.exp(gap_BHQQ)
        scaled_BQHP = x_BQHP * dt_BQH[..., None]
        y = torch.einsum("bhij,bjhp->bihp", weights_BHQQ, scaled_BQHP)
        from_state_BQH = torch.exp(sums_BHQ).transpose(1, 2) * (segment_BQ == last).to(dtype)[..., None]
        parts.append(y + torch.einsum("bihn,bhpn->bihp", C_BQHN, state) * from_state_BQH[..., None])
        end = segment_BQ[:, -1:]
        to_end_BQH = torch.exp(sums_BHQ[..., -1:] - sums_BHQ).transpose(1, 2) * (segment_BQ == end).to(dtype)[..., None]
        keep_BH = torch.exp(sums_BHQ[..., -1]) * (end == last).to(dtype)
        state = state * keep_BH[..., None, None] + torch.einsum("bqhp,bqhn->bhpn", scaled_BQHP * to_end_BQH[..., None],
                                                                B_BQHN)
        last = end
    y_BLHP = torch.cat(parts, 1) if parts else x
    if D_H is not None:
        y_BLHP = y_BLHP + x * D_H.to(dtype)[:, None]
    return y_BLHP.to(x_BLHP.dtype), state


def ssd_scan_sequential(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None, *, dt_softplus: bool = True, dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state_BHPN: Tensor | None = None, seq_idx_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same law token by token: what the chunked form is tested against, and one decode step."""
    x, dt, B, C, state = _prepared(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, dt_bias_H, dt_softplus, dt_limit,
                                   initial_state_BHPN)
    dtype = x.dtype
    length = x.shape[1]
    same = None if seq_idx_BL is None else same_as_previous(seq_idx_BL).to(dtype)
    parts = []
    for t in range(length):
        if same is not None:
            state = state * same[:, t, None, None, None]
        decay_BH = torch.exp(dt[:, t] * A_H.to(dtype))
        scaled_BHP = x[:, t] * dt[:, t, :, None]
        state = state * decay_BH[..., None, None] + scaled_BHP[..., None] * B[:, t, :, None]
        parts.append((state * C[:, t, :, None]).sum(-1))
    y_BLHP = torch.stack(parts, 1) if parts else x
    if D_H is not None:
        y_BLHP = y_BLHP + x * D_H.to(dtype)[:, None]
    return y_BLHP.to(x_BLHP.dtype), state
