"""ssd_state_update: one decode step of Mamba-2, in native code bit-identical to the same step inside ``ssd_scan``.

Legend: B batch, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from torch import Tensor

from mambacompress.kernels.ssd_scan import ssd_scan
from mambacompress.kernels.ssd_state_update.reference import ssd_state_update_reference


def ssd_state_update(
    state_BHPN: Tensor, x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None, *, dt_softplus: bool = True, dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Tensor]:
    """One step of ``ssd_scan`` from ``state_BHPN``, which is not changed.

    x: [B, H, P]; dt: [B, H]; B, C: [B, G, N]; the rest as there. Returns (y [B, H, P], new state [B, H, P, N]).
    """
    if x_BHP.dim() != 3 or B_BGN.dim() != 3:
        raise ValueError(f"ssd_state_update wants x [B, H, P] and B [B, G, N], not {tuple(x_BHP.shape)} and "
                         f"{tuple(B_BGN.shape)}")
    y_BLHP, new_BHPN = ssd_scan(
        x_BHP[:, None], dt_BH[:, None], A_H, B_BGN[:, None], C_BGN[:, None], D_H, dt_bias_H, dt_softplus=dt_softplus,
        dt_limit=dt_limit, chunk_size=1, initial_state_BHPN=state_BHPN)
    return y_BLHP[:, 0], new_BHPN


__all__ = ["ssd_state_update", "ssd_state_update_reference"]
