"""int4_linear: y = x Wᵀ + bias on int4 weights in groups, multiplied as integers.

The counterpart of int8_linear; see reference.py for storage and exact rounding.

Legend: T rows (tokens), I inputs, O outputs, G groups, g inputs a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import native, registry
from mambacompress.kernels.int4_linear.reference import (
    centred_codes,
    dequantize_int4,
    int4_linear_reference,
    pack_nibbles,
    rows_again,
    unpack_nibbles,
)
from mambacompress.kernels.int8_linear import BYTES, check_input, lacks, qmax_of, tile, wide_dtype
from mambacompress.kernels.int8_linear.cpu import native_linear

TRITON_GROUPS = (32, 64, 128, 256)  # a tile of a product is a group, of at least what tensor cores take at a time


def int4_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None, *,
    group_size: int, activation: str = "token", act_scale: Tensor | None = None, act_bits: int = 8,
    tiled: bool = False,
) -> Tensor:
    """y [..., O] = x [..., I] Wᵀ + bias, in x's dtype, W = (nibble - zero) * scale.

    qweight: uint8 [O, I/2], low nibble = even column; scale: fp32 or fp16 [O, I/group_size]; zero: uint8 of 0..15,
    the same shape, or None for 8 everywhere; bias: [O]. group_size: even, divides I. tiled: qweight, scale and zero
    were rearranged by ``tiles.tile``. The rest as in ``int8_linear``.
    """
    check_arguments(x, qweight, scale, zero, bias, group_size, activation, act_scale, act_bits)
    run = _run if native.runs_directly(x, qweight) else _op
    return run(x, qweight, scale, zero, bias, group_size, activation, act_scale, act_bits, tiled)


def check_arguments(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
                    group_size: int, activation: str, act_scale: Tensor | None, act_bits: int) -> None:
    """Raise ValueError, naming what does not fit."""
    if qweight.dim() != 2 or qweight.dtype != torch.uint8:
        raise ValueError(f"int4_linear wants a uint8 weight [O, I/2], not {tuple(qweight.shape)} of {qweight.dtype}")
    outputs, inputs = qweight.shape[0], qweight.shape[1] * 2
    check_input("int4_linear", x, outputs, inputs, bias, activation, act_scale, act_bits)
    if group_size < 2 or group_size % 2 or inputs % group_size:
        raise ValueError(f"int4_linear: groups of {group_size} do not divide the weight [{outputs}, {inputs}] "
                         "(even groups only)")
    expected = (outputs, inputs // group_size)
    for name, tensor in (("scale", scale), ("zero", zero)):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"int4_linear: {name} has shape {tuple(tensor.shape)}, expected {expected}")


def _run(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int,
         activation: str, act_scale: Tensor | None, act_bits: int, tiled: bool) -> Tensor:
    missing = lacks(x, qweight, scale)
    ran = registry.choose("int4_linear", x.device, x.dtype, missing, [*missing, *_triton_lacks(group_size, tiled)])
    if ran == "triton":
        from mambacompress.kernels.int4_linear.triton import int4_linear_triton

        return int4_linear_triton(x, qweight, scale, zero, bias, group_size, activation, act_scale, act_bits)
    if ran == "native":
        return native_linear("mc_int4_linear", x, qweight, scale, zero, bias, scale.shape[1], activation, act_scale,
                              act_bits, tiled)
    return int4_linear_reference(x, qweight, scale, zero, bias, group_size=group_size, activation=activation,
                                 act_scale=act_scale, act_bits=act_bits, tiled=tiled)


def _triton_lacks(group_size: int, tiled: bool) -> list[str]:
    whole = group_size in TRITON_GROUPS
    return [what for what, missing in (
        (f"groups of {group_size}", not whole), ("weights in the tiles of a processor", tiled)) if missing]


@torch.library.custom_op("mambacompress::int4_linear", mutates_args=())
def _op(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int,
        activation: str, act_scale: Tensor | None, act_bits: int, tiled: bool) -> Tensor:
    return _run(x, qweight, scale, zero, bias, group_size, activation, act_scale, act_bits, tiled)


@_op.register_fake
def _fake(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int,
          activation: str, act_scale: Tensor | None, act_bits: int, tiled: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scale, zero, _, _, activation, act_scale, act_bits, ctx.tiled = inputs
    inside = None
    if activation == "tensor":  # clipped inputs get no gradient
        inside = x.abs() <= act_scale.to(wide_dtype(x)) * qmax_of(act_bits)
    ctx.save_for_backward(qweight, scale, zero, inside)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    qweight, scale, zero, inside = ctx.saved_tensors
    wide = wide_dtype(grad)
    if ctx.tiled:
        qweight, scale, zero = rows_again(qweight, scale, zero)
    grad_x = (grad.to(wide) @ dequantize_int4(qweight, scale, zero, wide)).to(grad.dtype)
    return (grad_x if inside is None else grad_x * inside, *[None] * 9)


_op.register_autograd(_backward, setup_context=_setup)

def check(device: torch.device | str = "cpu") -> tuple[float, float]:
    """(largest difference to the reference, 0) on this machine, for ``doctor``: integer products are exact."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 256, (40, 96), generator=generator, dtype=torch.uint8).to(device)
    scale, worst = torch.rand(40, 3, generator=generator).to(device), 0.0
    tiles, tile_scale = q.clone(), scale.clone()
    tile(tiles, BYTES)
    tile(tile_scale, 1)
    for rows in (1, 30):
        x = torch.randn(rows, 192, generator=generator).to(device)
        reference = int4_linear_reference(x, q, scale, group_size=64)
        results = [int4_linear(x, q, scale, group_size=64)]
        if x.device.type == "cpu":
            results.append(int4_linear(x, tiles, tile_scale, group_size=64, tiled=True))
        worst = max(worst, *(float((y - reference).abs().max()) for y in results))
    return worst, 0.0


__all__ = ["centred_codes", "check", "dequantize_int4", "int4_linear", "int4_linear_reference", "pack_nibbles",
           "unpack_nibbles"]
