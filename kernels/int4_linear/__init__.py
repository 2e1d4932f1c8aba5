"""int4_linear: y = x Wᵀ with 4-bit weights in groups along the input, and int8, int4-range or float activations.

Two codes a byte: the low nibble is the even column; stored as code + 8. A group's integer product is exact in int32; the
groups' products are scaled and added in order, so a row's result does not depend on the other rows.

Legend: M rows (tokens), I inputs, O outputs, g group size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambacompress.kernels.int8_linear import check, int_matmul, quantize_rows


def unpack(qweight: Tensor) -> Tensor:
    """uint8 [O, I/2] -> int8 codes [O, I] in -8..7."""
    return torch.stack([qweight & 15, qweight >> 4], -1).flatten(-2).to(torch.int8) - 8


def int4_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias_O: Tensor | None = None, *, group_size: int | None = None,
                activation: str = "none", act_scale: Tensor | None = None, act_bits: int = 8) -> Tensor:
    """x [..., I] times the packed weight: [..., O] in x's dtype.

    qweight: uint8 [O, I/2]; scale: fp16 or fp32 [O, I/g], g = ``group_size`` (I where None). Activations as in int8_linear.
    Raises ValueError for an unknown mode or shapes that do not fit.
    """
    inputs = 2 * qweight.shape[1]
    check(x, inputs, activation)
    group = inputs if group_size is None else group_size
    if scale.shape != (qweight.shape[0], inputs // group) or inputs % group:
        raise ValueError(f"scales have shape {tuple(scale.shape)}, groups of {group} need {(qweight.shape[0], inputs // group)}")
    return torch.ops.mambacompress.int4_linear(x, qweight, scale, bias_O, group, activation, act_scale, act_bits)


@torch.library.custom_op("mambacompress::int4_linear", mutates_args=())
def _int4_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, group: int, activation: str,
                 act_scale: Tensor | None, act_bits: int) -> Tensor:
    x_MI = x.reshape(-1, x.shape[-1])
    codes_OI = unpack(qweight)
    if activation == "none":
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight_OI = (codes_OI.unflatten(1, (-1, group)).to(dtype) * scale.to(dtype)[..., None]).flatten(1)
        y_MO = x_MI.to(dtype) @ weight_OI.t()
    else:
        codes_MI, row_scale = quantize_rows(x_MI, activation, act_scale, act_bits)
        y_MO = torch.zeros(x_MI.shape[0], codes_OI.shape[0], device=x.device)
        for i, start in enumerate(range(0, codes_OI.shape[1], group)):
            part = slice(start, start + group)
            product = int_matmul(codes_MI[:, part].contiguous(), codes_OI[:, part].contiguous())
            y_MO = y_MO + product.float() * scale[:, i].float()
        y_MO = y_MO * row_scale
    if bias is not None:
        y_MO = y_MO + bias.to(y_MO.dtype)
    return y_MO.to(x.dtype).reshape(*x.shape[:-1], qweight.shape[0])


@_int4_linear.register_fake
def _(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, group: int, activation: str,
      act_scale: Tensor | None, act_bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


__all__ = ["int4_linear", "unpack"]
