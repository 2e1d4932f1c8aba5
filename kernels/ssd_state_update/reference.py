"""Readable torch for one decode step of Mamba-2: the sequential law over one token.

Legend: B batch, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from torch import Tensor

from mambacompress.kernels.ssd_scan.reference import ssd_scan_sequential


def ssd_state_update_reference(
    state_BHPN: Tensor, x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None, *, dt_softplus: bool = True, dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Tensor]:
    """See ``ssd_state_update``."""
    y, new = ssd_scan_sequential(x_BHP[:, None], dt_BH[:, None], A_H, B_BGN[:, None], C_BGN[:, None], D_H, dt_bias_H,
                                 dt_softplus=dt_softplus, dt_limit=dt_limit, initial_state_BHPN=state_BHPN)
    return y[:, 0], new
