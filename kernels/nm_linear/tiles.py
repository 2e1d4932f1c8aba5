"""N:M weights rearranged for the native kernel: a stream of blocks a tile of 16 outputs, see kernels/nm_tiles.h.

A block is as many quads of inputs as whole groups take: a mask of 64 bits a quad, then what the quads keep, in the
order of the masks. All blocks of a weight are of one size, whatever its masks. Outputs are filled up to whole tiles,
inputs to whole blocks, with kept zeros. 64 bytes follow that a load of the last bytes may touch.

Legend: O outputs, I inputs, T tiles, K blocks a tile, P quads a block, V values a row.
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


def block_bytes(keep: int, of: int) -> int:
    quads = block_quads(of)
    return 8 * quads + OUTPUTS * (4 * quads // of) * keep


def stream_bytes(outputs: int, inputs: int, keep: int, of: int) -> int:
    """Bytes of a weight's stream, those behind it included."""
    return -(-outputs // OUTPUTS) * -(-inputs // (4 * block_quads(of))) * block_bytes(keep, of) + BEHIND


def pack_stream(values_OV: Tensor, mask_OI: Tensor, keep: int, of: int) -> Tensor:
    """uint8 [stream_bytes] of int8 values and bool mask, as ``kept_values`` and ``unpack_positions`` give them."""
    outputs, inputs = mask_OI.shape
    stream = torch.zeros(stream_bytes(outputs, inputs, keep, of), dtype=torch.uint8)
    fill_stream(stream, values_OV, mask_OI, keep, of)
    return stream


def fill_stream(stream: Tensor, values_OV: Tensor, mask_OI: Tensor, keep: int, of: int) -> None:
    """The same into memory that is there: uint8 [stream_bytes]."""
    outputs, inputs = mask_OI.shape
    tiles_TN = _tiles(stream, outputs, inputs, keep, of)
    for start in range(0, len(tiles_TN), _AT_A_TIME):
        rows = slice(start * OUTPUTS, (start + _AT_A_TIME) * OUTPUTS)
        part = tiles_TN[start:start + _AT_A_TIME]
        part.copy_(_pack(values_OV[rows], mask_OI[rows], keep, of).reshape(part.shape))


def unpack_stream(stream: Tensor, outputs: int, inputs: int, keep: int, of: int) -> tuple[Tensor, Tensor]:
    """(values int8 [O, V], mask bool [O, I]) of a stream."""
    parts = []
    tiles_TN = _tiles(stream, outputs, inputs, keep, of)
    for start in range(0, len(tiles_TN), _AT_A_TIME):
        rows = min(outputs, (start + _AT_A_TIME) * OUTPUTS) - start * OUTPUTS
        codes, mask = (x[:rows, :inputs] for x in _unpack(tiles_TN[start:start + _AT_A_TIME], keep, of))
        parts.append((kept_values(codes, mask), mask))
    return torch.cat([values for values, _ in parts]), torch.cat([mask for _, mask in parts])


def expand_stream(stream: Tensor, outputs: int, inputs: int, keep: int, of: int) -> Tensor:
    """The dense codes, int8 [O, I]."""
    values, mask = unpack_stream(stream, outputs, inputs, keep, of)
    return torch.zeros(outputs, inputs, dtype=torch.int8).masked_scatter_(mask, values)


def _tiles(stream: Tensor, outputs: int, inputs: int, keep: int, of: int) -> Tensor:
    tiles = -(-outputs // OUTPUTS)
    return stream[:stream_bytes(outputs, inputs, keep, of) - BEHIND].view(tiles, -1)


def _pack(values_OV: Tensor, mask_OI: Tensor, keep: int, of: int) -> Tensor:
    """uint8 [T K, block_bytes]."""
    quads = block_quads(of)
    codes_OI = torch.zeros(mask_OI.shape, dtype=torch.int8).masked_scatter_(mask_OI, values_OV)
    outputs, inputs = (-size % to for size, to in zip(mask_OI.shape, (OUTPUTS, 4 * quads), strict=True))
    filled = torch.zeros(of, dtype=torch.bool)
    filled[:keep] = True
    rows, columns = mask_OI.shape[0] + outputs, mask_OI.shape[1] + inputs
    mask = filled.repeat(columns // of).repeat(rows, 1)
    mask[:mask_OI.shape[0], :mask_OI.shape[1]] = mask_OI
    codes = torch.nn.functional.pad(codes_OI, (0, inputs, 0, outputs))
    codes, mask = (_blocks(x, quads) for x in (codes, mask))
    masks = pack_bits(mask.flatten(-2)).flatten(1)
    kept = codes[mask].reshape(len(mask), -1).view(torch.uint8)
    return torch.cat([masks, kept], 1)


def _blocks(x_OI: Tensor, quads: int) -> Tensor:
    """[T 16, K P 4] -> [T K, P, 16, 4], contiguous."""
    x = x_OI.unflatten(0, (-1, OUTPUTS)).unflatten(2, (-1, quads, 4))
    return x.permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _unpack(tiles_TN: Tensor, keep: int, of: int) -> tuple[Tensor, Tensor]:
    """(codes int8, mask bool), [T 16, K P 4] each."""
    quads = block_quads(of)
    blocks = tiles_TN.reshape(-1, block_bytes(keep, of))
    mask = unpack_bits(blocks[:, :8 * quads], 64 * quads)
    kept = blocks[:, 8 * quads:].contiguous().view(torch.int8)
    codes = torch.zeros(mask.shape, dtype=torch.int8).masked_scatter_(mask, kept)

    def rows(x: Tensor) -> Tensor:
        x = x.reshape(len(tiles_TN), -1, quads, OUTPUTS, 4).permute(0, 3, 1, 2, 4)
        return x.reshape(len(tiles_TN) * OUTPUTS, -1)

    return rows(codes), rows(mask)


__all__ = ["BEHIND", "block_bytes", "block_quads", "expand_stream", "fill_stream", "pack_stream", "stream_bytes",
           "unpack_stream"]
