"""ssd_scan: the recurrence of Mamba-2 over a sequence, from any state.

Legend: B batch, L tokens, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mambacompress.kernels.registry import choose
from mambacompress.kernels.selective_scan.reference import compute_dtype, same_as_previous
from mambacompress.kernels.ssd_scan.cpu import ssd_scan_cpu
from mambacompress.kernels.ssd_scan.reference import ssd_scan_reference, ssd_scan_sequential
from mambacompress.kernels.tolerances import compare


def ssd_scan(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None, *, dt_softplus: bool = True, dt_limit: tuple[float, float] = (0.0, float("inf")),
    chunk_size: int = 256, initial_state_BHPN: Tensor | None = None, seq_idx_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt A) h_{t-1} + dt x B^T;  y = h C + D x.

    x: [B, L, H, P]; dt: [B, L, H]; A, D, dt_bias: [H], A negative; B, C: [B, L, G, N] with H divisible by G.
    dt = clamp(softplus(dt + dt_bias), *dt_limit). initial_state: [B, H, P, N], zeros where None. seq_idx: [B, L]; the
    state restarts from zero where it changes. Returns (y [B, L, H, P] in x's dtype, final state [B, H, P, N], fp32 or
    fp64). Raises ValueError where shapes do not fit.
    """
    check_shapes(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, dt_bias_H, initial_state_BHPN, seq_idx_BL)
    if chunk_size < 1:
        raise ValueError(f"ssd_scan: chunk_size must be at least 1, not {chunk_size}")
    lacks = [what for what, asked in (
        ("fp64 inputs", compute_dtype(dt_BLH, A_H, B_BLGN, C_BLGN, initial_state_BHPN) == torch.float64),
        ("int8 inputs", x_BLHP.dtype == torch.int8), ("an empty sequence", x_BLHP.shape[1] == 0)) if asked]
    ran = choose("ssd_scan", x_BLHP.device, x_BLHP.dtype, lacks, lacks)
    if ran != "reference":
        resets_BL = None if seq_idx_BL is None else ~same_as_previous(seq_idx_BL)
        return _scan(ran)(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, dt_bias_H, dt_softplus=dt_softplus,
                          dt_limit=dt_limit, initial_state_BHPN=initial_state_BHPN, resets_BL=resets_BL)
    return ssd_scan_reference(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, dt_bias_H, dt_softplus=dt_softplus,
                              dt_limit=dt_limit, chunk_size=chunk_size, initial_state_BHPN=initial_state_BHPN,
                              seq_idx_BL=seq_idx_BL)


def _scan(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if backend == "triton":
        from mambacompress.kernels.ssd_scan.triton_backward import ssd_scan_triton

        return ssd_scan_triton
    return ssd_scan_cpu


def check_shapes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
                 state: Tensor | None, seq_idx: Tensor | None) -> None:
    """Raise ValueError, naming the tensor, where shapes do not fit x [B, L, H, P] and B [B, L, G, N]."""
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError(f"ssd_scan wants x [B, L, H, P] and B [B, L, G, N], not {tuple(x.shape)} and {tuple(B.shape)}")
    batch, length, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    if groups < 1 or heads % groups:
        raise ValueError(f"ssd_scan: {heads} heads do not divide into {groups} groups")
    wanted = {"dt": (dt, (batch, length, heads)), "A": (A, (heads,)), "B": (B, (batch, length, groups, states)),
              "C": (C, (batch, length, groups, states)), "D": (D, (heads,)), "dt_bias": (dt_bias, (heads,)),
              "initial_state": (state, (batch, heads, head_dim, states)), "seq_idx": (seq_idx, (batch, length))}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"ssd_scan: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def check(device: torch.device | str = "cpu") -> tuple[float, float]:
    """(RMS ratio of what runs here to the fp64 reference, its tolerance), outputs and gradients of a small problem."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 35, 4, 8), (2, 35, 4), (4,), (2, 35, 2, 16), (2, 35, 2, 16))
    x, dt, A, B, C = (torch.randn(*shape, dtype=torch.float64, generator=generator).to(device) for shape in shapes)
    return compare(ssd_scan, ssd_scan_sequential, [x, dt, -A.abs(), B, C])


__all__ = ["check", "ssd_scan", "ssd_scan_reference", "ssd_scan_sequential"]
