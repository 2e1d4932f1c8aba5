"""divergence: the losses of two models on the same tokens, KL(P || Q), and whether both put the same token first.

One pass over logits that a model has just written; nothing as large as the logits is made. Native code takes fp32 on
the CPU; with e^x - 1 - x in place of expm1 its sum has no negative term, so that it needs no clipping. For evaluation
alone: without gradients.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from mambacompress.kernels import native, registry
from mambacompress.kernels.divergence.reference import defined, divergence_reference, losses_reference

TOLERANCE = 1e-5  # RMS ratio of the divergences of close models to fp64
_DIVERGENCE = struct.Struct("@5q4P")  # ``Divergence`` of cpu.cpp


@dataclass(frozen=True)
class Divergence:
    """Of every row: losses and baseline_losses fp64 [N] in nats, kl fp64 [N] = KL(baseline || model), same bool [N]."""

    losses: Tensor
    baseline_losses: Tensor
    kl: Tensor
    same: Tensor


def token_losses(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy in nats of every row, fp64 [N]; logits: floats [N, V], targets: int64 [N] on their device.

    Raises ValueError for a target outside the vocabulary.
    """
    _check(logits_NV, targets_N)
    if _runs_native(logits_NV):
        return _native(logits_NV, None, targets_N)[0]
    return losses_reference(logits_NV, targets_N)


def divergence(logits_NV: Tensor, baseline_NV: Tensor, targets_N: Tensor) -> Divergence:
    """Both models' losses and what divides them; logits, baseline: floats [N, V], targets: int64 [N], one device.

    Raises ValueError for a target outside the vocabulary.
    """
    _check(logits_NV, targets_N)
    if _runs_native(logits_NV, baseline_NV):
        losses, others, kl, same = _native(logits_NV, baseline_NV, targets_N)
        return Divergence(losses, others, defined(kl, logits_NV, baseline_NV), same.bool())
    return Divergence(losses_reference(logits_NV, targets_N), losses_reference(baseline_NV, targets_N),
                      divergence_reference(logits_NV, baseline_NV), logits_NV.argmax(-1) == baseline_NV.argmax(-1))


def _check(logits_NV: Tensor, targets_N: Tensor) -> None:
    if len(targets_N) and not 0 <= int(targets_N.min()) <= int(targets_N.max()) < logits_NV.shape[-1]:
        raise ValueError(f"a target lies outside the vocabulary of {logits_NV.shape[-1]}")


def _runs_native(*logits: Tensor) -> bool:
    lacks = () if all(x.dtype == torch.float32 for x in logits) else ("logits other than fp32",)
    return native.runs_directly(*logits) and registry.choose(
        "divergence", logits[0].device, logits[0].dtype, lacks) == "native"


def _native(logits_NV: Tensor, baseline_NV: Tensor | None, targets_N: Tensor) -> tuple[Tensor, ...]:
    """Four rows fp64 [N]: see ``Divergence`` of cpu.cpp."""
    logits_NV, targets_N = _rows(logits_NV), targets_N.contiguous()
    baseline_NV = None if baseline_NV is None else _rows(baseline_NV)
    out_N4 = torch.empty(len(logits_NV), 4, dtype=torch.float64)
    native.function("mc_divergence", (ctypes.c_char_p,))(_DIVERGENCE.pack(
        *logits_NV.shape, torch.get_num_threads(), logits_NV.stride(0),
        0 if baseline_NV is None else baseline_NV.stride(0), logits_NV.data_ptr(),
        0 if baseline_NV is None else baseline_NV.data_ptr(), targets_N.data_ptr(), out_N4.data_ptr()))
    return out_N4.unbind(1)


def _rows(x_NV: Tensor) -> Tensor:
    return x_NV if x_NV.stride(-1) == 1 else x_NV.contiguous()


def check() -> tuple[float, float]:
    """(RMS ratio of the divergences to fp64, tolerance) on this machine, for ``doctor``."""
    generator = torch.Generator().manual_seed(0)
    base = 4 * torch.randn(5, 999, generator=generator)
    logits = base + 0.01 * torch.randn(5, 999, generator=generator)
    with torch.no_grad():
        found = divergence(logits, base, torch.zeros(5, dtype=torch.int64)).kl
        expected = divergence_reference(logits.double(), base.double())
    return float((found - expected).norm() / expected.norm()), TOLERANCE


__all__ = ["Divergence", "check", "divergence", "token_losses"]
