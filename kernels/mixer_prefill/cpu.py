"""The native prefill: as mixer_step/cpu.py, for sequences."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from mambacompress.kernels import native
from mambacompress.kernels.mixer_step.cpu import NativeBlock, NativeStates
from mambacompress.kernels.mixer_step.cpu import lacks as step_lacks
from mambacompress.kernels.mixer_step.reference import BlockState, S6Block, SSDBlock

_PREFILL = struct.Struct("@4q3P")  # ``Prefill`` of cpu.cpp


def lacks(block: S6Block | SSDBlock) -> list[str]:
    """What the native prefill cannot do of a block, or what others do faster."""
    missing = step_lacks(block)
    matrices = [block.in_proj, block.out_proj]
    if isinstance(block, S6Block):
        matrices += [block.x_proj, block.dt_proj]
    if any(matrix.weight.dtype == torch.bfloat16 and not matrix.pattern for matrix in matrices):
        missing.append("bf16 matrices, which torch multiplies faster")
    return missing


def empty_state(block: S6Block | SSDBlock, batch: int) -> BlockState:
    """Memory for a state; Mamba-1's as [B, N, E], as mixer_step leaves it."""
    channels, width = block.conv.weight.shape
    if isinstance(block, S6Block):
        inner, states = block.A.shape
        ssm = torch.empty(batch, states, inner).transpose(1, 2)
    else:
        heads = len(block.A)
        ssm = torch.empty(batch, heads, len(block.gated_norm) // heads, block.states)
    return BlockState(torch.empty(batch, width - 1, channels), ssm)


class NativePrefill:
    """The blocks of a model in a row."""

    def __init__(self, blocks: Sequence[NativeBlock]) -> None:
        self.blocks = list(blocks)
        self._array = (ctypes.c_void_p * len(self.blocks))(*(block.address for block in self.blocks))

    def run(self, h_BLD: Tensor, states: Sequence[BlockState] | None = None) -> list[BlockState]:
        """h, fp32 and contiguous, is replaced; returns the states behind it. states: zeros where None."""
        batch, length, _ = h_BLD.shape
        new = [empty_state(block.block, batch) for block in self.blocks]
        if length == 0:
            raise ValueError("a prefill of no tokens")
        packed = NativeStates(states, new)
        native.function("mc_mixer_prefill", (ctypes.c_char_p,))(_PREFILL.pack(
            batch, length, len(self.blocks), torch.get_num_threads(), ctypes.addressof(self._array), packed.address,
            h_BLD.data_ptr()))
        return new


__all__ = ["NativePrefill", "empty_state", "lacks"]
