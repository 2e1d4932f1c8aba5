"""hadamard: a fast orthonormal Hadamard rotation of the last dimension, with random signs and blocks.

    R = diag(signs) H        y = x R, or x Rᵀ with ``transpose``

``block`` makes H block-diagonal, for sizes that have no Hadamard matrix (3712 = 29 blocks of 128). Nothing is ever
padded: a padded transform cut back to its size is not orthogonal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels.hadamard.reference import (
    BASES,
    base_matrix,
    hadamard_matrix,
    hadamard_reference,
    largest_block,
    split,
    supported,
)


def hadamard(x: Tensor, signs: Tensor | None = None, *, block: int | None = None, transpose: bool = False) -> Tensor:
    """x @ R (or x @ Rᵀ) along the last dimension; R = diag(signs) H is orthonormal.

    x: [..., n], any float dtype (computed in fp32, fp64 for fp64). signs: [n] of ±1, any dtype. block: a supported size
    that divides n. Differentiable in x. Raises ValueError where the size is not supported, naming the largest block.
    """
    check_arguments(x, signs, block)
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return _op(x, signs, block or x.shape[-1], transpose)
    return _run(x, signs, block or x.shape[-1], transpose)


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
    return hadamard_reference(x, signs, block=block, transpose=transpose)


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

__all__ = ["BASES", "base_matrix", "hadamard", "hadamard_matrix", "hadamard_reference", "largest_block", "supported"]
