"""selective_state_update: one decode step of Mamba-1, bit-identical to the same step inside ``selective_scan``.

Legend: B batch, E channels, N d_state, G groups.
"""

from __future__ import annotations

from torch import Tensor

from mambacompress.kernels.selective_scan import ScanScales, selective_scan
from mambacompress.kernels.selective_state_update.reference import selective_state_update_reference


def selective_state_update(
    state_BEN: Tensor, u_BE: Tensor, dt_BE: Tensor, A_EN: Tensor, B_BGN: Tensor, C_BGN: Tensor,
    D_E: Tensor | None = None,
    z_BE: Tensor | None = None, dt_bias_E: Tensor | None = None, *, dt_softplus: bool = True,
    z_scale_E: Tensor | None = None, scales: ScanScales | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of ``selective_scan`` from ``state_BEN``, which is not changed.

    u, dt, z: [B, E]; B, C: [B, G, N]; the rest as there. Returns (y [B, E], new state [B, E, N]).
    """
    if u_BE.dim() != 2 or B_BGN.dim() != 3:
        raise ValueError(f"selective_state_update wants u [B, E] and B [B, G, N], not {tuple(u_BE.shape)} and "
                         f"{tuple(B_BGN.shape)}")
    y_BLE, new_BEN = selective_scan(
        u_BE[:, None], dt_BE[:, None], A_EN, B_BGN[:, None], C_BGN[:, None], D_E, None if z_BE is None else z_BE[:,
                                                                                                                 None],
        dt_bias_E, dt_softplus=dt_softplus, z_scale_E=z_scale_E, initial_state_BEN=state_BEN, scales=scales)
    return y_BLE[:, 0], new_BEN


__all__ = ["selective_state_update", "selective_state_update_reference"]
