"""mixer_prefill: sequences through a row of blocks, from the residual back to the residual, in one native call.

What the single ops compute, chunk by chunk of tokens, without storing what the next op could take from cache; see
mixer_step/reference.py for what a block is.

Legend: B batch, L tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels.mixer_prefill.cpu import NativePrefill, lacks
from mambacompress.kernels.mixer_prefill.reference import mixer_prefill_reference
from mambacompress.kernels.mixer_step import BlockState, Conv, Matrix, NativeBlock, S6Block, SSDBlock, fits
from mambacompress.kernels.registry import choose
from mambacompress.kernels.tolerances import rms_ratio

TOLERANCE = 1e-5  # RMS ratio of the residual to single steps


def mixer_prefill(h_BLD: Tensor, blocks: Sequence[S6Block | SSDBlock],
                  states: Sequence[BlockState] | None = None) -> tuple[Tensor, list[BlockState]]:
    """Sequences through ``blocks``: h [B, L, D] -> (h [B, L, D], the states behind it). Nothing given is changed.

    states: fp32, zeros where None. No gradients.
    """
    missing = [what for block in blocks for what in lacks(block)]
    if h_BLD.dtype != torch.float32 or not all(fits(state) and isinstance(state.ssm, Tensor) for state in states or []):
        missing.append("residuals and states that are not fp32")
    if choose("mixer_prefill", h_BLD.device, h_BLD.dtype, sorted(set(missing))) != "native":
        return mixer_prefill_reference(h_BLD, list(blocks), None if states is None else list(states))
    h_BLD = h_BLD.detach().clone(memory_format=torch.contiguous_format)
    return h_BLD, NativePrefill([NativeBlock(block) for block in blocks]).run(h_BLD, states)


def check() -> tuple[float, float]:
    """(worst RMS ratio to the single ops, tolerance) on this machine, for ``doctor``."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def matrix(outputs: int, inputs: int) -> Matrix:
        weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
        return Matrix(weight, scale=torch.full((outputs,), 1 / (73 * inputs**0.5)), activation="token")

    conv, span = Conv(randn(48, 4), randn(48), None), 8
    s6 = S6Block(randn(24), 1e-5, matrix(96, 24), conv, matrix(3 + 2 * span, 48), matrix(48, 3), -randn(48, 8).exp(),
                 randn(48), randn(48), None, matrix(24, 48))
    ssd = SSDBlock(randn(24), 1e-5, matrix(2 * 32 + 2 * span + 4, 24), conv, -randn(4).exp(), randn(4), randn(4),
                   (0.0, float("inf")), randn(32), 1e-5, matrix(24, 32), states=8)
    h_BLD = randn(2, 19, 24)
    with torch.no_grad():
        (y, new), (y_ref, new_ref) = (op(h_BLD, [s6, ssd]) for op in (mixer_prefill, mixer_prefill_reference))
    pairs: list[Any] = [(y, y_ref)]
    pairs += [(a, b) for n, r in zip(new, new_ref, strict=True) for a, b in zip(n, r, strict=True)]
    return max(rms_ratio(a, b) for a, b in pairs), TOLERANCE


__all__ = ["NativePrefill", "check", "lacks", "mixer_prefill", "mixer_prefill_reference"]
