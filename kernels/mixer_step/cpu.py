"""The native decode step: descriptions of blocks and states as cpu.cpp reads them.

A description is filled once and keeps the tensors it points to; a step packs three numbers and three addresses. Whether
the model still consists of these tensors is for the caller to know.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels import native
from mambacompress.kernels.hadamard.cpu import _mix
from mambacompress.kernels.hadamard.reference import split
from mambacompress.kernels.int8_linear.cpu import in_tiles
from mambacompress.kernels.int8_state import Int8State
from mambacompress.kernels.mixer_step.reference import BlockState, Conv, Matrix, Rotation, S6Block, SSDBlock

MAX_WIDTH, MAX_BATCH = 16, 64
_LOG2E = 1.44269504  # as in simd.h
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_MATRIX = "10q5P"
_ROTATION = "2q2P"
_BLOCK = struct.Struct(f"@10q4d14P{_MATRIX * 4}{_ROTATION * 2}")  # ``Block`` of cpu.cpp
_STATE = struct.Struct("@4P8q4P")  # ``State``
_STEP = struct.Struct("@3q3P")  # ``Step``
_MODES = {"token": 0, "tensor": 1, "none": 2}
_NO_MATRIX: tuple[Any, ...] = (0,) * 15


def lacks(block: S6Block | SSDBlock) -> list[str]:
    """What the native step cannot do of a block."""
    missing = []
    floats = [block.norm, block.conv.weight, block.conv.bias, block.conv.act_scale, block.A, block.D, block.dt_bias]
    matrices = [block.in_proj, block.out_proj]
    if isinstance(block, S6Block):
        floats += [block.gate_scale, *(block.scan_scales or ())]
        matrices += [block.x_proj, block.dt_proj]
    else:
        floats.append(block.gated_norm)
    for matrix in matrices:
        floats += [matrix.bias, matrix.act_scale]
    if any(t is not None and t.dtype != torch.float32 for t in floats):
        missing.append("tensors that are not fp32")
    packed = [t for m in matrices for t in (m.weight, m.scale, m.zero)]
    if any(t is not None and not (t.is_contiguous() and t.device.type == "cpu") for t in (*floats, *packed)):
        missing.append("tensors that are not contiguous in memory")
    if any(m.scale is not None and m.scale.dtype not in (torch.float32, torch.float16) for m in matrices):
        missing.append("scales that are neither fp32 nor fp16")
    if any(m.scale is None and m.weight.dtype not in _FLOATS for m in matrices):
        missing.append("weights that are not fp32, bf16 or fp16")
    if block.conv.weight.shape[1] > MAX_WIDTH:
        missing.append(f"convolutions wider than {MAX_WIDTH}")
    if any(m.inputs >= 1 << 16 for m in matrices):
        missing.append("rows of 65536 inputs and more")
    return missing


class NativeBlock:
    """A block's description in memory, and the tensors it points to. Raises ValueError where something is lacking."""

    def __init__(self, block: S6Block | SSDBlock) -> None:
        missing = lacks(block)
        if missing:
            raise ValueError("the native decode step lacks " + ", ".join(missing))
        self.block = block
        self._held: list[Tensor] = []
        fields = self._s6(block) if isinstance(block, S6Block) else self._ssd(block)
        self._bytes = ctypes.create_string_buffer(_BLOCK.pack(*fields), _BLOCK.size)
        self.address = ctypes.addressof(self._bytes)

    def _s6(self, block: S6Block) -> tuple[Any, ...]:
        channels, states = block.A.shape
        self._decay = self.decay(block.A)
        eps = block.inner_eps
        return (0, block.out_proj.outputs, channels, states, block.groups, block.conv.weight.shape[1],
                block.conv.activation, block.dt_proj.inputs, 0, eps is not None, block.norm_eps, eps or 0.0, 0.0, 0.0,
                self._at(block.norm), *self._conv(block.conv), self._decay.data_ptr(), self._at(block.D),
                self._at(block.dt_bias), self._at(block.gate_scale), 0,
                *map(self._at, block.scan_scales or (None,) * 5), *self._matrix(block.in_proj),
                *self._matrix(block.x_proj), *self._matrix(block.dt_proj), *self._matrix(block.out_proj),
                *self._rotation(block.x_rotation), *self._rotation(block.out_rotation))

    def _ssd(self, block: SSDBlock) -> tuple[Any, ...]:
        return (1, block.out_proj.outputs, len(block.gated_norm), block.states, block.groups,
                block.conv.weight.shape[1], block.conv.activation, 0, len(block.A), 0, block.norm_eps, block.gated_eps,
                *block.dt_limit, self._at(block.norm), *self._conv(block.conv), self._at(block.A), self._at(block.D),
                self._at(block.dt_bias), 0, self._at(block.gated_norm), *(0,) * 5, *self._matrix(block.in_proj),
                *_NO_MATRIX, *_NO_MATRIX, *self._matrix(block.out_proj), *self._rotation(None),
                *self._rotation(block.out_rotation))

    @staticmethod
    def decay(A_EN: Tensor) -> Tensor:
        """A log2(e) as [N, E]; -inf (a state that forgets at once) becomes a number just as good."""
        return (A_EN * _LOG2E).clamp_min(-1e30).T.contiguous()

    def _at(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._held.append(tensor)
        return tensor.data_ptr()

    def _conv(self, conv: Conv) -> tuple[int, int, int]:
        return self._at(conv.weight), self._at(conv.bias), self._at(conv.act_scale)

    def _matrix(self, matrix: Matrix) -> tuple[Any, ...]:
        weight, scale = matrix.weight, matrix.scale
        if matrix.pattern:
            kind = 4 if scale is None else 3
        else:
            kind = 0 if scale is None else 2 if weight.dtype == torch.uint8 else 1
        groups = 1 if scale is None or scale.dim() == 1 else scale.shape[1]
        scale_dtype = native.DTYPE_CODES[(weight if scale is None else scale).dtype]
        return (kind, matrix.inputs, matrix.outputs, groups, _MODES[matrix.activation], matrix.act_bits, scale_dtype,
                in_tiles(weight, matrix.tiled, matrix.pattern, matrix.outputs, matrix.inputs),
                *(matrix.pattern or (0, 0)), self._at(weight), self._at(scale), self._at(matrix.zero),
                self._at(matrix.bias), self._at(matrix.act_scale))

    def _rotation(self, rotation: Rotation | None) -> tuple[int, int, int, int]:
        if rotation is None:
            return 0, 0, 0, 0
        base = split(rotation.block)[0]  # type: ignore[index]
        return rotation.block, base, self._at(_mix(base, False)), self._at(rotation.signs)


def fits(state: BlockState) -> bool:
    """Whether the native step reads this state where it lies."""
    conv, ssm = state
    if conv.dtype != torch.float32 or conv.device.type != "cpu":
        return False
    if isinstance(ssm, Int8State):
        codes = ssm.codes.transpose(1, 2) if ssm.codes.dim() == 3 else ssm.codes
        return codes.is_contiguous() and ssm.scale.is_contiguous() and ssm.step.is_contiguous()
    return ssm.dtype == torch.float32 and (ssm.is_contiguous() or _states_first(ssm))


def next_states(states: Sequence[BlockState], *, lasting: bool = False) -> list[BlockState]:
    """Memory for the states after a step; Mamba-1's as [B, N, E], so that a vector of channels is one load.

    lasting: one memory of huge pages for all, slow to get and quick to use: for states written again and again.
    """
    recurrent = [state.ssm.codes if isinstance(state.ssm, Int8State) else state.ssm for state in states]
    if lasting:
        memory = native.places([ssm.numel() * ssm.element_size() for ssm in recurrent])
    else:
        memory = [torch.empty(ssm.numel() * ssm.element_size(), dtype=torch.uint8) for ssm in recurrent]
    new = []
    for state, ssm, place in zip(states, recurrent, memory, strict=True):
        values = place.view(ssm.dtype)
        if ssm.dim() == 3:
            batch, channels, size = ssm.shape
            values = values.view(batch, size, channels).transpose(1, 2)
        else:
            values = values.view(ssm.shape)
        after = (Int8State(values, torch.empty_like(state.ssm.scale), torch.empty_like(state.ssm.step))
                 if isinstance(state.ssm, Int8State) else values)
        new.append(BlockState(torch.empty(state.conv.shape), after))
    return new


def _states_first(ssm: Tensor) -> bool:
    """Whether a state of Mamba-1 lies as [B, N, E], and not as [B, E, N]."""
    return ssm.dim() == 3 and not ssm.is_contiguous() and ssm.transpose(1, 2).is_contiguous()


class NativeStates:
    """Where the states of all blocks are read from and written to. Holds the tensors."""

    def __init__(self, old: Sequence[BlockState] | None, new: Sequence[BlockState]) -> None:
        """old: zeros where None, for a prefill."""
        self.old, self.new = old, new
        before = repeat(None, len(new)) if old is None else old
        self._bytes = b"".join(self._pack(a, b) for a, b in zip(before, new, strict=True))
        self._buffer = ctypes.create_string_buffer(self._bytes, len(self._bytes))
        self.address = ctypes.addressof(self._buffer)

    @staticmethod
    def _pack(old: BlockState | None, new: BlockState) -> bytes:
        b = new.ssm
        if old is None and isinstance(b, Tensor):
            return _STATE.pack(0, 0, new.conv.data_ptr(), b.data_ptr(), 0, 0, 0, *new.conv.stride(), 1,
                               _states_first(b), 0, 0, 0, 0)
        if old is not None and isinstance(old.ssm, Int8State) and isinstance(b, Int8State):
            a = old.ssm
            return _STATE.pack(old.conv.data_ptr(), a.scale.data_ptr(), new.conv.data_ptr(), b.scale.data_ptr(),
                               *old.conv.stride(), *new.conv.stride(), 1, 1, a.codes.data_ptr(), b.codes.data_ptr(),
                               a.step.data_ptr(), b.step.data_ptr())
        if old is None or isinstance(old.ssm, Int8State) or isinstance(b, Int8State):
            raise TypeError("a step from an int8 state gives an int8 state, from an fp32 state an fp32 state")
        return _STATE.pack(old.conv.data_ptr(), old.ssm.data_ptr(), new.conv.data_ptr(), b.data_ptr(),
                           *old.conv.stride(), *new.conv.stride(), _states_first(old.ssm), _states_first(b), 0, 0, 0, 0)


class NativeStep:
    """The blocks of a model in a row."""

    def __init__(self, blocks: Sequence[NativeBlock]) -> None:
        self.blocks = list(blocks)
        self._array = (ctypes.c_void_p * len(self.blocks))(*(block.address for block in self.blocks))
        self._address = ctypes.addressof(self._array)

    def run(self, h_BD: Tensor, states: NativeStates) -> None:
        """One token a row: h, fp32 and contiguous, is replaced; ``states.new`` is written."""
        native.function("mc_mixer_step", (ctypes.c_char_p,))(_STEP.pack(
            len(h_BD), len(self.blocks), torch.get_num_threads(), self._address, states.address, h_BD.data_ptr()))


__all__ = ["MAX_BATCH", "NativeBlock", "NativeStates", "NativeStep", "fits", "lacks", "next_states"]
