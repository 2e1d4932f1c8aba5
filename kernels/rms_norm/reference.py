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
