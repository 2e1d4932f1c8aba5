"""Readable torch for the RMS norm and the gated group norm, with the rounding of the stock modules.

rms_norm: x / sqrt(mean(x²) + eps) in fp32 (fp64 where x is fp64), rounded to x's dtype, then times the weight.
gated_rms_norm: the same on x * silu(z) in groups of channels (Mamba-2: group size = d_inner / groups). torch computes
the exponential of the last few elements of a tensor with other code than the rest, so here a token's result may
differ in the last bit with the number of tokens; the native kernel's does not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacompress.kernels.quantized import quantized


def rms_norm_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """See ``rms_norm``."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide)
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if weight is None else weight * y


def gated_rms_norm_reference(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """See ``gated_rms_norm``."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = (x.to(wide) * F.silu(z.to(wide))).unflatten(-1, (-1, group_size))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.flatten(-2).to(x.dtype)


def rms_norm_int8_reference(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float,
                            act_scale: Tensor | None, act_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """See ``rms_norm_int8``; the sum is empty where there is no residual."""
    total = x if residual is None else x + residual
    codes, scales = quantized(rms_norm_reference(total, weight, eps), act_scale, act_bits)
    return codes, scales, x.new_empty(0) if residual is None else total
