"""int8_linear: y = x Wᵀ with int8 weights, one scale a row, and int8 (W8A8) or float (W8A16) activations.

W8A8 quantizes each token's row to integers (its own scale, or one static scale), multiplies in int32, which is exact, and
scales the sum once: the result of a row does not depend on the other rows, so prefill and decode agree bit for bit.

Legend: M rows (tokens), I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

MODES = ("token", "tensor", "none")


def quantize_rows(x_MI: Tensor, activation: str, act_scale: Tensor | None, act_bits: int) -> tuple[Tensor, Tensor]:
    """(codes int8 [M, I], scale fp32 [M, 1] or []). token: scale = max|row| / q; tensor: the given scale. q = 127 or 7.

    Rounding is half to even, codes are clamped to ±q.
    """
    limit = 127 if act_bits == 8 else 2 ** (act_bits - 1) - 1
    x_MI = x_MI.float()
    if activation == "token":
        scale = x_MI.abs().amax(dim=-1, keepdim=True) / limit
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    elif act_scale is None:
        raise ValueError("static activations need act_scale")
    else:
        scale = act_scale.float()
    return torch.clamp(torch.round(x_MI / scale), -limit, limit).to(torch.int8), scale


def int_matmul(codes_MI: Tensor, weight_OI: Tensor) -> Tensor:
    """Exact int32 product [M, O] of two int8 tensors."""
    return torch._int_mm(codes_MI, weight_OI.t())


def int8_linear(x: Tensor, qweight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None, *, activation: str = "token",
                act_scale: Tensor | None = None, act_bits: int = 8) -> Tensor:
    """x [..., I] times the packed weight: [..., O] in x's dtype.

    qweight: int8 [O, I]; scale: fp32 [O]; bias: [O]. activation: ``token`` (dynamic, a scale a row), ``tensor`` (static,
    ``act_scale``) or ``none`` (float activations). act_bits: 8, or 4 for int4-range codes on the same path.
    Raises ValueError for an unknown mode or shapes that do not fit.
    """
    check(x, qweight_OI.shape[1], activation)
    return torch.ops.mambacompress.int8_linear(x, qweight_OI, scale_O, bias_O, activation, act_scale, act_bits)


@torch.library.custom_op("mambacompress::int8_linear", mutates_args=())
def _int8_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, activation: str, act_scale: Tensor | None,
                 act_bits: int) -> Tensor:
    x_MI = x.reshape(-1, x.shape[-1])
    if activation == "none":
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        y_MO = x_MI.to(dtype) @ qweight.to(dtype).t() * scale.to(dtype)
    else:
        codes_MI, row_scale = quantize_rows(x_MI, activation, act_scale, act_bits)
        y_MO = int_matmul(codes_MI, qweight).float() * row_scale * scale.float()
    if bias is not None:
        y_MO = y_MO + bias.to(y_MO.dtype)
    return y_MO.to(x.dtype).reshape(*x.shape[:-1], qweight.shape[0])


@_int8_linear.register_fake
def _(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, activation: str, act_scale: Tensor | None,
      act_bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def check(x: Tensor, inputs: int, activation: str) -> None:
    """Raise ValueError for an unknown mode or an input of another width."""
    if activation not in MODES:
        raise ValueError(f"unknown activation mode {activation!r}; known: {', '.join(MODES)}")
    if x.shape[-1] != inputs:
        raise ValueError(f"the input has {x.shape[-1]} channels, the packed weight takes {inputs}")


__all__ = ["MODES", "int8_linear", "int_matmul", "quantize_rows"]
