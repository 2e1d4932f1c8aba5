"""int8_linear: y = x Wᵀ + bias on int8 weights with one scale an output, multiplied as integers.

Activations are quantized on the way in: ``token`` (a dynamic scale a row), ``tensor`` (one static scale) or ``none``
(the weights alone are int8, the product is float). See reference.py for the exact rounding.

Legend: T rows (tokens), I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import native, registry
from mambacompress.kernels.int8_linear.cpu import native_linear, packed_rows
from mambacompress.kernels.int8_linear.reference import (
    MODES,
    int8_linear_reference,
    int_matmul,
    qmax_of,
    quantize_rows,
    weight_only,
    wide_dtype,
)
from mambacompress.kernels.int8_linear.tiles import BYTES, can_be_tiled, rows_of, tile, untiled

LARGEST_INPUTS = 1 << 16  # 127 * 127 * 2^16 < 2^31: sums stay exact


def int8_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None, *, activation: str = "token",
    act_scale: Tensor | None = None, act_bits: int = 8, tiled: bool = False,
) -> Tensor:
    """y [..., O] = x [..., I] Wᵀ + bias, in x's dtype.

    qweight: int8 [O, I]; scale: fp32 [O]; bias: [O]. activation: ``token``, ``tensor`` (needs act_scale, one number) or
    ``none``; act_bits: 8 or 4 (range ±127 or ±7, stored as int8 either way). tiled: qweight was rearranged by
    ``tiles.tile``. The integer product is exact; a row's
    result does not depend on the other rows. Differentiable in x, straight through the rounding. Raises ValueError
    where shapes or modes do not fit.
    """
    check_arguments(x, qweight, scale, bias, activation, act_scale, act_bits)
    run = _run if native.runs_directly(x, qweight) else _op
    return run(x, qweight, scale, bias, activation, act_scale, act_bits, tiled)


def check_arguments(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, activation: str,
                    act_scale: Tensor | None, act_bits: int) -> None:
    """Raise ValueError, naming what does not fit."""
    if qweight.dim() != 2 or qweight.dtype != torch.int8:
        raise ValueError(f"int8_linear wants an int8 weight [O, I], not {tuple(qweight.shape)} of {qweight.dtype}")
    outputs, inputs = qweight.shape
    check_input("int8_linear", x, outputs, inputs, bias, activation, act_scale, act_bits)
    if scale.shape != (outputs,):
        raise ValueError(f"int8_linear: scale has shape {tuple(scale.shape)}, expected ({outputs},)")


def check_input(op: str, x: Tensor, outputs: int, inputs: int, bias: Tensor | None, activation: str,
                act_scale: Tensor | None, act_bits: int) -> None:
    """The checks that all integer linears share."""
    if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] != inputs:
        raise ValueError(f"{op}: the input is {tuple(x.shape)} of {x.dtype}, the weight [{outputs}, {inputs}] takes "
                         f"floats [..., {inputs}]")
    if activation not in MODES:
        raise ValueError(f"{op}: unknown activation mode {activation!r}; known: {', '.join(MODES)}")
    qmax_of(act_bits)
    if activation == "tensor" and (act_scale is None or act_scale.numel() != 1):
        raise ValueError(f"{op}: activation='tensor' needs act_scale, one number")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, expected ({outputs},)")


def _run(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, activation: str, act_scale: Tensor | None,
         act_bits: int, tiled: bool) -> Tensor:
    missing = lacks(x, qweight, scale)
    tiles = ["weights in the tiles of a processor"] if tiled else []
    ran = registry.choose("int8_linear", x.device, x.dtype, missing, [*missing, *tiles])
    if ran == "triton":
        from mambacompress.kernels.int8_linear.triton import int8_linear_triton

        return int8_linear_triton(x, qweight, scale, bias, activation, act_scale, act_bits)
    if ran == "native":
        return native_linear("mc_int8_linear", x, qweight, scale, None, bias, 1, activation, act_scale, act_bits,
                              tiled)
    return int8_linear_reference(x, qweight, scale, bias, activation=activation, act_scale=act_scale, act_bits=act_bits,
                                 tiled=tiled)


def lacks(x: Tensor, *weights: Tensor) -> list[str]:
    """What the native linears and those in Triton cannot do of a call."""
    missing = [] if x.shape[-1] < LARGEST_INPUTS else [f"rows of {x.shape[-1]} inputs"]
    return missing if all(weight.device == x.device for weight in weights) else [*missing, "a weight on another device"]


@torch.library.custom_op("mambacompress::int8_linear", mutates_args=())
def _op(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, activation: str, act_scale: Tensor | None,
        act_bits: int, tiled: bool) -> Tensor:
    return _run(x, qweight, scale, bias, activation, act_scale, act_bits, tiled)


@_op.register_fake
def _fake(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, activation: str, act_scale: Tensor | None,
          act_bits: int, tiled: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scale, _, activation, act_scale, act_bits, ctx.tiled = inputs
    inside = None
    if activation == "tensor":  # clipped inputs get no gradient
        inside = x.abs() <= act_scale.to(wide_dtype(x)) * qmax_of(act_bits)
    ctx.save_for_backward(qweight, scale, inside)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    qweight, scale, inside = ctx.saved_tensors
    wide = wide_dtype(grad)
    if ctx.tiled:
        qweight = untiled(qweight, BYTES)
    grad_x = ((grad.to(wide) * scale.to(wide)) @ qweight.to(wide)).to(grad.dtype)
    return (grad_x if inside is None else grad_x * inside, *[None] * 7)


_op.register_autograd(_backward, setup_context=_setup)

def check(device: torch.device | str = "cpu") -> tuple[float, float]:
    """(largest difference to the reference, 0) on this machine, for ``doctor``: integer products are exact."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (40, 192), generator=generator, dtype=torch.int8).to(device)
    scale, worst = torch.rand(40, generator=generator).to(device), 0.0
    tiles = q.clone()
    tile(tiles, BYTES)
    for rows in (1, 30):
        x = torch.randn(rows, 192, generator=generator).to(device)
        reference = int8_linear_reference(x, q, scale)
        results = [int8_linear(x, q, scale)]
        if x.device.type == "cpu":
            results.append(int8_linear(x, tiles, scale, tiled=True))
        worst = max(worst, *(float((y - reference).abs().max()) for y in results))
    return worst, 0.0


__all__ = ["BYTES", "MODES", "can_be_tiled", "check", "check_input", "int8_linear", "int8_linear_reference",
           "int_matmul", "lacks", "packed_rows", "qmax_of", "quantize_rows", "rows_of", "tile", "untiled",
           "weight_only", "wide_dtype"]
