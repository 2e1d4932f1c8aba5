"""The native linears: one C function a kind of weight, the same description of the problem for all."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from mambacompress.kernels import native
from mambacompress.kernels.int8_linear.tiles import BYTES, OUTPUTS, tiled_outputs

_MODE_CODES = {"none": 2, "token": 0, "tensor": 1}


# ``Linear`` of int_tiles.h: fifteen int64 and seven pointers. Packed as bytes: a call costs less than filling a
# ctypes.Structure.
_LINEAR = struct.Struct("@15q7P")


def native_linear(function: str, x: Tensor, weight: Tensor, scale: Tensor | None = None, zero: Tensor | None = None,
                  bias: Tensor | None = None, groups: int = 1, activation: str = "none",
                  act_scale: Tensor | None = None, act_bits: int = 8, tiled: bool = False,
                  pattern: tuple[int, int] | None = None, outputs: int | None = None) -> Tensor:
    """y [..., O] in x's dtype by the C function of that name; arguments as in int4_linear, all on the CPU.

    weight: packed, or floats without a scale. pattern: keep and of where it is the stream of a sparse one, whose
    outputs must then be given.
    """
    inputs = x.shape[-1]
    outputs = len(weight) if outputs is None else outputs
    x_TI = x if x.dim() == 2 else x.reshape(-1, inputs)
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    rows = x_TI.shape[0]
    y = x.new_empty((*x.shape[:-1], outputs))
    if rows == 0:
        return y
    weight = weight.contiguous()
    if scale is not None:
        scale = scale.contiguous() if scale.dtype in (torch.float32, torch.float16) else scale.float().contiguous()
    if zero is not None:
        zero = zero.contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    if act_scale is not None:
        act_scale = act_scale.float()
    dtype, mode = native.DTYPE_CODES[x.dtype], _MODE_CODES[activation]
    native.function(function, (ctypes.c_char_p,))(_LINEAR.pack(
        rows, inputs, outputs, groups, torch.get_num_threads(), mode, act_bits, x_TI.stride(0), outputs, dtype, dtype,
        native.DTYPE_CODES[(weight if scale is None else scale).dtype],
        in_tiles(weight, tiled, pattern, outputs, inputs), *(pattern or (0, 0)),
        x_TI.data_ptr(), weight.data_ptr(), *(0 if t is None else t.data_ptr() for t in (scale, zero, bias, act_scale)),
        y.data_ptr()))
    return y


def packed_rows(ids: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None = None, *, groups: int = 1,
                tiled: bool = False) -> Tensor:
    """Rows ids [R] (int64, contiguous) of a packed table as fp32 [R, I]: int8 [O, I] with scale [O], or uint8
    [O, I/2] with scale and zero [O, G]. All contiguous and on the CPU. Raises IndexError for a row that is not there.
    """
    nibbles = weight.dtype == torch.uint8
    return native_rows("mc_int4_rows" if nibbles else "mc_int8_rows", ids, weight, scale, zero, groups=groups,
                       outputs=len(weight), inputs=weight.shape[1] * (2 if nibbles else 1),
                       tiled=tiled_outputs(weight) if tiled else 0)


def native_rows(function: str, ids: Tensor, weight: Tensor, scale: Tensor | None, zero: Tensor | None = None, *,
                outputs: int, inputs: int, groups: int = 1, tiled: int = 0,
                pattern: tuple[int, int] = (0, 0)) -> Tensor:
    """Rows ids [R] of a table [outputs, inputs] as fp32 [R, inputs], by the C function of that name; see
    ``packed_rows``.
    """
    y = torch.empty(len(ids), inputs)
    if len(ids) == 0:
        return y
    lowest, highest = (int(end) for end in ids.aminmax())
    if lowest < 0 or highest >= outputs:
        raise IndexError(f"row {lowest if lowest < 0 else highest} of a table of {outputs} rows")
    native.function(function, (ctypes.c_char_p,))(_LINEAR.pack(
        len(ids), inputs, outputs, groups, torch.get_num_threads(), 2, 8, 1, inputs, 0, 0,
        native.DTYPE_CODES[(weight if scale is None else scale).dtype], tiled, *pattern, ids.data_ptr(),
        weight.data_ptr(), *(0 if t is None else t.data_ptr() for t in (scale, zero)), 0, 0, y.data_ptr()))
    return y


def in_tiles(weight: Tensor, tiled: bool, pattern: tuple[int, int] | None, outputs: int, inputs: int) -> int:
    """How many outputs lie in tiles; of a sparse weight of int8 values, how many would if it were dense."""
    if pattern is not None:
        return 0 if inputs % BYTES or weight.is_floating_point() else outputs // OUTPUTS * OUTPUTS
    return tiled_outputs(weight) if tiled else 0


__all__ = ["in_tiles", "native_linear", "native_rows", "packed_rows"]
