"""causal_conv1d and same_conv1d: the short depthwise convolution in front of the scan, with its activation and state.

``causal_conv1d`` looks back only and carries a state; ``same_conv1d`` is centred (vision), and has none. Inputs and
weights may be int8 with a scale a channel: the sum of products is then exact, whatever runs it.

Legend: B batch, L tokens, E channels, K width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mambacompress.kernels.causal_conv1d.cpu import MAX_WIDTH, causal_conv1d_cpu
from mambacompress.kernels.causal_conv1d.reference import (
    causal_conv1d_reference,
    last_inputs,
    same_conv1d_reference,
    scale_of_sums,
    tokens_ahead,
)
from mambacompress.kernels.registry import choose
from mambacompress.kernels.selective_scan.reference import same_as_previous
from mambacompress.kernels.tolerances import compare


def causal_conv1d(
    x_BLE: Tensor, weight_EK: Tensor, bias_E: Tensor | None = None, *, activation: bool = True,
    act_scale_E: Tensor | None = None, initial_state: Tensor | None = None, seq_idx_BL: Tensor | None = None,
    x_scale: Tensor | float | None = None, weight_scale_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over tokens, then y * sigmoid(act_scale * y) where ``activation``.

    x: [B, L, E], any L >= 0; weight: [E, K]; bias, act_scale: [E]. initial_state: [B, K-1, E], the inputs before the
    first token (zeros where None). seq_idx: [B, L]; taps do not reach over a change. x_scale: a number or [E], where x
    is int8 (then the state holds codes too); weight_scale: [E], where the weight is. Returns (y [B, L, E] in x's dtype,
    fp32 for int8; the last K-1 inputs [B, K-1, E]). Differentiable but for int8 in native code. Raises ValueError where
    shapes do not fit, TypeError where int8 comes without its scale.
    """
    check_shapes("causal_conv1d", x_BLE, weight_EK, bias_E, act_scale_E, initial_state, seq_idx_BL)
    check_scales("causal_conv1d", x_BLE, weight_EK, x_scale, weight_scale_E, initial_state)
    lacks = _lacks(x_BLE, weight_EK, bias_E, act_scale_E, x_scale, weight_scale_E)
    ran = choose("causal_conv1d", x_BLE.device, x_BLE.dtype, lacks, lacks)
    if ran != "reference":
        resets_BL = None if seq_idx_BL is None else ~same_as_previous(seq_idx_BL)
        y_BLE = _conv(ran)(x_BLE, weight_EK, bias_E, activation=activation, act_scale_E=act_scale_E,
                           initial_state=initial_state, resets_BL=resets_BL,
                           scale_E=scale_of_sums(x_scale, weight_scale_E, x_BLE.shape[2], x_BLE.device))
        return y_BLE, last_inputs(x_BLE, initial_state, weight_EK.shape[1] - 1, seq_idx_BL)
    return causal_conv1d_reference(x_BLE, weight_EK, bias_E, activation=activation, act_scale_E=act_scale_E,
                                   initial_state=initial_state, seq_idx_BL=seq_idx_BL, x_scale=x_scale,
                                   weight_scale_E=weight_scale_E)


def same_conv1d(
    x_BLE: Tensor, weight_EK: Tensor, bias_E: Tensor | None = None, *, activation: bool = True,
    act_scale_E: Tensor | None = None, x_scale: Tensor | float | None = None, weight_scale_E: Tensor | None = None,
) -> Tensor:
    """The same with taps on both sides of a token, (K - 1) // 2 of them before it, zeros outside: y [B, L, E].

    Arguments as in ``causal_conv1d``; it sees the future, so it has no state and packs no sequences.
    """
    check_shapes("same_conv1d", x_BLE, weight_EK, bias_E, act_scale_E, None, None)
    check_scales("same_conv1d", x_BLE, weight_EK, x_scale, weight_scale_E, None)
    lacks = _lacks(x_BLE, weight_EK, bias_E, act_scale_E, x_scale, weight_scale_E)
    ran = choose("same_conv1d", x_BLE.device, x_BLE.dtype, lacks, lacks)
    if ran != "reference":
        return _conv(ran)(x_BLE, weight_EK, bias_E, activation=activation, act_scale_E=act_scale_E,
                          initial_state=None, resets_BL=None,
                          scale_E=scale_of_sums(x_scale, weight_scale_E, x_BLE.shape[2], x_BLE.device),
                          ahead=tokens_ahead(weight_EK.shape[1]))
    return same_conv1d_reference(x_BLE, weight_EK, bias_E, activation=activation, act_scale_E=act_scale_E,
                                 x_scale=x_scale, weight_scale_E=weight_scale_E)


def _conv(backend: str) -> Callable[..., Tensor]:
    if backend == "triton":
        from mambacompress.kernels.causal_conv1d.triton import causal_conv1d_triton

        return causal_conv1d_triton
    return causal_conv1d_cpu


def _lacks(x: Tensor, weight: Tensor, bias: Tensor | None, act_scale: Tensor | None, x_scale: Tensor | float | None,
           weight_scale: Tensor | None) -> list[str]:
    """What native code and Triton cannot do of a call."""
    quantized = x_scale is not None or weight_scale is not None
    learns = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (
        x, weight, bias, act_scale, x_scale, weight_scale))
    return [what for what, asked in (
        ("fp64 weights", weight.dtype == torch.float64), ("an empty sequence", x.shape[1] == 0),
        (f"widths above {MAX_WIDTH}", weight.shape[1] > MAX_WIDTH),
        ("gradients of int8 inputs or weights", quantized and learns)) if asked]


def check_shapes(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, act_scale: Tensor | None,
                 state: Tensor | None, seq_idx: Tensor | None) -> None:
    """Raise ValueError, naming the tensor, where shapes do not fit x [B, L, E] and weight [E, K]."""
    if x.dim() != 3 or weight.dim() != 2:
        raise ValueError(f"{op} wants x [B, L, E] and weight [E, K], not {tuple(x.shape)} and {tuple(weight.shape)}")
    batch, length, channels = x.shape
    wanted = {"weight": (weight, (channels, weight.shape[1])), "bias": (bias, (channels,)),
              "act_scale": (act_scale, (channels,)), "initial_state": (state, (batch, weight.shape[1] - 1, channels)),
              "seq_idx": (seq_idx, (batch, length))}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def check_scales(op: str, x: Tensor, weight: Tensor, x_scale: Tensor | float | None, weight_scale: Tensor | None,
                 state: Tensor | None) -> None:
    """Raise TypeError where int8 comes without its scale or a scale without int8, ValueError where a scale does not
    fit."""
    channels = x.shape[2]
    for name, tensor, scale in (("x", x, x_scale), ("weight", weight, weight_scale)):
        if (tensor.dtype == torch.int8) != (scale is not None):
            raise TypeError(f"{op}: {name} is {tensor.dtype}; it takes {name}_scale exactly where it is int8")
        if isinstance(scale, Tensor) and scale.numel() != 1 and tuple(scale.shape) != (channels,):
            raise ValueError(f"{op}: {name}_scale has shape {tuple(scale.shape)}, expected ({channels},)")
    if state is not None and (state.dtype == torch.int8) != (x.dtype == torch.int8):
        raise TypeError(f"{op}: x is {x.dtype} and initial_state {state.dtype}: both hold codes, or neither")


def check(device: torch.device | str = "cpu") -> tuple[float, float]:
    """(RMS ratio of what runs here to the fp64 reference, its tolerance), outputs and gradients of a small problem."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 35, 40), (40, 4), (40,))]
    leaves = [leaf.to(device) for leaf in leaves]
    causal, tolerance = compare(causal_conv1d, causal_conv1d_reference, leaves)
    same, _ = compare(lambda *t: (same_conv1d(*t), t[0]), lambda *t: (same_conv1d_reference(*t), t[0]), leaves)
    return max(causal, same), tolerance


__all__ = ["causal_conv1d", "causal_conv1d_reference", "check", "same_conv1d", "same_conv1d_reference"]
