"""RMS norms with what stands around them: the residual added first, the output as int8 for an integer linear.

Each gives exactly what the separate ops give: x + residual rounded to its dtype, the norm rounded to its own, the
codes of ``quantize_rows``. One pass over memory takes the place of two or three.

Legend: D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import native, registry
from mambacompress.kernels.quantized import check_quantizer, empty_codes, quantized
from mambacompress.kernels.rms_norm.cpu import add_rms_norm_native, rms_norm_int8_native
from mambacompress.kernels.rms_norm.reference import (
    gated_rms_norm_reference,
    rms_norm_int8_reference,
    rms_norm_reference,
)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None = None,
                 eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); x, residual: [..., D] of one dtype, weight: [D] or None.

    Differentiable (through the reference).
    """
    check_norm("add_rms_norm", x, weight, residual)
    ran = chosen("add_rms_norm", x, residual, weight) if native.runs_directly(x, residual, weight) else "reference"
    if ran == "native":
        return add_rms_norm_native(x, residual, weight, eps)
    if ran == "triton":
        from mambacompress.kernels.rms_norm.triton import add_rms_norm_triton

        return add_rms_norm_triton(x, residual, weight, eps)
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def rms_norm_int8(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor | None = None,
                  act_scale: Tensor | None = None, act_bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """(codes int8 [..., D], scales fp32 [..., 1], x + residual) of rms_norm(x + residual).

    x: [..., D]; residual: the same shape and dtype, or None (then the sum is x itself). act_scale: one static scale,
    None: one a row (token). act_bits: 8 or 4 (range ±127 or ±7). Not differentiable. Raises ValueError where shapes do
    not fit.
    """
    check_norm("rms_norm_int8", x, weight, residual)
    check_quantizer("rms_norm_int8", act_scale, act_bits)
    run = _run if native.runs_directly(x, residual, weight, act_scale) else _op
    codes, scales, total = run(x, residual, weight, eps, act_scale, act_bits)
    return codes, scales, x if residual is None else total


def gated_rms_norm_int8(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, *,
                        act_scale: Tensor | None = None, act_bits: int = 8) -> tuple[Tensor, Tensor]:
    """(codes int8 [..., D], scales fp32 [..., 1]) of gated_rms_norm(x, z, weight, eps, group_size).

    The other arguments are those of ``rms_norm_int8``. Not differentiable.
    """
    check_gated("gated_rms_norm_int8", x, z, weight, group_size)
    check_quantizer("gated_rms_norm_int8", act_scale, act_bits)
    run = _run_gated if native.runs_directly(x, z, weight, act_scale) else _gated_op
    return run(x, z, weight, eps, group_size, act_scale, act_bits)


def check_norm(op: str, x: Tensor, weight: Tensor | None, residual: Tensor | None = None) -> None:
    """Raise ValueError where the weight or the residual does not fit x [..., D]."""
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, the input {tuple(x.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"{op}: the residual is {tuple(residual.shape)} of {residual.dtype}, the input "
                         f"{tuple(x.shape)} of {x.dtype}")


def check_gated(op: str, x: Tensor, z: Tensor, weight: Tensor, group_size: int) -> None:
    """Raise ValueError where z, the weight or the groups do not fit x [..., D]."""
    if x.shape != z.shape or weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: x {tuple(x.shape)}, z {tuple(z.shape)} and weight {tuple(weight.shape)} do not fit")
    if group_size < 1 or x.shape[-1] % group_size:
        raise ValueError(f"{op}: groups of {group_size} do not divide {x.shape[-1]} channels")


def chosen(op: str, x: Tensor, *others: Tensor | None) -> str:
    """Which backend runs an op on x and its other inputs (weights, gates, residuals)."""
    foreign = [other for other in others if other is not None and (other.device != x.device or not _known(other))]
    lacks = ["a weight of another kind"] if foreign else []
    return registry.choose(op, x.device, x.dtype, lacks, lacks)


def _known(tensor: Tensor) -> bool:
    return tensor.dtype in native.DTYPE_CODES and tensor.is_floating_point()


def _run(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, act_scale: Tensor | None,
         act_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    ran = chosen("rms_norm_int8", x, residual, weight)
    if ran != "reference":
        return _norm_int8(ran)(x, None, residual, weight, eps, x.shape[-1], act_scale, act_bits)
    return rms_norm_int8_reference(x, residual, weight, eps, act_scale, act_bits)


def _norm_int8(backend: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    if backend == "triton":
        from mambacompress.kernels.rms_norm.triton import rms_norm_int8_triton

        return rms_norm_int8_triton
    return rms_norm_int8_native


_op = torch.library.custom_op("mambacompress::rms_norm_int8", _run, mutates_args=())


@_op.register_fake
def _fake(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (*empty_codes(x), x.new_empty(0 if residual is None else x.shape))


def _run_gated(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, act_scale: Tensor | None,
               act_bits: int) -> tuple[Tensor, Tensor]:
    ran = chosen("gated_rms_norm_int8", x, z, weight) if z.dtype == x.dtype else "reference"
    if ran != "reference":
        return _norm_int8(ran)(x, z, None, weight, eps, group_size, act_scale, act_bits)[:2]
    return quantized(gated_rms_norm_reference(x, z, weight, eps, group_size), act_scale, act_bits)


_gated_op = torch.library.custom_op("mambacompress::gated_rms_norm_int8", _run_gated, mutates_args=())


@_gated_op.register_fake
def _fake_gated(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_codes(x)


__all__ = ["add_rms_norm", "gated_rms_norm_int8", "rms_norm_int8"]
