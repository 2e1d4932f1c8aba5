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
                  pattern: tuple[int, int] | None = None) -> Tensor:
    """y [..., O] in x's dtype by the C function of that name; arguments as in int4_linear, all on the CPU.

    weight: packed, or floats without a scale. pattern: keep and of where it is the stream of a sparse one.
    """
    inputs = x.shape[-1]
    outputs = len(weight) if pattern is None or scale is None else len(scale)
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
    rows, nibbles = len(ids), weight.dtype == torch.uint8
    inputs = weight.shape[1] * (2 if nibbles else 1)
    y = torch.empty(rows, inputs)
    if rows == 0:
        return y
    lowest, highest = ids.aminmax()
    if int(lowest) < 0 or int(highest) >= len(weight):
        raise IndexError(f"row {int(lowest) if int(lowest) < 0 else int(highest)} of a table of {len(weight)} rows")
    function = native.function("mc_int4_rows" if nibbles else "mc_int8_rows", (ctypes.c_char_p,))
    function(_LINEAR.pack(
        rows, inputs, len(weight), groups, torch.get_num_threads(), 2, 8, 1, inputs, 0, 0,
        native.DTYPE_CODES[scale.dtype], tiled_outputs(weight) if tiled else 0, 0, 0, ids.data_ptr(), weight.data_ptr(),
        scale.data_ptr(), 0 if zero is None else zero.data_ptr(), 0, 0, y.data_ptr()))
    return y


def in_tiles(weight: Tensor, tiled: bool, pattern: tuple[int, int] | None, outputs: int, inputs: int) -> int:
    """How many outputs lie in tiles; of a sparse weight, how many would if it were dense."""
    if pattern is not None:
        return 0 if inputs % BYTES else outputs // OUTPUTS * OUTPUTS
    return tiled_outputs(weight) if tiled else 0


__all__ = ["in_tiles", "native_linear", "packed_rows"]
