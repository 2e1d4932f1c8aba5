"""nm_linear: y = x Wᵀ + bias on N:M sparse weights: int8 or float values, and where they belong.

The counterpart of int8_linear for weights that keep ``keep`` of every ``of`` inputs; see reference.py for the packed
form. int8 values are multiplied as integers, fp16, bf16 and fp32 values in float. A weight that is used again and
again is rearranged once for native code (``pack_stream``), multiplied by ``nm_linear_stream`` and looked up by
``nm_rows``.

Legend: T rows (tokens), I inputs, O outputs, V values a row, B bytes a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import native, registry
from mambacompress.kernels.int8_linear import check_input, int8_linear_reference, lacks, qmax_of, wide_dtype
from mambacompress.kernels.int8_linear.cpu import native_linear
from mambacompress.kernels.nm_linear.reference import (
    expand,
    index_bits,
    kept_values,
    nm_linear_reference,
    pack_positions,
    position_bytes,
    position_form,
    unpack_positions,
)
from mambacompress.kernels.nm_linear.stream import nm_linear_stream, nm_rows
from mambacompress.kernels.nm_linear.tiles import (
    expand_stream,
    fill_stream,
    pack_stream,
    stream_bytes,
    unpack_stream,
)
from mambacompress.kernels.tolerances import rms_ratio

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
TOLERANCE = 1e-6  # RMS ratio to fp64 of a float product in fp32


def nm_linear(
    x: Tensor, values: Tensor, positions: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, *,
    keep: int, of: int, activation: str = "token", act_scale: Tensor | None = None, act_bits: int = 8,
) -> Tensor:
    """y [..., O] = x [..., I] Wᵀ + bias, in x's dtype.

    values: int8 [O, V] with scale fp32 [O], or floats [O, V] without a scale; V = I · keep / of. positions: uint8
    [O, B], see ``pack_positions``. bias: [O]. activation, act_scale, act_bits: as in ``int8_linear``; floats take
    ``none``. Differentiable in x, straight through the rounding. Raises ValueError where shapes or modes do not fit.
    """
    check_arguments(x, values, positions, scale, bias, keep, of, activation, act_scale, act_bits)
    run = _run if native.runs_directly(x, values) else _op
    return run(x, values, positions, scale, bias, keep, of, activation, act_scale, act_bits)


def check_arguments(x: Tensor, values: Tensor, positions: Tensor, scale: Tensor | None, bias: Tensor | None, keep: int,
                    of: int, activation: str, act_scale: Tensor | None, act_bits: int) -> None:
    """Raise ValueError, naming what does not fit."""
    if values.dim() != 2 or values.dtype not in (torch.int8, *FLOATS):
        raise ValueError(f"nm_linear wants int8 or float values [O, V], not {tuple(values.shape)} of {values.dtype}")
    if not 0 < keep < of or values.shape[1] % keep:
        raise ValueError(f"nm_linear: rows of {values.shape[1]} values do not make groups of {keep}:{of}")
    outputs, inputs = values.shape[0], values.shape[1] // keep * of
    check_input("nm_linear", x, outputs, inputs, bias, activation, act_scale, act_bits)
    expected = (outputs, position_bytes(inputs, keep, of))
    if positions.dtype != torch.uint8 or positions.shape != expected:
        raise ValueError(f"nm_linear: positions are {tuple(positions.shape)} of {positions.dtype}, expected {expected} "
                         "of torch.uint8")
    if values.dtype == torch.int8 and (scale is None or scale.shape != (outputs,)):
        raise ValueError(f"nm_linear: int8 values need a scale of shape ({outputs},)")
    if values.dtype != torch.int8 and (scale is not None or activation != "none"):
        raise ValueError("nm_linear: float values have no scale and take float activations")


def _run(x: Tensor, values: Tensor, positions: Tensor, scale: Tensor | None, bias: Tensor | None, keep: int, of: int,
         activation: str, act_scale: Tensor | None, act_bits: int) -> Tensor:
    missing = lacks(x, *(t for t in (values, positions, scale) if t is not None))
    ran = registry.choose("nm_linear", x.device, x.dtype, lacks(x, values), missing)
    if ran == "triton":
        from mambacompress.kernels.nm_linear.triton import nm_linear_triton

        return nm_linear_triton(x, values, positions, scale, bias, keep, of, activation, act_scale, act_bits)
    if ran == "native":
        if scale is None:
            stream = pack_stream(values, unpack_positions(positions, x.shape[-1], keep, of), keep, of)
            return native_linear("mc_nm_linear", x, stream, bias=bias, pattern=(keep, of), outputs=len(values))
        codes = expand(values, positions, x.shape[-1], keep, of)
        return native_linear("mc_int8_linear", x, codes, scale, None, bias, 1, activation, act_scale, act_bits)
    return nm_linear_reference(x, values, positions, scale, bias, keep=keep, of=of, activation=activation,
                               act_scale=act_scale, act_bits=act_bits)


@torch.library.custom_op("mambacompress::nm_linear", mutates_args=())
def _op(x: Tensor, values: Tensor, positions: Tensor, scale: Tensor | None, bias: Tensor | None, keep: int, of: int,
        activation: str, act_scale: Tensor | None, act_bits: int) -> Tensor:
    return _run(x, values, positions, scale, bias, keep, of, activation, act_scale, act_bits)


@_op.register_fake
def _fake(x: Tensor, values: Tensor, positions: Tensor, scale: Tensor | None, bias: Tensor | None, keep: int, of: int,
          activation: str, act_scale: Tensor | None, act_bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, positions, scale, _, ctx.keep, ctx.of, activation, act_scale, act_bits = inputs
    inside = None
    if activation == "tensor":  # clipped inputs get no gradient
        inside = x.abs() <= act_scale.to(wide_dtype(x)) * qmax_of(act_bits)
    ctx.save_for_backward(values, positions, scale, inside)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, positions, scale, inside = ctx.saved_tensors
    wide = wide_dtype(grad)
    columns = values.shape[1] // ctx.keep * ctx.of
    weight_OI = expand(values, positions, columns, ctx.keep, ctx.of).to(wide)
    wide_grad = grad.to(wide) if scale is None else grad.to(wide) * scale.to(wide)
    grad_x = (wide_grad @ weight_OI).to(grad.dtype)
    return (grad_x if inside is None else grad_x * inside, *[None] * 9)


_op.register_autograd(_backward, setup_context=_setup)


def check(device: torch.device | str = "cpu") -> tuple[float, float]:
    """(RMS ratio of float values to fp64, tolerance) on this machine, for ``doctor``; infinite where int8 values do not
    give the bits of int8_linear on the expanded weight.
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    scale = torch.rand(40, generator=generator).to(device)
    for keep, of in ((2, 4), (1, 8)):
        mask = torch.zeros(40, 192 // of, of, dtype=torch.bool)
        mask[..., of - keep:] = True
        mask = mask.flatten(1)
        codes = torch.randint(-127, 128, (40, 192), generator=generator, dtype=torch.int8).masked_fill(~mask, 0)
        values, positions = kept_values(codes, mask), pack_positions(mask, keep, of)
        values, positions = values.to(device), positions.to(device)
        for rows in (1, 30):
            x = torch.randn(rows, 192, generator=generator).to(device)
            results = [nm_linear(x, values, positions, scale, keep=keep, of=of)]
            if x.device.type == "cpu":
                results.append(nm_linear_stream(x, pack_stream(values, mask, keep, of), scale, keep=keep, of=of))
            wanted = int8_linear_reference(x, codes.to(device), scale)
            worst = worst if all(torch.equal(y, wanted) for y in results) else float("inf")
            y = nm_linear(x, values.half(), positions, keep=keep, of=of, activation="none")
            worst = max(worst, rms_ratio(y, x.double() @ codes.to(device).double().T))
    return worst, TOLERANCE


__all__ = ["FLOATS", "TOLERANCE", "check", "expand", "expand_stream", "fill_stream", "index_bits", "kept_values",
           "nm_linear", "nm_linear_reference", "nm_linear_stream", "nm_rows", "pack_positions", "pack_stream",
           "position_bytes", "position_form", "stream_bytes", "unpack_positions", "unpack_stream"]
