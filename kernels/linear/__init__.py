"""linear: y = x Wᵀ + bias on float weights, without gradients.

With one row a linear is read from memory as fast as it can be read; torch's own reaches half of that and less on a
processor, whatever the dtype. Weights of bf16 and fp16 become fp32 on their way, sums are fp32. With many rows of fp32
it is bound by multiplications, and torch's own takes vectors of half the width on some processors with AVX-512.
Elsewhere (more rows of half precision, gradients, other devices) torch's own runs: it is the reference.

Legend: I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacompress.kernels import native, registry
from mambacompress.kernels.int8_linear.cpu import native_linear
from mambacompress.kernels.tolerances import rms_ratio

FEW_ROWS = 8
TOLERANCE = 1e-6  # RMS ratio to fp64 in fp32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [..., O] = x [..., I] Wᵀ + bias, in x's dtype; weight: [O, I] of x's dtype, bias: [O] or None."""
    if not _suits(x, weight, bias) or registry.choose("linear", x.device, x.dtype) != "native":
        return F.linear(x, weight, bias)
    return native_linear("mc_linear", x, weight, bias=bias)


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not (x.dtype == weight.dtype and x.dtype in native.DTYPE_CODES and x.device.type == weight.device.type == "cpu"
            and weight.is_contiguous() and native.library() is not None and native.runs_directly(x, weight, bias)):
        return False
    return x.numel() <= FEW_ROWS * x.shape[-1] or (x.dtype == torch.float32 and native.level() == "avx512")


def check() -> tuple[float, float]:
    """(RMS ratio to fp64, tolerance) on this machine, for ``doctor``."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 100, generator=generator), torch.randn(37, 100, generator=generator)
    with torch.no_grad():
        return rms_ratio(linear(x, weight), F.linear(x.double(), weight.double())), TOLERANCE


__all__ = ["FEW_ROWS", "check", "linear"]
