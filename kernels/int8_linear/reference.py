"""Readable torch for linears on int8 weights, and the rounding rules that every integer linear shares.

Activations: q = clamp(round_half_even(x / s), ±qmax) with qmax = 127 (8 bits) or 7 (4 bits). A token's scale is
max(absmax / qmax, 2^-126): never zero, so a row of zeros needs no special case and the error stays below s / 2
however small the row. NaN in a row makes that row's output NaN, as does Inf where the scale is dynamic (a static
scale clamps it).

The product is exact in int32. Then, elementwise and in this order, in fp32 (fp64 where x is fp64):

    y = (float(acc) * weight_scale) * activation_scale + bias

Nothing depends on the number of rows: a token's result in a prefill of 512 equals its result alone, bit for bit.
Weight-only products ("none") are float matrix products, for which torch promises no such thing: equal to about 1e-6.

Legend: T rows (tokens), I inputs, O outputs, G groups.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mambacompress.kernels.int8_linear.tiles import BYTES, untiled

SMALLEST_SCALE = 2.0**-126
MODES = ("token", "tensor", "none")
_EXACT_IN_FP32 = 1024  # 1024 * 127 * 127 < 2^24
_CHUNK = 1 << 22  # elements of a float copy of the weight that may exist at a time


def qmax_of(bits: int) -> int:
    """127 for 8 bits, 7 for 4: ranges are symmetric. Raises ValueError for other widths."""
    if bits not in (4, 8):
        raise ValueError(f"activations have 8 or 4 bits, not {bits}")
    return (1 << (bits - 1)) - 1


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype scales and results are computed in: fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def quantize_rows(x: Tensor, mode: str, bits: int = 8, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize activations x [..., I] -> (q int8 [..., I], scale: [..., 1] for ``token``, the given one for
    ``tensor``).
    """
    qmax = qmax_of(bits)
    x = x.to(wide_dtype(x))
    if mode == "token":
        largest = x.abs().amax(-1, keepdim=True)
        scale = (largest / torch.full_like(largest, qmax)).clamp(min=SMALLEST_SCALE)  # / qmax: on CUDA times 1 / qmax
    elif mode == "tensor":
        if scale is None:
            raise ValueError("activation='tensor' needs act_scale, the static scale of the input")
        scale = scale.to(x.dtype)
    else:
        raise ValueError(f"activations are quantized per token or per tensor, not {mode!r}")
    q = (x / scale).round().clamp(-qmax, qmax).nan_to_num(0.0).to(torch.int8)
    return q, scale


def quantize_input(x_TI: Tensor, mode: str, bits: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``quantize_rows`` for a linear: the scale of a row that holds a NaN is NaN in every mode, so NaN is never
    rounded away.
    """
    q_TI, used = quantize_rows(x_TI, mode, bits, scale)
    if mode == "tensor":
        used = torch.where(x_TI.isnan().any(-1, keepdim=True), torch.nan, used)
    return q_TI, used


def int_matmul(a_TI: Tensor, b_OI: Tensor) -> Tensor:
    """a bᵀ in exact int32, [T, O], for int8 operands.

    With a single input, torch._int_mm leaves its result uninitialised (torch 2.13, CPU): that goes another way.
    """
    if a_TI.device.type == "cpu" and a_TI.shape[1] > 1 and int_mm_is_exact():
        return torch._int_mm(a_TI, b_OI.t())
    if a_TI.device.type == "cuda":
        return _int_mm_padded(a_TI, b_OI)
    return _int_matmul_fp32(a_TI, b_OI)


@functools.cache
def int_mm_is_exact() -> bool:
    """Whether torch._int_mm of this processor keeps full int32 products (16-bit intermediates saturate without
    VNNI).
    """
    a = torch.full((2, 256), -127, dtype=torch.int8)
    b = torch.full((16, 256), 127, dtype=torch.int8)
    try:
        low, high = torch._int_mm(a, b.t()), torch._int_mm(b, b.t())
        return bool((low == -127 * 127 * 256).all() and (high == 127 * 127 * 256).all())
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def _int_matmul_fp32(a_TI: Tensor, b_OI: Tensor) -> Tensor:
    """Through fp32 in slices short enough that every partial sum is a whole number below 2^24."""
    total = torch.zeros(a_TI.shape[0], b_OI.shape[0], dtype=torch.int32, device=a_TI.device)
    for start in range(0, a_TI.shape[1], _EXACT_IN_FP32):
        part = slice(start, start + _EXACT_IN_FP32)
        total += (a_TI[:, part].float() @ b_OI[:, part].float().t()).to(torch.int32)
    return total


def _int_mm_padded(a_TI: Tensor, b_OI: Tensor) -> Tensor:
    """torch._int_mm on CUDA: more than 16 rows, inner and outer sizes multiples of 8."""
    rows, inner, outer = a_TI.shape[0], a_TI.shape[1], b_OI.shape[0]
    more_rows, more_inner, more_outer = max(0, 32 - rows), -inner % 8, -outer % 8
    a = torch.nn.functional.pad(a_TI, (0, more_inner, 0, more_rows)) if more_rows or more_inner else a_TI
    b = torch.nn.functional.pad(b_OI, (0, more_inner, 0, more_outer)) if more_outer or more_inner else b_OI
    return torch._int_mm(a.contiguous(), b.contiguous().t())[:rows, :outer]


def int8_linear_reference(
    x: Tensor, qweight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None, *, activation: str = "token",
    act_scale: Tensor | None = None, act_bits: int = 8, tiled: bool = False,
) -> Tensor:
    """See ``int8_linear``."""
    if tiled:
        qweight_OI = untiled(qweight_OI, BYTES)
    wide = wide_dtype(x)
    x_TI = x.reshape(-1, x.shape[-1])
    scale_O = scale_O.to(wide)
    if activation == "none":
        y_TO = weight_only(x_TI.to(wide), lambda rows: qweight_OI[rows].to(wide), qweight_OI.shape) * scale_O
    else:
        q_TI, token_scale = quantize_input(x_TI, activation, act_bits, act_scale)
        y_TO = int_matmul(q_TI, qweight_OI).to(wide) * scale_O * token_scale
    if bias_O is not None:
        y_TO = y_TO + bias_O.to(wide)
    return y_TO.to(x.dtype).reshape(*x.shape[:-1], qweight_OI.shape[0])


def weight_only(x_TI: Tensor, floats, shape) -> Tensor:  # type: ignore[no-untyped-def]
    """x Wᵀ with W = floats(rows) made a few rows at a time, so that no float copy of the whole weight ever exists."""
    outputs, inputs = shape
    step = max(1, _CHUNK // max(1, inputs))
    parts = [x_TI @ floats(slice(start, start + step)).t() for start in range(0, outputs, step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
