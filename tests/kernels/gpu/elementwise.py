"""Kernels around single functions of ``tile_math``: Triton finds the names a kernel uses in its module."""

from __future__ import annotations

from torch import Tensor

from mambacompress.kernels import gpu

if gpu.installed():
    import triton
    import triton.language as tl

    from mambacompress.kernels.tile_math import exp2_polynomial

    @triton.jit
    def _exp2_kernel(p_x, p_y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        o = tl.arange(0, SIZE)
        tl.store(p_y + o, exp2_polynomial(tl.load(p_x + o)))


def run_exp2_polynomial(x: Tensor, y: Tensor) -> None:
    """y = 2^x; both fp32, a power of two of elements."""
    gpu.launch(_exp2_kernel, (1,), x, y, SIZE=x.numel())
