"""nm_linear on a weight that was rearranged for native code (``tiles.pack_stream``): of int8 values the bits of
``int8_linear`` on the dense codes; of floats a float product that sums the inputs of an output in order, however many
rows there are. And the rows of such a weight, for an embedding that is a head as well.

Legend: T rows (tokens), I inputs, O outputs, R some rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import native, registry
from mambacompress.kernels.int8_linear import check_input, int8_linear_reference, lacks, qmax_of, wide_dtype
from mambacompress.kernels.int8_linear.cpu import native_linear, native_rows
from mambacompress.kernels.nm_linear.reference import float_product
from mambacompress.kernels.nm_linear.tiles import expand_stream, stream_bytes, stream_rows


def nm_linear_stream(
    x: Tensor, stream: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, *, keep: int, of: int,
    outputs: int | None = None, activation: str = "token", act_scale: Tensor | None = None, act_bits: int = 8,
) -> Tensor:
    """y [..., O] = x [..., I] Wᵀ + bias, in x's dtype; stream: uint8, of int8 values, with scale fp32 [O]; or of floats
    in their dtype, without a scale, with ``outputs`` and activation ``none``.

    The rest as in ``nm_linear``. Raises ValueError where shapes or modes do not fit.
    """
    outputs = outputs if scale is None else len(scale)
    if outputs is None:
        raise ValueError("nm_linear: a stream without a scale does not say how many outputs it has")
    check_input("nm_linear", x, outputs, x.shape[-1], bias, activation, act_scale, act_bits)
    _check_stream(stream, outputs, x.shape[-1], keep, of, scaled=scale is not None)
    if scale is None and activation != "none":
        raise ValueError("nm_linear: float values take float activations")
    run = _run if native.runs_directly(x, stream) else _op
    return run(x, stream, scale, bias, keep, of, outputs, activation, act_scale, act_bits)


def nm_rows(ids: Tensor, stream: Tensor, scale: Tensor | None = None, *, outputs: int, inputs: int, keep: int,
            of: int) -> Tensor:
    """Rows ids [R] (int64) of a stream's weight [outputs, inputs] as fp32 [R, I].

    Raises ValueError where the stream does not fit, IndexError for a row that is not there.
    """
    _check_stream(stream, outputs, inputs, keep, of, scaled=scale is not None)
    missing = [] if ids.dtype == torch.int64 and ids.device == stream.device else ["such row numbers"]
    if native.runs_directly(ids, stream) and registry.choose("nm_rows", ids.device, torch.float32, missing) == "native":
        return native_rows("mc_nm_rows", ids.contiguous(), stream, scale, outputs=outputs, inputs=inputs,
                           pattern=(keep, of))
    rows_RI = stream_rows(stream, ids, outputs, inputs, keep, of).float()
    return rows_RI if scale is None else rows_RI * scale[ids, None]


def _check_stream(stream: Tensor, outputs: int, inputs: int, keep: int, of: int, *, scaled: bool) -> None:
    fits = stream.dtype == torch.uint8 if scaled else stream.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if (not fits or inputs % of or stream.dim() != 1
            or stream.nbytes != stream_bytes(outputs, inputs, keep, of, stream.element_size())):
        raise ValueError(f"nm_linear: a stream of {tuple(stream.shape)} of {stream.dtype} is no weight "
                         f"[{outputs}, {inputs}] that keeps {keep} of {of}")


def _run(x: Tensor, stream: Tensor, scale: Tensor | None, bias: Tensor | None, keep: int, of: int, outputs: int,
         activation: str, act_scale: Tensor | None, act_bits: int) -> Tensor:
    missing = lacks(x, stream) if scale is None else lacks(x, stream, scale)
    if registry.choose("nm_linear", x.device, x.dtype, missing) == "native":
        return native_linear("mc_nm_linear", x, stream, scale, None, bias, 1, activation, act_scale, act_bits,
                             pattern=(keep, of), outputs=outputs)
    weight_OI = expand_stream(stream.cpu(), outputs, x.shape[-1], keep, of).to(x.device)
    if scale is None:
        return float_product(x, lambda rows: weight_OI[rows], outputs, bias)
    return int8_linear_reference(x, weight_OI, scale, bias, activation=activation, act_scale=act_scale,
                                 act_bits=act_bits)


@torch.library.custom_op("mambacompress::nm_linear_stream", mutates_args=())
def _op(x: Tensor, stream: Tensor, scale: Tensor | None, bias: Tensor | None, keep: int, of: int, outputs: int,
        activation: str, act_scale: Tensor | None, act_bits: int) -> Tensor:
    return _run(x, stream, scale, bias, keep, of, outputs, activation, act_scale, act_bits)


@_op.register_fake
def _fake(x: Tensor, stream: Tensor, scale: Tensor | None, bias: Tensor | None, keep: int, of: int, outputs: int,
          activation: str, act_scale: Tensor | None, act_bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, stream, scale, _, ctx.keep, ctx.of, ctx.outputs, activation, act_scale, act_bits = inputs
    inside = None
    if activation == "tensor":  # clipped inputs get no gradient
        inside = x.abs() <= act_scale.to(wide_dtype(x)) * qmax_of(act_bits)
    ctx.inputs = x.shape[-1]
    ctx.save_for_backward(stream, scale, inside)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    stream, scale, inside = ctx.saved_tensors
    wide = wide_dtype(grad)
    weight_OI = expand_stream(stream, ctx.outputs, ctx.inputs, ctx.keep, ctx.of).to(wide)
    wide_grad = grad.to(wide) if scale is None else grad.to(wide) * scale.to(wide)
    grad_x = (wide_grad @ weight_OI).to(grad.dtype)
    return (grad_x if inside is None else grad_x * inside, *[None] * 9)


_op.register_autograd(_backward, setup_context=_setup)

__all__ = ["nm_linear_stream", "nm_rows"]
