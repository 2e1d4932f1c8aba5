"""rms_norm and gated_rms_norm: what stands in front of and behind a scan.

Legend: D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import native
from mambacompress.kernels.quantized import quantized
from mambacompress.kernels.rms_norm.cpu import rms_norm_native
from mambacompress.kernels.rms_norm.fused import (
    add_rms_norm,
    check_gated,
    check_norm,
    chosen,
    gated_rms_norm_int8,
    rms_norm_int8,
)
from mambacompress.kernels.rms_norm.reference import gated_rms_norm_reference, rms_norm_reference
from mambacompress.kernels.tolerances import TRITON_FORWARD

TOLERANCE = 1e-6  # RMS ratio to the reference in fp32


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension; x: [..., D], weight: [D] or None.

    The mean is taken in fp32 (fp64 for fp64); the result has x's dtype, or the weight's where that is wider.
    """
    check_norm("rms_norm", x, weight)
    ran = chosen("rms_norm", x, weight)
    if ran == "reference":
        return rms_norm_reference(x, weight, eps)
    if native.runs_directly(x, weight):
        return _norm(ran)(x, None, weight, eps, x.shape[-1])
    return _op(x, weight, eps, ran)


def _norm(backend: str) -> Callable[..., Tensor]:
    if backend == "triton":
        from mambacompress.kernels.rms_norm.triton import rms_norm_triton

        return rms_norm_triton
    return rms_norm_native


@torch.library.custom_op("mambacompress::rms_norm", mutates_args=())
def _op(x: Tensor, weight: Tensor | None, eps: float, backend: str) -> Tensor:
    return _norm(backend)(x, None, weight, eps, x.shape[-1])


@_op.register_fake
def _fake(x: Tensor, weight: Tensor | None, eps: float, backend: str) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
    """With n = x r, r = 1 / sqrt(mean(x²) + eps), g = dy weight: dx = r (g - n mean(g n)), dweight = sum(dy n)."""
    x, weight = ctx.saved_tensors
    wide, dy = x.float(), dy.float()
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
    n, g = wide * r, dy if weight is None else dy * weight.float()
    dx = (r * (g - n * (g * n).mean(-1, keepdim=True))).to(x.dtype)
    return dx, None if weight is None else (dy * n).flatten(0, -2).sum(0).to(weight.dtype), None, None


_op.register_autograd(_backward, setup_context=_setup)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """RMS norm of x * silu(z) in groups of ``group_size`` channels, times weight; x, z: [..., D], weight: [D]."""
    check_gated("gated_rms_norm", x, z, weight, group_size)
    if z.dtype == x.dtype and native.runs_directly(x, z, weight):  # with gradients the reference: torch's own backward
        ran = chosen("gated_rms_norm", x, z, weight)
        if ran != "reference":
            return _norm(ran)(x, z, weight, eps, group_size)
    return gated_rms_norm_reference(x, z, weight, eps, group_size)


def check(device: torch.device | str = "cpu") -> tuple[float, float]:
    """(worst RMS ratio to the reference, tolerance) on this machine, for ``doctor``."""
    generator = torch.Generator().manual_seed(0)
    x, z, weight = (t.to(device) for t in (torch.randn(5, 96, generator=generator),
                                           torch.randn(5, 96, generator=generator),
                                           torch.rand(96, generator=generator)))
    with torch.no_grad():
        pairs = [(rms_norm(x, weight), rms_norm_reference(x, weight)),
                 (gated_rms_norm(x, z, weight, 1e-5, 32), gated_rms_norm_reference(x, z, weight, 1e-5, 32))]
        for (codes, scales), (y, _) in zip((rms_norm_int8(x, weight)[:2], gated_rms_norm_int8(x, z, weight, 1e-5, 32)),
                                           list(pairs), strict=True):  # exactly the codes of what runs here
            pairs += [(a.float(), b.float()) for a, b in zip((codes, scales), quantized(y, None, 8), strict=True)]
    tolerance = TOLERANCE if x.device.type == "cpu" else TRITON_FORWARD[torch.float32]
    return max(float((y - r).norm() / r.norm()) for y, r in pairs), tolerance


__all__ = ["add_rms_norm", "check", "gated_rms_norm", "gated_rms_norm_int8", "gated_rms_norm_reference", "rms_norm",
           "rms_norm_int8", "rms_norm_reference"]
