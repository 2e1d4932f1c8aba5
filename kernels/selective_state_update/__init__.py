"""selective_state_update: one decode step of Mamba-1, bit-identical to the same step inside ``selective_scan``.

The state is fp32, or int8 and requantized at every step (``int8_state``). Legend: B batch, L tokens, E channels, N
d_state, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mambacompress.kernels.int8_state import Int8State, check_state, quantize_state
from mambacompress.kernels.registry import choose
from mambacompress.kernels.selective_scan import ScanScales, check_scales, check_shapes, selective_scan
from mambacompress.kernels.selective_scan.reference import compute_dtype
from mambacompress.kernels.selective_state_update.cpu import update_int8_cpu
from mambacompress.kernels.selective_state_update.reference import (
    selective_state_update_int8_reference,
    selective_state_update_reference,
)
from mambacompress.kernels.tolerances import FORWARD, TRITON_FORWARD, rms_ratio


def selective_state_update(
    state_BEN: Tensor, u_BE: Tensor, dt_BE: Tensor, A_EN: Tensor, B_BGN: Tensor, C_BGN: Tensor,
    D_E: Tensor | None = None,
    z_BE: Tensor | None = None, dt_bias_E: Tensor | None = None, *, dt_softplus: bool = True,
    z_scale_E: Tensor | None = None, scales: ScanScales | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of ``selective_scan`` from ``state_BEN``, which is not changed.

    u, dt, z: [B, E]; B, C: [B, G, N]; the rest as there. Returns (y [B, E], new state [B, E, N]).
    """
    _check_step(u_BE, B_BGN)
    y_BLE, new_BEN = selective_scan(
        u_BE[:, None], dt_BE[:, None], A_EN, B_BGN[:, None], C_BGN[:, None], D_E, None if z_BE is None else z_BE[:,
                                                                                                                 None],
        dt_bias_E, dt_softplus=dt_softplus, z_scale_E=z_scale_E, initial_state_BEN=state_BEN, scales=scales)
    return y_BLE[:, 0], new_BEN


def selective_state_update_int8(
    state: Int8State, u_BE: Tensor, dt_BE: Tensor, A_EN: Tensor, B_BGN: Tensor, C_BGN: Tensor,
    D_E: Tensor | None = None, z_BE: Tensor | None = None, dt_bias_E: Tensor | None = None, *,
    dt_softplus: bool = True, z_scale_E: Tensor | None = None, scales: ScanScales | None = None,
) -> tuple[Tensor, Int8State]:
    """The same step from an int8 state, which is not changed. No gradients.

    Returns (y [B, E], as the fp32 state before it is rounded gives it, and the new state).
    """
    _check_step(u_BE, B_BGN)
    check_state("selective_state_update_int8", state, (len(u_BE), *A_EN.shape))
    z_BLE = None if z_BE is None else z_BE[:, None]
    check_shapes(u_BE[:, None], dt_BE[:, None], A_EN, B_BGN[:, None], C_BGN[:, None], D_E, z_BLE, dt_bias_E, z_scale_E,
                 None, None)
    check_scales({"u": u_BE, "dt": dt_BE, "B": B_BGN, "C": C_BGN, "z": z_BE}, scales)
    lacks = ["fp64 inputs"] if compute_dtype(dt_BE, A_EN, B_BGN, C_BGN) == torch.float64 else []
    ran = choose("selective_state_update_int8", u_BE.device, u_BE.dtype, lacks, lacks)
    return _step(ran)(state, u_BE, dt_BE, A_EN, B_BGN, C_BGN, D_E, z_BE, dt_bias_E, dt_softplus=dt_softplus,
                      z_scale_E=z_scale_E, scales=scales)


def _step(backend: str) -> Callable[..., tuple[Tensor, Int8State]]:
    if backend == "triton":
        from mambacompress.kernels.selective_state_update.triton import update_int8_triton

        return update_int8_triton
    return update_int8_cpu if backend == "native" else selective_state_update_int8_reference


def selective_steps_int8(
    state: Int8State, u_BLE: Tensor, dt_BLE: Tensor, A_EN: Tensor, B_BLGN: Tensor, C_BLGN: Tensor,
    D_E: Tensor | None = None, z_BLE: Tensor | None = None, dt_bias_E: Tensor | None = None, *,
    z_scale_E: Tensor | None = None, scales: ScanScales | None = None,
) -> tuple[Tensor, Int8State]:
    """``selective_state_update_int8`` for one token after another: a text read at once gives the bits of its steps."""
    y_L = []
    for t in range(u_BLE.shape[1]):
        y_BE, state = selective_state_update_int8(
            state, u_BLE[:, t], dt_BLE[:, t], A_EN, B_BLGN[:, t], C_BLGN[:, t], D_E,
            None if z_BLE is None else z_BLE[:, t], dt_bias_E, z_scale_E=z_scale_E, scales=scales)
        y_L.append(y_BE)
    return (torch.stack(y_L, 1) if y_L else u_BLE), state


def check(device: torch.device | str = "cpu") -> tuple[float, float]:
    """(worst RMS ratio to the reference, its tolerance) of a step from an int8 state: of y, and of the new scales."""
    generator = torch.Generator().manual_seed(0)
    h, u, dt, A, B, C, D, z = (torch.randn(shape, generator=generator).to(device) for shape in (
        (2, 40, 16), (2, 40), (2, 40), (40, 16), (2, 1, 16), (2, 1, 16), (40,), (2, 40)))
    (y, new), (y_ref, new_ref) = (step(quantize_state(h), u, dt, -A.abs(), B, C, D, z) for step in (
        selective_state_update_int8, selective_state_update_int8_reference))
    tolerance = FORWARD if y.device.type == "cpu" else TRITON_FORWARD
    return max(rms_ratio(y, y_ref), rms_ratio(new.scale, new_ref.scale)), tolerance[torch.float32]


def _check_step(u_BE: Tensor, B_BGN: Tensor) -> None:
    if u_BE.dim() != 2 or B_BGN.dim() != 3:
        raise ValueError(f"selective_state_update wants u [B, E] and B [B, G, N], not {tuple(u_BE.shape)} and "
                         f"{tuple(B_BGN.shape)}")


__all__ = ["check", "selective_state_update", "selective_state_update_int8", "selective_state_update_int8_reference",
           "selective_state_update_reference", "selective_steps_int8"]
