"""selective_scan: the recurrence of Mamba-1 over a sequence, forward and backward, from any state.

Legend: B batch, L tokens, E channels, N d_state, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mambacompress.kernels.registry import choose
from mambacompress.kernels.selective_scan.cpu import resets, selective_scan_cpu, windowed_scan_cpu
from mambacompress.kernels.selective_scan.reference import (
    compute_dtype,
    dequantize,
    selective_scan_reference,
    selective_scan_states_reference,
)
from mambacompress.kernels.tolerances import compare

_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class ScanScales:
    """What int8 inputs of the scan are multiplied by: a number, or a tensor over the last axes; None: not int8.

    dt's scale applies before the bias and softplus.
    """

    u: Tensor | float | None = None
    dt: Tensor | float | None = None
    B: Tensor | float | None = None
    C: Tensor | float | None = None
    z: Tensor | float | None = None

    def tensors(self) -> list[Tensor]:
        """Those that are tensors."""
        return [scale for scale in (self.u, self.dt, self.B, self.C, self.z) if isinstance(scale, Tensor)]


def selective_scan(
    u_BLE: Tensor, dt_BLE: Tensor, A_EN: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, D_E: Tensor | None = None,
    z_BLE: Tensor | None = None, dt_bias_E: Tensor | None = None, *, dt_softplus: bool = True,
    z_scale_E: Tensor | None = None, initial_state_BEN: Tensor | None = None, reverse: bool = False,
    window: int | None = None, seq_idx_BL: Tensor | None = None, scales: ScanScales | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt A) h_{t-1} + dt B u;  y = C . h + D u, times z * sigmoid(z_scale * z) where z is given.

    u, dt, z: [B, L, E]; B, C: [B, L, G, N] with E divisible by G; A: [E, N], the *negative* real matrix; D, dt_bias,
    z_scale: [E]. dt = softplus(dt + dt_bias) where ``dt_softplus``. initial_state: [B, E, N], zeros where None.
    reverse: from the last token to the first. window: K of the locally bi-directional scan. seq_idx: [B, L]; the state
    restarts from zero where it changes. scales: the tensors it names are int8.

    Returns (y [B, L, E] in u's dtype, fp32 for int8; the state after the last token read [B, E, N], fp32 or fp64).
    Differentiable, in the scales of int8 inputs too. Raises ValueError where shapes do not fit,
    TypeError where int8 comes without scales.
    """
    tensors = (u_BLE, dt_BLE, A_EN, B_BLGN, C_BLGN, D_E, z_BLE, dt_bias_E)
    _check(tensors, z_scale_E, initial_state_BEN, seq_idx_BL, window, scales)
    if scales is not None and _learns(*tensors, z_scale_E, initial_state_BEN, *scales.tensors()):
        tensors, scales = _dequantized(tensors, scales), None  # the values native code would make in registers
    lacks = _lacks(tensors, initial_state_BEN)
    ran = choose("selective_scan", u_BLE.device, u_BLE.dtype, lacks, lacks)
    if ran == "reference":
        return selective_scan_reference(
            *tensors, dt_softplus=dt_softplus, z_scale_E=z_scale_E, initial_state_BEN=initial_state_BEN,
            reverse=reverse, window=window, seq_idx_BL=seq_idx_BL, scales=scales)
    run = _scan(ran)
    if window is not None:
        return windowed_scan_cpu(
            *tensors, dt_softplus=dt_softplus, z_scale_E=z_scale_E, initial_state_BEN=initial_state_BEN,
            reverse=reverse, window=window, seq_idx_BL=seq_idx_BL, scales=scales, run=run)
    y_BLE, final_BEN = run(
        *tensors, dt_softplus=dt_softplus, z_scale_E=z_scale_E, initial_state_BEN=initial_state_BEN, reverse=reverse,
        resets_BL=resets(seq_idx_BL, reverse), scales=scales)[:2]
    return y_BLE, final_BEN


def _scan(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    if backend == "triton":
        from mambacompress.kernels.selective_scan.triton_backward import selective_scan_triton

        return selective_scan_triton
    return selective_scan_cpu


def selective_scan_states(
    u_BLE: Tensor, dt_BLE: Tensor, A_EN: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, D_E: Tensor | None = None,
    z_BLE: Tensor | None = None, dt_bias_E: Tensor | None = None, *, dt_softplus: bool = True,
    z_scale_E: Tensor | None = None, initial_state_BEN: Tensor | None = None, reverse: bool = False,
    window: int | None = None, seq_idx_BL: Tensor | None = None, scales: ScanScales | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``selective_scan`` and, last, the state every token read its output from: [B, L, E, N], fp32 or fp64.

    N times the memory of an fp32 output: for studying states, or restarting anywhere. y and the final state are those
    of ``selective_scan``, bit for bit. Differentiable in the reference, which a windowed scan takes too.
    """
    tensors = (u_BLE, dt_BLE, A_EN, B_BLGN, C_BLGN, D_E, z_BLE, dt_bias_E)
    _check(tensors, z_scale_E, initial_state_BEN, seq_idx_BL, window, scales)
    lacks = _lacks(tensors, initial_state_BEN)
    lacks += [what for what, asked in (("the states of a windowed scan", window is not None),
                                       ("gradients of all states", _learns(
        *tensors, z_scale_E, initial_state_BEN, *(() if scales is None else scales.tensors())))) if asked]
    if choose("selective_scan_states", u_BLE.device, u_BLE.dtype, lacks) == "native":
        return selective_scan_cpu(
            *tensors, dt_softplus=dt_softplus, z_scale_E=z_scale_E, initial_state_BEN=initial_state_BEN,
            reverse=reverse, resets_BL=resets(seq_idx_BL, reverse), scales=scales, states=True)
    return selective_scan_states_reference(
        *tensors, dt_softplus=dt_softplus, z_scale_E=z_scale_E, initial_state_BEN=initial_state_BEN, reverse=reverse,
        window=window, seq_idx_BL=seq_idx_BL, scales=scales)


def _check(tensors: _Tensors, z_scale: Tensor | None, state: Tensor | None, seq_idx: Tensor | None,
           window: int | None, scales: ScanScales | None) -> None:
    u, dt, A, B, C, D, z, dt_bias = tensors
    check_shapes(u, dt, A, B, C, D, z, dt_bias, z_scale, state, seq_idx)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    check_scales({"u": u, "dt": dt, "B": B, "C": C, "z": z}, scales)


def _lacks(tensors: _Tensors, state: Tensor | None) -> list[str]:
    """What native code and Triton cannot do of a call."""
    u, dt, A, B, C = tensors[:5]
    return [what for what, asked in (
        ("fp64 inputs", compute_dtype(dt, A, B, C, state) == torch.float64), ("an empty sequence", u.shape[1] == 0))
        if asked]


def _dequantized(tensors: _Tensors, scales: ScanScales) -> _Tensors:
    """The inputs in fp32, times their scales."""
    u, dt, A, B, C, D, z, dt_bias = tensors
    u, dt, B, C = (dequantize(t, getattr(scales, name), torch.float32) for name, t in
                   (("u", u), ("dt", dt), ("B", B), ("C", C)))
    return u, dt, A, B, C, D, None if z is None else dequantize(z, scales.z, torch.float32), dt_bias


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_shapes(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
                 dt_bias: Tensor | None, z_scale: Tensor | None, state: Tensor | None, seq_idx: Tensor | None) -> None:
    """Raise ValueError, naming the tensor, where shapes do not fit u [B, L, E] and A [E, N]."""
    if u.dim() != 3 or A.dim() != 2 or B.dim() != 4:
        raise ValueError(f"selective_scan wants u [B, L, E], A [E, N] and B [B, L, G, N], not {tuple(u.shape)}, "
                         f"{tuple(A.shape)} and {tuple(B.shape)}")
    batch, length, channels = u.shape
    states, groups = A.shape[1], B.shape[2]
    if groups < 1 or channels % groups:
        raise ValueError(f"selective_scan: {channels} channels do not divide into {groups} groups")
    wanted = {"dt": (dt, (batch, length, channels)), "A": (A, (channels, states)), 
              "B": (B, (batch, length, groups, states)),
              "C": (C, (batch, length, groups, states)), "D": (D, (channels,)), "z": (z, (batch, length, channels)),
              "dt_bias": (dt_bias, (channels,)), "z_scale": (z_scale, (channels,)),
              "initial_state": (state, (batch, channels, states)), "seq_idx": (seq_idx, (batch, length))}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"selective_scan: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def check_scales(tensors: dict[str, Tensor | None], scales: ScanScales | None) -> None:
    """Raise TypeError where an int8 tensor has no scale."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.int8 and getattr(scales, name, None) is None:
            raise TypeError(f"selective_scan: {name} is int8 and has no scale; pass scales=ScanScales({name}=...)")


def check(device: torch.device | str = "cpu") -> tuple[float, float]:
    """(RMS ratio of what runs here to the fp64 reference, its tolerance), outputs and gradients of a small problem."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device)

    leaves = [randn(2, 35, 40), randn(2, 35, 40), -randn(40, 16).abs(), randn(2, 35, 1, 16), randn(2, 35, 1, 16),
              randn(40),
              randn(2, 35, 40)]
    return compare(selective_scan, selective_scan_reference, leaves)


__all__ = ["ScanScales", "check", "selective_scan", "selective_scan_reference", "selective_scan_states",
           "selective_scan_states_reference"]
