"""RMS norms on a GPU: one program a row, everything that stands around the norm in the same pass over memory.

A row of D channels is a tile [G, S] of groups (1 for the plain norm) padded to powers of two; the mean is taken along
S in fp32, and with an int8 output the row's largest value over all of the tile. The rounding is that of the separate
ops: x + residual to its dtype, the norm to x's dtype, times the weight to the output's, then the codes.

Roofline. A row is read once and written once: D (bytes of x + z + residual + y + sum), or 1 byte for y as codes; the
weight stays in L2. About 10 operations an element, so memory is the bound on every card: fp16 [8192, 2560] in and out
is 84 MB, 25 us at an H100's 3.35 TB/s; with codes out 63 MB, 19 us. Sums are by fixed trees: the same bits every time.

Legend: D channels, G groups, S channels of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambacompress.kernels import gpu
from mambacompress.kernels.int8_linear.reference import qmax_of
from mambacompress.kernels.tile_math import SMALLEST_SCALE, codes_of, narrow, round_to, sigmoid, wide


@triton.jit
def _norm_kernel(
    p_x, p_z, p_residual, p_weight, p_static, p_y, p_total, p_codes, p_scale,
    x_row, z_row, residual_row, groups, group, eps, qmax: tl.constexpr, TILE_G: tl.constexpr, TILE_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_g = tl.arange(0, TILE_G)[:, None]
    o_s = tl.arange(0, TILE_S)[None, :]
    o_d = o_g * group + o_s  # [G, S]
    m_d = (o_g < groups) & (o_s < group)
    b_x = wide(tl.load(p_x + row * x_row + o_d, mask=m_d, other=0.0))  # [G, S]
    if p_residual is not None:
        b_x = b_x + wide(tl.load(p_residual + row * residual_row + o_d, mask=m_d, other=0.0))
        b_x = round_to(b_x, p_x)
        tl.store(p_total + row * groups * group + o_d, narrow(b_x, p_total), mask=m_d)
    b_n = b_x
    if p_z is not None:
        b_z = wide(tl.load(p_z + row * z_row + o_d, mask=m_d, other=0.0))  # [G, S]
        b_n = b_x * (b_z * sigmoid(b_z))
    b_r = tl.rsqrt(tl.sum(b_n * b_n, 1) / group + eps)  # [G]
    b_y = round_to(b_n * b_r[:, None], p_x)
    if p_weight is not None:
        b_y = b_y * wide(tl.load(p_weight + o_d, mask=m_d, other=0.0))
    if p_codes is None:
        tl.store(p_y + row * groups * group + o_d, narrow(b_y, p_y), mask=m_d)
    else:
        b_y = round_to(b_y, p_y)  # y itself is not written: its pointer only says in which dtype it would be
        b_size = tl.where(m_d, tl.abs(b_y), 0.0)
        lost = tl.max((b_y != b_y).to(tl.int32)) > 0
        if p_static is None:
            largest = tl.max(b_size)
            lost = lost | (largest == float("inf"))
            scale = tl.maximum(tl.div_rn(largest, qmax * 1.0), SMALLEST_SCALE)
        else:
            scale = tl.load(p_static).to(tl.float32)
        b_codes = codes_of(b_y, scale, qmax)
        tl.store(p_codes + row * groups * group + o_d, tl.where(lost, 0, b_codes).to(tl.int8), mask=m_d)
        tl.store(p_scale + row, tl.where(lost, float("nan"), scale))


def _rows(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _launch(x: Tensor, z: Tensor | None, residual: Tensor | None, weight: Tensor | None, eps: float, group: int,
            y: Tensor, total: Tensor | None = None, codes: Tensor | None = None, scale: Tensor | None = None,
            static: Tensor | None = None, bits: int = 8) -> None:
    if not x.numel():
        return
    channels = x.shape[-1]
    rows_x, rows_z, rows_r = _rows(x), _rows(z), _rows(residual)
    assert rows_x is not None
    groups = channels // group
    tile = triton.next_power_of_2(groups), triton.next_power_of_2(group)
    warps = min(16, max(1, triton.next_power_of_2(tile[0] * tile[1] // 512)))
    gpu.launch(_norm_kernel, (rows_x.shape[0],), rows_x, rows_z, rows_r,
               None if weight is None else weight.contiguous(), static, y, total, codes, scale, rows_x.stride(0),
               0 if rows_z is None else rows_z.stride(0), 0 if rows_r is None else rows_r.stride(0), groups, group, eps,
               qmax=qmax_of(bits), TILE_G=tile[0], TILE_S=tile[1], num_warps=warps)


def _out_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    return x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)


def rms_norm_triton(x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, group: int) -> Tensor:
    """RMS norm in groups of ``group`` channels, of x * silu(z) where z is given; x in fp32, bf16 or fp16."""
    y = torch.empty(x.shape, dtype=_out_dtype(x, weight), device=x.device)
    _launch(x, z, None, weight, eps, group, y)
    return y


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """See ``add_rms_norm``."""
    y = torch.empty(x.shape, dtype=_out_dtype(x, weight), device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, residual, weight, eps, x.shape[-1], y, total)
    return y, total


def rms_norm_int8_triton(x: Tensor, z: Tensor | None, residual: Tensor | None, weight: Tensor | None, eps: float,
                         group: int, act_scale: Tensor | None, act_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, x + residual; empty without a residual), as ``rms_norm_int8`` and ``gated_rms_norm_int8``."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    total = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(0, dtype=_out_dtype(x, weight), device=x.device)
    _launch(x, z, residual, weight, eps, group, y, None if residual is None else total, codes, scale, act_scale,
            act_bits)
    return codes, scale, total


def offline_calls() -> None:
    """Every shipped variant, on meta tensors: see ``kernels.offline``."""
    for dtype, weights in ((torch.float16, torch.float16), (torch.bfloat16, torch.float32),
                           (torch.float32, torch.float32)):
        for rows, channels in ((8, 768), (512, 5120)):
            x = torch.empty(rows, channels, dtype=dtype, device="meta")
            weight = torch.empty(channels, dtype=weights, device="meta")
            rms_norm_triton(x, None, weight, 1e-5, channels)
            rms_norm_triton(x, x, weight, 1e-5, channels // 2)
            add_rms_norm_triton(x, x, weight, 1e-5)
            rms_norm_int8_triton(x, None, x, weight, 1e-5, channels, None, 8)
            rms_norm_int8_triton(x, x, None, weight, 1e-5, channels, None, 8)


__all__ = ["add_rms_norm_triton", "rms_norm_int8_triton", "rms_norm_triton"]
