"""Readable torch for one decode step of the selective scan: the scan over a sequence of one token.

Legend: B batch, E channels, N d_state, G groups.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mambacompress.kernels.selective_scan.reference import selective_scan_reference


def selective_state_update_reference(
    state_BEN: Tensor, u_BE: Tensor, dt_BE: Tensor, A_EN: Tensor, B_BGN: Tensor, C_BGN: Tensor,
    D_E: Tensor | None = None,
    z_BE: Tensor | None = None, dt_bias_E: Tensor | None = None, *, dt_softplus: bool = True,
    z_scale_E: Tensor | None = None, scales: Any = None,
) -> tuple[Tensor, Tensor]:
    """See ``selective_state_update``."""
    y_BLE, state_BEN = selective_scan_reference(
        u_BE[:, None], dt_BE[:, None], A_EN, B_BGN[:, None], C_BGN[:, None], D_E, None if z_BE is None else z_BE[:,
                                                                                                                 None],
        dt_bias_E, dt_softplus=dt_softplus, z_scale_E=z_scale_E, initial_state_BEN=state_BEN, scales=scales)
    return y_BLE[:, 0], state_BEN
