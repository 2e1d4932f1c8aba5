"""ssd_state_update: one decode step of Mamba-2, in native code bit-identical to the same step inside ``ssd_scan``.

The state is fp32, or int8 and requantized at every step (``int8_state``). Legend: B batch, L tokens, H heads, P
head_dim, G groups, N d_state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mambacompress.kernels.int8_state import Int8State, check_state, quantize_state
from mambacompress.kernels.registry import choose
from mambacompress.kernels.selective_scan.reference import compute_dtype
from mambacompress.kernels.ssd_scan import check_shapes, ssd_scan
from mambacompress.kernels.ssd_state_update.cpu import update_int8_cpu
from mambacompress.kernels.ssd_state_update.reference import (
    ssd_state_update_int8_reference,
    ssd_state_update_reference,
)
from mambacompress.kernels.tolerances import FORWARD, TRITON_FORWARD, rms_ratio


def ssd_state_update(
    state_BHPN: Tensor, x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None, *, dt_softplus: bool = True, dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Tensor]:
    """One step of ``ssd_scan`` from ``state_BHPN``, which is not changed.

    x: [B, H, P]; dt: [B, H]; B, C: [B, G, N]; the rest as there. Returns (y [B, H, P], new state [B, H, P, N]).
    """
    _check_step(x_BHP, B_BGN)
    y_BLHP, new_BHPN = ssd_scan(
        x_BHP[:, None], dt_BH[:, None], A_H, B_BGN[:, None], C_BGN[:, None], D_H, dt_bias_H, dt_softplus=dt_softplus,
        dt_limit=dt_limit, chunk_size=1, initial_state_BHPN=state_BHPN)
    return y_BLHP[:, 0], new_BHPN


def ssd_state_update_int8(
    state: Int8State, x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor,
    D_H: Tensor | None = None, dt_bias_H: Tensor | None = None, *, dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Int8State]:
    """The same step from an int8 state, which is not changed. No gradients.

    Returns (y [B, H, P], as the fp32 state before it is rounded gives it, and the new state).
    """
    _check_step(x_BHP, B_BGN)
    check_state("ssd_state_update_int8", state, (*x_BHP.shape, B_BGN.shape[2]))
    check_shapes(x_BHP[:, None], dt_BH[:, None], A_H, B_BGN[:, None], C_BGN[:, None], D_H, dt_bias_H, None, None)
    lacks = [what for what, asked in (
        ("fp64 inputs", compute_dtype(dt_BH, A_H, B_BGN, C_BGN) == torch.float64),
        ("int8 inputs", x_BHP.dtype == torch.int8)) if asked]
    ran = choose("ssd_state_update_int8", x_BHP.device, x_BHP.dtype, lacks, lacks)
    return _step(ran)(state, x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, dt_bias_H, dt_softplus=dt_softplus,
                      dt_limit=dt_limit)


def _step(backend: str) -> Callable[..., tuple[Tensor, Int8State]]:
    if backend == "triton":
        from mambacompress.kernels.ssd_state_update.triton import update_int8_triton

        return update_int8_triton
    return update_int8_cpu if backend == "native" else ssd_state_update_int8_reference


def ssd_steps_int8(
    state: Int8State, x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLGN: Tensor, C_BLGN: Tensor,
    D_H: Tensor | None = None, dt_bias_H: Tensor | None = None, *, dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Int8State]:
    """``ssd_state_update_int8`` for one token after another: a text read at once gives the bits of its steps."""
    y_L = []
    for t in range(x_BLHP.shape[1]):
        y_BHP, state = ssd_state_update_int8(state, x_BLHP[:, t], dt_BLH[:, t], A_H, B_BLGN[:, t], C_BLGN[:, t], D_H,
                                             dt_bias_H, dt_limit=dt_limit)
        y_L.append(y_BHP)
    return (torch.stack(y_L, 1) if y_L else x_BLHP), state


def check(device: torch.device | str = "cpu") -> tuple[float, float]:
    """(worst RMS ratio to the reference, its tolerance) of a step from an int8 state: of y, and of the new scales."""
    generator = torch.Generator().manual_seed(0)
    h, x, dt, A, B, C = (torch.randn(shape, generator=generator).to(device) for shape in (
        (2, 4, 8, 16), (2, 4, 8), (2, 4), (4,), (2, 2, 16), (2, 2, 16)))
    (y, new), (y_ref, new_ref) = (step(quantize_state(h), x, dt, -A.abs(), B, C) for step in (
        ssd_state_update_int8, ssd_state_update_int8_reference))
    tolerance = FORWARD if y.device.type == "cpu" else TRITON_FORWARD
    return max(rms_ratio(y, y_ref), rms_ratio(new.scale, new_ref.scale)), tolerance[torch.float32]


def _check_step(x_BHP: Tensor, B_BGN: Tensor) -> None:
    if x_BHP.dim() != 3 or B_BGN.dim() != 3:
        raise ValueError(f"ssd_state_update wants x [B, H, P] and B [B, G, N], not {tuple(x_BHP.shape)} and "
                         f"{tuple(B_BGN.shape)}")


__all__ = ["check", "ssd_state_update", "ssd_state_update_int8", "ssd_state_update_int8_reference",
           "ssd_state_update_reference", "ssd_steps_int8"]
