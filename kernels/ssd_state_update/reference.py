"""Readable torch for one decode step of Mamba-2: the sequential law over one token.

With an int8 state the step is the fp32 one, between dequantizing and quantizing: ``int8_state`` says how, and why so. A
channel is then a row p of a head.

Legend: B batch, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from torch import Tensor

from mambacompress.kernels.int8_state import Int8State, quantize_state
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


def ssd_state_update_int8_reference(
    state: Int8State, x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor,
    D_H: Tensor | None = None, dt_bias_H: Tensor | None = None, *, dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Int8State]:
    """See ``ssd_state_update_int8``."""
    y_BHP, h_BHPN = ssd_state_update_reference(state.dequantized(), x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, dt_bias_H,
                                               dt_softplus=dt_softplus, dt_limit=dt_limit)
    return y_BHP, quantize_state(h_BHPN, state.step + 1)
