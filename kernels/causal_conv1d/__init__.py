"""causal_conv1d: the short depthwise convolution in front of the scan, with its activation and its state.

Legend: B batch, L tokens, E channels, K width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambacompress.kernels.causal_conv1d.cpu import MAX_WIDTH, causal_conv1d_cpu
from mambacompress.kernels.causal_conv1d.reference import causal_conv1d_reference, last_inputs
from mambacompress.kernels.registry import choose
from mambacompress.kernels.selective_scan.reference import same_as_previous
from mambacompress.kernels.tolerances import compare


def causal_conv1d(
    x_BLE: Tensor, weight_EK: Tensor, bias_E: Tensor | None = None, *, activation: bool = True,
    act_scale_E: Tensor | None = None, initial_state: Tensor | None = None, seq_idx_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over tokens, then y * sigmoid(act_scale * y) where ``activation``.

    x: [B, L, E], any L >= 0; weight: [E, K]; bias, act_scale: [E]. initial_state: [B, K-1, E], the inputs before the
    first token (zeros where None). seq_idx: [B, L]; taps do not reach over a change. Returns (y [B, L, E] in x's dtype,
    the last K-1 inputs [B, K-1, E]). Raises ValueError where shapes do not fit.
    """
    check_shapes(x_BLE, weight_EK, bias_E, act_scale_E, initial_state, seq_idx_BL)
    lacks = [what for what, asked in (
        ("gradients for act_scale", act_scale_E is not None and act_scale_E.requires_grad),
        ("fp64 weights", weight_EK.dtype == torch.float64), ("an empty sequence", x_BLE.shape[1] == 0),
        (f"widths above {MAX_WIDTH}", weight_EK.shape[1] > MAX_WIDTH), ("int8 inputs",
                                                                        x_BLE.dtype == torch.int8)) if asked]
    if choose("causal_conv1d", x_BLE.device, x_BLE.dtype, lacks) == "native":
        resets_BL = None if seq_idx_BL is None else ~same_as_previous(seq_idx_BL)
        y_BLE = causal_conv1d_cpu(x_BLE, weight_EK, bias_E, activation=activation, act_scale_E=act_scale_E,
                                  initial_state=initial_state, resets_BL=resets_BL)
        return y_BLE, last_inputs(x_BLE, initial_state, weight_EK.shape[1] - 1, seq_idx_BL)
    return causal_conv1d_reference(x_BLE, weight_EK, bias_E, activation=activation, act_scale_E=act_scale_E,
                                   initial_state=initial_state, seq_idx_BL=seq_idx_BL)


def check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, act_scale: Tensor | None, state: Tensor | None,
                 seq_idx: Tensor | None) -> None:
    """Raise ValueError, naming the tensor, where shapes do not fit x [B, L, E] and weight [E, K]."""
    if x.dim() != 3 or weight.dim() != 2:
        raise ValueError(f"causal_conv1d wants x [B, L, E] and weight [E, K], not {tuple(x.shape)} and "
                         f"{tuple(weight.shape)}")
    batch, length, channels = x.shape
    wanted = {"weight": (weight, (channels, weight.shape[1])), "bias": (bias, (channels,)),
              "act_scale": (act_scale, (channels,)), "initial_state": (state, (batch, weight.shape[1] - 1, channels)),
              "seq_idx": (seq_idx, (batch, length))}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"causal_conv1d: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def check() -> tuple[float, float]:
    """(RMS ratio of what runs here to the fp64 reference, its tolerance), outputs and gradients of a small problem."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 35, 40), (40, 4), (40,))
    return compare(causal_conv1d, causal_conv1d_reference,
                   [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes])


__all__ = ["causal_conv1d", "causal_conv1d_reference", "check"]
