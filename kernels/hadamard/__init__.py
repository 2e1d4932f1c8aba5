"""hadamard: a fast orthonormal Hadamard rotation of the last dimension, with random signs and blocks.

    R = diag(signs) H        y = x R, or x Rᵀ with ``transpose``

``block`` makes H block-diagonal, for sizes that have no Hadamard matrix (3712 = 29 blocks of 128). Nothing is ever
padded: a padded transform cut back to its size is not orthogonal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import native, registry
from mambacompress.kernels.hadamard.cpu import hadamard_int8_native, hadamard_native
from mambacompress.kernels.hadamard.reference import (
    BASES,
    base_matrix,
    hadamard_matrix,
    hadamard_reference,
    largest_block,
    split,
    supported,
)
from mambacompress.kernels.quantized import check_quantizer, empty_codes, quantized


def hadamard(x: Tensor, signs: Tensor | None = None, *, block: int | None = None, transpose: bool = False) -> Tensor:
    """x @ R (or x @ Rᵀ) along the last dimension; R = diag(signs) H is orthonormal.

    x: [..., n], any float dtype (computed in fp32, fp64 for fp64). signs: [n] of ±1, any dtype. block: a supported size
    that divides n. Differentiable in x. Raises ValueError where the size is not supported, naming the largest block.
    """
    check_arguments(x, signs, block)
    run = _run if native.runs_directly(x, signs) else _op
    return run(x, signs, block or x.shape[-1], transpose)


def check_arguments(x: Tensor, signs: Tensor | None, block: int | None) -> None:
    """Raise ValueError where shapes, dtypes or sizes do not fit."""
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"hadamard rotates float tensors [..., n], not {tuple(x.shape)} of {x.dtype}")
    n = x.shape[-1]
    size = n if block is None else block
    if size < 1 or n % size:
        raise ValueError(f"hadamard: {n} channels are no whole number of blocks of {size}")
    if split(size) is None:
        raise ValueError(f"no Hadamard matrix of order {size}; for {n} channels use block={largest_block(n)}")
    if signs is not None and signs.shape != (n,):
        raise ValueError(f"hadamard: signs have shape {tuple(signs.shape)}, expected ({n},)")


def _run(x: Tensor, signs: Tensor | None, block: int, transpose: bool) -> Tensor:
    foreign = ["signs on another device"] if signs is not None and signs.device != x.device else []
    ran = registry.choose("hadamard", x.device, x.dtype, foreign, [*foreign, *_triton_lacks(block)])
    if ran == "triton":
        from mambacompress.kernels.hadamard.triton import hadamard_triton

        return hadamard_triton(x, signs, block, transpose)
    if ran == "native":
        return hadamard_native(x, signs, block, transpose)
    return hadamard_reference(x, signs, block=block, transpose=transpose)


def _triton_lacks(block: int) -> list[str]:
    base, power = split(block)  # type: ignore[misc]
    return [f"blocks of {block}"] if base * max(1, power // 128) > 64 else []


@torch.library.custom_op("mambacompress::hadamard", mutates_args=())
def _op(x: Tensor, signs: Tensor | None, block: int, transpose: bool) -> Tensor:
    y = _run(x, signs, block, transpose)
    return y.clone() if y is x else y


@_op.register_fake
def _fake(x: Tensor, signs: Tensor | None, block: int, transpose: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, signs, ctx.block, ctx.transpose = inputs
    ctx.save_for_backward(signs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (signs,) = ctx.saved_tensors
    return _op(grad, signs, ctx.block, not ctx.transpose), None, None, None


_op.register_autograd(_backward, setup_context=_setup)


def hadamard_int8(x: Tensor, signs: Tensor | None = None, *, block: int | None = None, transpose: bool = False,
                  act_scale: Tensor | None = None, act_bits: int = 8) -> tuple[Tensor, Tensor]:
    """(codes int8 [..., n], scales fp32 [..., 1]) of hadamard(x, signs, block=block, transpose=transpose).

    Exactly the codes of ``quantize_rows`` of that result. act_scale: one static scale, None: one a row (token).
    act_bits: 8 or 4. Not differentiable. Raises ValueError as ``hadamard`` does.
    """
    check_arguments(x, signs, block)
    check_quantizer("hadamard_int8", act_scale, act_bits)
    run = _run_int8 if native.runs_directly(x, signs, act_scale) else _op_int8
    return run(x, signs, block or x.shape[-1], transpose, act_scale, act_bits)


def _run_int8(x: Tensor, signs: Tensor | None, block: int, transpose: bool, act_scale: Tensor | None,
              act_bits: int) -> tuple[Tensor, Tensor]:
    foreign = ["signs on another device"] if signs is not None and signs.device != x.device else []
    ran = registry.choose("hadamard_int8", x.device, x.dtype, foreign, [*foreign, *_triton_lacks(block)])
    if ran == "triton":
        from mambacompress.kernels.hadamard.triton import hadamard_int8_triton

        return hadamard_int8_triton(x, signs, block, transpose, act_scale, act_bits)
    if ran == "native":
        return hadamard_int8_native(x, signs, block, transpose, act_scale, act_bits)
    return quantized(hadamard_reference(x, signs, block=block, transpose=transpose), act_scale, act_bits)


_op_int8 = torch.library.custom_op("mambacompress::hadamard_int8", _run_int8, mutates_args=())


@_op_int8.register_fake
def _fake_int8(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_codes(x)


def check(device: torch.device | str = "cpu") -> tuple[float, float]:
    """(largest difference to the reference, its tolerance) on this machine, for ``doctor``: native code makes the same
    additions, and gives the same bits; Triton's matrix products add in another order, and may move a code by one."""
    x = torch.randn(3, 768, generator=torch.Generator().manual_seed(0)).to(device)
    y = hadamard_reference(x)
    pairs = [(_run(x, None, 768, False), y), *zip(_run_int8(x, None, 768, False, None, 8), quantized(y, None, 8),
                                                  strict=True)]
    return max(float((got.float() - want.float()).abs().max()) for got, want in pairs), float(x.device.type != "cpu")


__all__ = ["BASES", "base_matrix", "check", "hadamard", "hadamard_int8", "hadamard_matrix", "hadamard_reference",
           "largest_block", "supported"]
