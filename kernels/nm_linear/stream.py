"""nm_linear on a weight that was rearranged for native code (``tiles.pack_stream``): the bits of ``int8_linear`` on the
dense codes, in tiles.

Legend: T rows (tokens), I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import native, registry
from mambacompress.kernels.int8_linear import check_input, int8_linear_reference, lacks, qmax_of, wide_dtype
from mambacompress.kernels.int8_linear.cpu import native_linear
from mambacompress.kernels.nm_linear.tiles import expand_stream, stream_bytes


def nm_linear_stream(
    x: Tensor, stream: Tensor, scale: Tensor, bias: Tensor | None = None, *, keep: int, of: int,
    activation: str = "token", act_scale: Tensor | None = None, act_bits: int = 8,
) -> Tensor:
    """y [..., O] = x [..., I] Wᵀ + bias, in x's dtype; stream: uint8, of int8 values; scale: fp32 [O].

    The rest as in ``nm_linear``. Raises ValueError where shapes or modes do not fit.
    """
    outputs, inputs = len(scale), x.shape[-1]
    check_input("nm_linear", x, outputs, inputs, bias, activation, act_scale, act_bits)
    if (inputs % of or stream.dtype != torch.uint8 or stream.dim() != 1
            or len(stream) != stream_bytes(outputs, inputs, keep, of)):
        raise ValueError(f"nm_linear: a stream of {tuple(stream.shape)} of {stream.dtype} is no weight "
                         f"[{outputs}, {inputs}] that keeps {keep} of {of}")
    run = _run if native.runs_directly(x, stream) else _op
    return run(x, stream, scale, bias, keep, of, activation, act_scale, act_bits)


def _run(x: Tensor, stream: Tensor, scale: Tensor, bias: Tensor | None, keep: int, of: int, activation: str,
         act_scale: Tensor | None, act_bits: int) -> Tensor:
    if registry.choose("nm_linear", x.device, x.dtype, lacks(x, stream, scale)) == "native":
        return native_linear("mc_nm_linear", x, stream, scale, None, bias, 1, activation, act_scale, act_bits,
                             pattern=(keep, of))
    codes = expand_stream(stream.cpu(), len(scale), x.shape[-1], keep, of).to(x.device)
    return int8_linear_reference(x, codes, scale, bias, activation=activation, act_scale=act_scale, act_bits=act_bits)


@torch.library.custom_op("mambacompress::nm_linear_stream", mutates_args=())
def _op(x: Tensor, stream: Tensor, scale: Tensor, bias: Tensor | None, keep: int, of: int, activation: str,
        act_scale: Tensor | None, act_bits: int) -> Tensor:
    return _run(x, stream, scale, bias, keep, of, activation, act_scale, act_bits)


@_op.register_fake
def _fake(x: Tensor, stream: Tensor, scale: Tensor, bias: Tensor | None, keep: int, of: int, activation: str,
          act_scale: Tensor | None, act_bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(scale))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, stream, scale, _, ctx.keep, ctx.of, activation, act_scale, act_bits = inputs
    inside = None
    if activation == "tensor":  # clipped inputs get no gradient
        inside = x.abs() <= act_scale.to(wide_dtype(x)) * qmax_of(act_bits)
    ctx.inputs = x.shape[-1]
    ctx.save_for_backward(stream, scale, inside)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    stream, scale, inside = ctx.saved_tensors
    wide = wide_dtype(grad)
    codes = expand_stream(stream, len(scale), ctx.inputs, ctx.keep, ctx.of).to(wide)
    grad_x = ((grad.to(wide) * scale.to(wide)) @ codes).to(grad.dtype)
    return (grad_x if inside is None else grad_x * inside, *[None] * 8)


_op.register_autograd(_backward, setup_context=_setup)

__all__ = ["nm_linear_stream"]
