"""rms_norm and gated_rms_norm: what stands in front of and behind a scan.

Legend: D channels.
"""

from __future__ import annotations

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

TOLERANCE = 1e-6  # RMS ratio to the reference in fp32


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension; x: [..., D], weight: [D] or None.

    The mean is taken in fp32 (fp64 for fp64); the result has x's dtype, or the weight's where that is wider.
    """
    check_norm("rms_norm", x, weight)
    if not chosen("rms_norm", x, weight):
        return rms_norm_reference(x, weight, eps)
    return (_run if native.runs_directly(x, weight) else _op)(x, weight, eps)


def _run(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return rms_norm_native(x, None, weight, eps, x.shape[-1])


_op = torch.library.custom_op("mambacompress::rms_norm", _run, mutates_args=(), device_types="cpu")


@_op.register_fake
def _fake(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
    """With n = x r, r = 1 / sqrt(mean(x²) + eps), g = dy weight: dx = r (g - n mean(g n)), dweight = sum(dy n)."""
    x, weight = ctx.saved_tensors
    wide, dy = x.float(), dy.float()
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
    n, g = wide * r, dy if weight is None else dy * weight.float()
    dx = (r * (g - n * (g * n).mean(-1, keepdim=True))).to(x.dtype)
    return dx, None if weight is None else (dy * n).flatten(0, -2).sum(0).to(weight.dtype), None


_op.register_autograd(_backward, setup_context=_setup)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """RMS norm of x * silu(z) in groups of ``group_size`` channels, times weight; x, z: [..., D], weight: [D]."""
    check_gated("gated_rms_norm", x, z, weight, group_size)
    if z.dtype == x.dtype and _native("gated_rms_norm", x, z, weight):
        return rms_norm_native(x, z, weight, eps, group_size)
    return gated_rms_norm_reference(x, z, weight, eps, group_size)


def _native(op: str, x: Tensor, *others: Tensor | None) -> bool:
    """Whether native code runs this call. With gradients the reference does: its backward is torch's own."""
    return native.runs_directly(x, *others) and chosen(op, x, *others)


def check() -> tuple[float, float]:
    """(worst RMS ratio to the reference, tolerance) on this machine, for ``doctor``."""
    generator = torch.Generator().manual_seed(0)
    x, z, weight = (torch.randn(5, 96, generator=generator), torch.randn(5, 96, generator=generator),
                    torch.rand(96, generator=generator))
    with torch.no_grad():
        pairs = [(rms_norm(x, weight), rms_norm_reference(x, weight)),
                 (gated_rms_norm(x, z, weight, 1e-5, 32), gated_rms_norm_reference(x, z, weight, 1e-5, 32))]
        for (codes, scales), (y, _) in zip((rms_norm_int8(x, weight)[:2], gated_rms_norm_int8(x, z, weight, 1e-5, 32)),
                                           list(pairs), strict=True):  # exactly the codes of what runs here
            pairs += [(a.float(), b.float()) for a, b in zip((codes, scales), quantized(y, None, 8), strict=True)]
    return max(float((y - r).norm() / r.norm()) for y, r in pairs), TOLERANCE


__all__ = ["add_rms_norm", "check", "gated_rms_norm", "gated_rms_norm_int8", "gated_rms_norm_reference", "rms_norm",
           "rms_norm_int8", "rms_norm_reference"]
