"""rms_norm and gated_rms_norm: what stands in front of and behind a scan.

Legend: D channels.
"""

from __future__ import annotations

from torch import Tensor

from mambacompress.kernels.rms_norm.reference import gated_rms_norm_reference, rms_norm_reference


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension; x: [..., D], weight: [D] or None.

    The mean is taken in fp32 (fp64 for fp64); the result has x's dtype, or the weight's where that is wider.
    """
    if weight is not None and weight.shape[-1:] != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, the input {tuple(x.shape)}")
    return rms_norm_reference(x, weight, eps)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """RMS norm of x * silu(z) in groups of ``group_size`` channels, times weight; x, z: [..., D], weight: [D]."""
    if x.shape != z.shape or weight.shape[-1:] != x.shape[-1:]:
        raise ValueError(f"gated_rms_norm: x {tuple(x.shape)}, z {tuple(z.shape)} and weight {tuple(weight.shape)} "
                         "do not fit")
    if group_size < 1 or x.shape[-1] % group_size:
        raise ValueError(f"gated_rms_norm: groups of {group_size} do not divide {x.shape[-1]} channels")
    return gated_rms_norm_reference(x, z, weight, eps, group_size)


__all__ = ["gated_rms_norm", "gated_rms_norm_reference", "rms_norm", "rms_norm_reference"]
