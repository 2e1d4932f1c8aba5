"""A block's decode step in readable torch: the single ops, one after the other.

What a block is to this op are plain records of its tensors, as its modules hold them. The native code does the same
arithmetic in the same order without leaving C++; where all matrices are packed it gives the same bits as these ops run
natively. Legend: B batch, D d_model, E d_inner, K conv width, N d_state, G groups, R dt_rank, H heads, P head_dim,
C conv channels (E, or E + 2 G N), O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacompress.kernels.causal_conv1d import causal_conv1d
from mambacompress.kernels.hadamard import hadamard
from mambacompress.kernels.int4_linear import int4_linear
from mambacompress.kernels.int8_linear import int8_linear
from mambacompress.kernels.int8_state import Int8State
from mambacompress.kernels.nm_linear import nm_linear_stream
from mambacompress.kernels.rms_norm import gated_rms_norm, rms_norm
from mambacompress.kernels.selective_state_update import selective_state_update, selective_state_update_int8
from mambacompress.kernels.ssd_state_update import ssd_state_update, ssd_state_update_int8


class BlockState(NamedTuple):
    """conv: [B, K-1, C], the last inputs of the convolution. ssm: [B, E, N] (Mamba-1) or [B, H, P, N] (Mamba-2)."""

    conv: Tensor
    ssm: Tensor | Int8State


@dataclass(frozen=True)
class Matrix:
    """A linear: fp32, bf16 or fp16 weight [O, I]; int8 [O, I] with scale [O]; or uint8 [O, I/2] with scale [O] or
    [O, I/group_size]; or the stream of an N:M sparse weight, with pattern (keep, of), shape (O, I) and, of int8 values,
    scale [O].

    The rest as in int8_linear, int4_linear and nm_linear_stream.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    group_size: int | None = None
    activation: str = "none"
    act_scale: Tensor | None = None
    act_bits: int = 8
    tiled: bool = False
    pattern: tuple[int, int] | None = None
    shape: tuple[int, int] | None = None

    @property
    def outputs(self) -> int:
        return len(self.weight) if self.shape is None else self.shape[0]

    @property
    def inputs(self) -> int:
        if self.shape is not None:
            return self.shape[1]
        return self.weight.shape[1] * (2 if self.weight.dtype == torch.uint8 else 1)


@dataclass(frozen=True)
class Rotation:
    """x -> x diag(signs) H in blocks; signs: int8."""

    signs: Tensor
    block: int


@dataclass(frozen=True)
class Conv:
    """weight [C, K], bias and act_scale [C] or None: see causal_conv1d."""

    weight: Tensor
    bias: Tensor | None
    act_scale: Tensor | None
    activation: bool = True


@dataclass(frozen=True)
class S6Block:
    """Mamba-1. in_proj rows [x, z], x_proj rows [dt, B, C]. A: [E, N], negative; D, dt_bias, gate_scale: [E].

    norm: [D], or None where the input is normed already and no residual is to be added. inner_eps: of norms without a
    weight on dt, B and C (FalconMamba), or None. scan_scales: of the scan's int8 inputs u, dt, B, C and z, or None.
    """

    norm: Tensor | None
    norm_eps: float
    in_proj: Matrix
    conv: Conv
    x_proj: Matrix
    dt_proj: Matrix
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    gate_scale: Tensor | None
    out_proj: Matrix
    groups: int = 1
    inner_eps: float | None = None
    x_rotation: Rotation | None = None
    out_rotation: Rotation | None = None
    scan_scales: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None


@dataclass(frozen=True)
class SSDBlock:
    """Mamba-2. in_proj rows [z, x, B, C, dt]. A (negative), D, dt_bias: [H]; gated_norm: [E]. norm: as in S6Block."""

    norm: Tensor | None
    norm_eps: float
    in_proj: Matrix
    conv: Conv
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    dt_limit: tuple[float, float]
    gated_norm: Tensor
    gated_eps: float
    out_proj: Matrix
    states: int
    groups: int = 1
    out_rotation: Rotation | None = None


def mixer_step_reference(h_BD: Tensor, blocks: list[S6Block | SSDBlock],
                         states: list[BlockState]) -> tuple[Tensor, list[BlockState]]:
    """See ``mixer_step``."""
    new_states = []
    for block, state in zip(blocks, states, strict=True):
        x_BLD = h_BD[:, None] if block.norm is None else rms_norm(h_BD[:, None], block.norm, block.norm_eps)
        y_BLD, new_state = _s6(x_BLD, block, state) if isinstance(block, S6Block) else _ssd(x_BLD, block, state)
        h_BD = y_BLD[:, 0] if block.norm is None else h_BD + y_BLD[:, 0]
        new_states.append(new_state)
    return h_BD, new_states


def _s6(x_BLD: Tensor, block: S6Block, state: BlockState) -> tuple[Tensor, BlockState]:
    states = block.A.shape[1]
    x_BLE, z_BLE = _linear(x_BLD, block.in_proj).chunk(2, dim=-1)
    u_BLE, conv_state = _conv(x_BLE, block.conv, state)
    rank, span = block.dt_proj.inputs, block.groups * states
    dt_BLR, B_BLS, C_BLS = _linear(_rotated(u_BLE, block.x_rotation), block.x_proj).split([rank, span, span], dim=-1)
    B_BLGN, C_BLGN = (t.unflatten(-1, (block.groups, states)) for t in (B_BLS, C_BLS))
    if block.inner_eps is not None:
        dt_BLR, B_BLGN, C_BLGN = (rms_norm(t, None, block.inner_eps) for t in (dt_BLR, B_BLGN, C_BLGN))
    step: Any = selective_state_update_int8 if isinstance(state.ssm, Int8State) else selective_state_update
    read = [u_BLE, _linear(dt_BLR, block.dt_proj), B_BLGN, C_BLGN, z_BLE]
    if block.scan_scales is not None:
        read = [_through_int8(x, scale) for x, scale in zip(read, block.scan_scales, strict=True)]
    u_BE, dt_BE, B_BGN, C_BGN, z_BE = (x[:, 0] for x in read)
    y_BE, final = step(state.ssm, u_BE, dt_BE, block.A, B_BGN, C_BGN, block.D, z_BE, block.dt_bias,
                       z_scale_E=block.gate_scale)
    return _linear(_rotated(y_BE[:, None], block.out_rotation), block.out_proj), BlockState(conv_state, final)


def _ssd(x_BLD: Tensor, block: SSDBlock, state: BlockState) -> tuple[Tensor, BlockState]:
    heads, channels, span = len(block.A), len(block.gated_norm), block.groups * block.states
    z_BLE, xBC_BLC, dt_BLH = _linear(x_BLD, block.in_proj).split([channels, channels + 2 * span, heads], dim=-1)
    xBC_BLC, conv_state = _conv(xBC_BLC, block.conv, state)
    x_BLE, B_BLS, C_BLS = xBC_BLC.split([channels, span, span], dim=-1)
    B_BLGN, C_BLGN = (t.unflatten(-1, (block.groups, block.states)) for t in (B_BLS, C_BLS))
    step: Any = ssd_state_update_int8 if isinstance(state.ssm, Int8State) else ssd_state_update
    y_BHP, final = step(state.ssm, x_BLE[:, 0].unflatten(-1, (heads, -1)), dt_BLH[:, 0], block.A, B_BLGN[:, 0],
                        C_BLGN[:, 0], block.D, block.dt_bias, dt_limit=block.dt_limit)
    y_BLE = gated_rms_norm(y_BHP.flatten(1)[:, None], z_BLE, block.gated_norm, block.gated_eps,
                           channels // block.groups)
    return _linear(_rotated(y_BLE, block.out_rotation), block.out_proj), BlockState(conv_state, final)


def _linear(x: Tensor, matrix: Matrix) -> Tensor:
    weight, scale = matrix.weight, matrix.scale
    if matrix.pattern is not None:
        keep, of = matrix.pattern
        return nm_linear_stream(x, weight, scale, matrix.bias, keep=keep, of=of, outputs=matrix.outputs,
                                activation=matrix.activation, act_scale=matrix.act_scale, act_bits=matrix.act_bits)
    if scale is None:
        return F.linear(x, weight.to(x.dtype), matrix.bias)
    if weight.dtype == torch.uint8:
        return int4_linear(x, weight, scale.reshape(len(weight), -1), matrix.zero, matrix.bias,
                           group_size=matrix.group_size or matrix.inputs, activation=matrix.activation,
                           act_scale=matrix.act_scale, act_bits=matrix.act_bits, tiled=matrix.tiled)
    return int8_linear(x, weight, scale, matrix.bias, activation=matrix.activation, act_scale=matrix.act_scale,
                       act_bits=matrix.act_bits, tiled=matrix.tiled)


def _conv(x_BLC: Tensor, conv: Conv, state: BlockState) -> tuple[Tensor, Tensor]:
    return causal_conv1d(x_BLC, conv.weight, conv.bias, activation=conv.activation, act_scale_E=conv.act_scale,
                         initial_state=state.conv)


def _through_int8(x: Tensor, scale: Tensor) -> Tensor:
    return torch.clamp(torch.round(x / scale), -127, 127) * scale


def _rotated(x: Tensor, rotation: Rotation | None) -> Tensor:
    return x if rotation is None else hadamard(x, rotation.signs, block=rotation.block)
