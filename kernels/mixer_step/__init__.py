"""mixer_step: one token through a row of blocks, from the residual back to the residual, in one native call.

What the single ops compute, without the calls between them; see reference.py for what a block is to this op.

Legend: B batch, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambacompress.kernels.mixer_step.cpu import (
    MAX_BATCH,
    NativeBlock,
    NativeStates,
    NativeStep,
    fits,
    lacks,
    next_states,
)
from mambacompress.kernels.mixer_step.reference import (
    BlockState,
    Conv,
    Matrix,
    Rotation,
    S6Block,
    SSDBlock,
    mixer_step_reference,
)
from mambacompress.kernels.registry import choose
from mambacompress.kernels.tolerances import rms_ratio

TOLERANCE = 1e-5  # RMS ratio of the residual to the single ops, with fp32 matrices


def mixer_step(h_BD: Tensor, blocks: Sequence[S6Block | SSDBlock],
               states: Sequence[BlockState]) -> tuple[Tensor, list[BlockState]]:
    """One token a row through ``blocks``: h [B, D] -> (h [B, D], the states behind it). Nothing given is changed.

    No gradients. Whoever decodes many tokens keeps a ``NativeStep`` and runs it in place instead.
    """
    missing = [what for block in blocks for what in lacks(block)]
    if h_BD.dtype != torch.float32 or not all(map(fits, states)):
        missing.append("residuals that are not fp32, and states that are neither fp32 nor int8")
    if len(h_BD) > MAX_BATCH:
        missing.append(f"batches above {MAX_BATCH}")
    if choose("mixer_step", h_BD.device, h_BD.dtype, sorted(set(missing))) != "native":
        return mixer_step_reference(h_BD, list(blocks), list(states))
    step = NativeStep([NativeBlock(block) for block in blocks])
    h_BD, new = h_BD.detach().clone(memory_format=torch.contiguous_format), next_states(states)
    step.run(h_BD, NativeStates(states, new))
    return h_BD, new


def check() -> tuple[float, float]:
    """(worst RMS ratio to the single ops, tolerance) on this machine, for ``doctor``."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def matrix(outputs: int, inputs: int) -> Matrix:
        return Matrix(randn(outputs, inputs) / inputs**0.5)

    conv, span = Conv(randn(48, 4), randn(48), None), 8
    s6 = S6Block(randn(24), 1e-5, matrix(96, 24), conv, matrix(3 + 2 * span, 48), matrix(48, 3), -randn(48, 8).exp(),
                 randn(48), randn(48), None, matrix(24, 48))
    ssd = SSDBlock(randn(24), 1e-5, matrix(2 * 32 + 2 * span + 4, 24), conv, -randn(4).exp(), randn(4), randn(4),
                   (0.0, float("inf")), randn(32), 1e-5, matrix(24, 32), states=8)
    states = [BlockState(randn(2, 3, 48), randn(2, 48, 8)), BlockState(randn(2, 3, 48), randn(2, 4, 8, 8))]
    h_BD = randn(2, 24)
    with torch.no_grad():
        (y, new), (y_ref, new_ref) = (op(h_BD, [s6, ssd], states) for op in (mixer_step, mixer_step_reference))
    pairs: list[Any] = [(y, y_ref)]
    pairs += [(a, b) for n, r in zip(new, new_ref, strict=True) for a, b in zip(n, r, strict=True)]
    return max(rms_ratio(a, b) for a, b in pairs), TOLERANCE


__all__ = ["MAX_BATCH", "BlockState", "Conv", "Matrix", "NativeBlock", "NativeStates", "NativeStep", "Rotation",
           "S6Block", "SSDBlock", "check", "fits", "lacks", "mixer_step", "mixer_step_reference", "next_states"]
