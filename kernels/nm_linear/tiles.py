"""N:M weights rearranged for the native kernel: a stream of blocks a tile of 16 outputs, see kernels/nm_tiles.h and
kernels/nm_float_tiles.h.

A block is as many quads of inputs as whole groups take: a mask of 64 bits a quad, then what the quads keep, in the
order of the masks. All blocks of a weight are of one size, whatever its masks. Outputs are filled up to whole tiles,
inputs to whole blocks, with kept zeros. 64 bytes follow that a load of the last bytes may touch.

Inside a quad int8 values are ordered by output, then input, as the dot instruction takes them; floats by input, then
output. A stream says which it is by its dtype: uint8 for int8 values, else that of the values.

Legend: O outputs, I inputs, R some rows, T tiles, K blocks a tile, P quads a block, V values a row, N bytes a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambacompress.kernels.int8_linear.tiles import OUTPUTS
from mambacompress.kernels.nm_linear.reference import kept_values, pack_bits, unpack_bits

BEHIND = 64  # bytes that may be read, and are not used
_AT_A_TIME = 64  # tiles


def block_quads(of: int) -> int:
    """Quads of a block: lcm(of, 4) / 4."""
    return of // 4 if of % 4 == 0 else of // 2 if of % 2 == 0 else of


def block_bytes(keep: int, of: int, itemsize: int = 1) -> int:
    quads = block_quads(of)
    return 8 * quads + OUTPUTS * (4 * quads // of) * keep * itemsize


def stream_bytes(outputs: int, inputs: int, keep: int, of: int, itemsize: int = 1) -> int:
    """Bytes of a weight's stream, those behind it included. itemsize: bytes of a value."""
    blocks = -(-outputs // OUTPUTS) * -(-inputs // (4 * block_quads(of)))
    return blocks * block_bytes(keep, of, itemsize) + BEHIND


def stream_dtype(values: torch.dtype) -> torch.dtype:
    """A stream's dtype, of values of that dtype."""
    return torch.uint8 if values == torch.int8 else values


def pack_stream(values_OV: Tensor, mask_OI: Tensor, keep: int, of: int) -> Tensor:
    """The stream, ``stream_bytes`` long, of int8 or float values and a bool mask, as ``kept_values`` and
    ``unpack_positions`` give them.
    """
    outputs, inputs = mask_OI.shape
    room = torch.zeros(stream_bytes(outputs, inputs, keep, of, values_OV.element_size()), dtype=torch.uint8)
    return fill_stream(room, values_OV, mask_OI, keep, of)


def fill_stream(room: Tensor, values_OV: Tensor, mask_OI: Tensor, keep: int, of: int) -> Tensor:
    """The same in memory that is there: uint8 [stream_bytes]."""
    outputs, inputs = mask_OI.shape
    stream = room.view(stream_dtype(values_OV.dtype))
    tiles_TN = _tiles(stream, outputs, inputs, keep, of)
    for start in range(0, len(tiles_TN), _AT_A_TIME):
        rows = slice(start * OUTPUTS, (start + _AT_A_TIME) * OUTPUTS)
        part = tiles_TN[start:start + _AT_A_TIME]
        part.copy_(_pack(values_OV[rows], mask_OI[rows], keep, of).reshape(part.shape))
    return stream


def unpack_stream(stream: Tensor, outputs: int, inputs: int, keep: int, of: int) -> tuple[Tensor, Tensor]:
    """(values [O, V], mask bool [O, I]) of a stream."""
    parts = []
    tiles_TN = _tiles(stream, outputs, inputs, keep, of)
    for start in range(0, len(tiles_TN), _AT_A_TIME):
        rows = min(outputs, (start + _AT_A_TIME) * OUTPUTS) - start * OUTPUTS
        codes, mask = (x[:rows, :inputs] for x in _unpack(tiles_TN[start:start + _AT_A_TIME], stream.dtype, keep, of))
        parts.append((kept_values(codes, mask), mask))
    return torch.cat([values for values, _ in parts]), torch.cat([mask for _, mask in parts])


def expand_stream(stream: Tensor, outputs: int, inputs: int, keep: int, of: int) -> Tensor:
    """The dense codes, int8 [O, I], or float weight."""
    values, mask = unpack_stream(stream, outputs, inputs, keep, of)
    return torch.zeros_like(mask, dtype=values.dtype).masked_scatter_(mask, values)


def stream_rows(stream: Tensor, rows_R: Tensor, outputs: int, inputs: int, keep: int, of: int) -> Tensor:
    """Rows [R, I] of the same; rows: int64."""
    tiles_RN = _tiles(stream, outputs, inputs, keep, of)[rows_R // OUTPUTS]
    codes, _ = _unpack(tiles_RN, stream.dtype, keep, of)
    return codes.unflatten(0, (-1, OUTPUTS))[torch.arange(len(rows_R)), rows_R % OUTPUTS, :inputs]


def _tiles(stream: Tensor, outputs: int, inputs: int, keep: int, of: int) -> Tensor:
    """The bytes, uint8 [T, N]."""
    tiles, size = -(-outputs // OUTPUTS), stream_bytes(outputs, inputs, keep, of, stream.element_size())
    return stream.view(torch.uint8)[:size - BEHIND].view(tiles, -1)


def _pack(values_OV: Tensor, mask_OI: Tensor, keep: int, of: int) -> Tensor:
    """uint8 [T K, block_bytes]."""
    quads = block_quads(of)
    codes_OI = torch.zeros(mask_OI.shape, dtype=values_OV.dtype).masked_scatter_(mask_OI, values_OV)
    outputs, inputs = (-size % to for size, to in zip(mask_OI.shape, (OUTPUTS, 4 * quads), strict=True))
    filled = torch.zeros(of, dtype=torch.bool)
    filled[:keep] = True
    rows, columns = mask_OI.shape[0] + outputs, mask_OI.shape[1] + inputs
    mask = filled.repeat(columns // of).repeat(rows, 1)
    mask[:mask_OI.shape[0], :mask_OI.shape[1]] = mask_OI
    codes = torch.nn.functional.pad(codes_OI, (0, inputs, 0, outputs))
    codes, mask = (_blocks(x, quads, values_OV.dtype) for x in (codes, mask))
    masks = pack_bits(mask.flatten(-2)).flatten(1)
    kept = codes[mask].reshape(len(mask), -1).view(torch.uint8)
    return torch.cat([masks, kept], 1)


def _blocks(x_OI: Tensor, quads: int, values: torch.dtype) -> Tensor:
    """[T 16, K P 4] -> [T K, P, 16, 4] for int8 values, [T K, P, 4, 16] for floats; contiguous."""
    x = x_OI.unflatten(0, (-1, OUTPUTS)).unflatten(2, (-1, quads, 4))
    return x.permute((0, 2, 3, 4, 1) if values.is_floating_point else (0, 2, 3, 1, 4)).flatten(0, 1).contiguous()


def _unpack(tiles_TN: Tensor, stream: torch.dtype, keep: int, of: int) -> tuple[Tensor, Tensor]:
    """(codes, mask bool), [T 16, K P 4] each."""
    quads, values = block_quads(of), stream if stream.is_floating_point else torch.int8
    blocks = tiles_TN.reshape(-1, block_bytes(keep, of, values.itemsize))
    mask = unpack_bits(blocks[:, :8 * quads], 64 * quads)
    kept = blocks[:, 8 * quads:].contiguous().view(values)
    codes = torch.zeros(mask.shape, dtype=values).masked_scatter_(mask, kept)

    def rows(x: Tensor) -> Tensor:
        if values.is_floating_point:
            x = x.reshape(len(tiles_TN), -1, quads, 4, OUTPUTS).permute(0, 4, 1, 2, 3)
        else:
            x = x.reshape(len(tiles_TN), -1, quads, OUTPUTS, 4).permute(0, 3, 1, 2, 4)
        return x.reshape(len(tiles_TN) * OUTPUTS, -1)

    return rows(codes), rows(mask)


__all__ = ["BEHIND", "block_bytes", "block_quads", "expand_stream", "fill_stream", "pack_stream", "stream_bytes",
           "stream_dtype", "stream_rows", "unpack_stream"]
