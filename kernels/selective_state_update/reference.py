"""Readable torch for one decode step of the selective scan: the scan over a sequence of one token.

With an int8 state the step is the fp32 one, between dequantizing and quantizing: ``int8_state`` says how, and why so.

Legend: B batch, E channels, N d_state, G groups.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mambacompress.kernels.int8_state import Int8State, quantize_state
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


def selective_state_update_int8_reference(
    state: Int8State, u_BE: Tensor, dt_BE: Tensor, A_EN: Tensor, B_BGN: Tensor, C_BGN: Tensor,
    D_E: Tensor | None = None, z_BE: Tensor | None = None, dt_bias_E: Tensor | None = None, *,
    dt_softplus: bool = True, z_scale_E: Tensor | None = None, scales: Any = None,
) -> tuple[Tensor, Int8State]:
    """See ``selective_state_update_int8``."""
    y_BE, h_BEN = selective_state_update_reference(
        state.dequantized(), u_BE, dt_BE, A_EN, B_BGN, C_BGN, D_E, z_BE, dt_bias_E, dt_softplus=dt_softplus,
        z_scale_E=z_scale_E, scales=scales)
    return y_BE, quantize_state(h_BEN, state.step + 1)
