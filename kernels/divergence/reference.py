"""Readable torch for what two rows of logits say of one another.

KL is a sum that cancels: its terms are of the size of a difference of logits, KL of its square. With d the difference
of the two rows of logits and m = sum_v P_v d_v its mean under P, the same number is

    KL(P || Q) = log(sum_v P_v exp(d_v)) - m = log1p(sum_v P_v expm1(d_v - m))

where fp32 is enough: every term is a small number times a probability (to 1e-5 of KL; log-softmax in fp32 would be off
by 1e-6, and in fp64 takes three times as long).

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 1 << 18  # logits a block: a few such tensors stay in the second-level cache


def losses_reference(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """See ``token_losses``."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    return F.cross_entropy(logits_NV.to(wide), targets_N, reduction="none").double()


def divergence_reference(logits_NV: Tensor, baseline_NV: Tensor) -> Tensor:
    """KL(baseline || model) in nats of every row, fp64 [N]; never negative but for rounding, which is clipped."""
    rows = max(1, _BLOCK // max(1, logits_NV.shape[-1]))
    parts = [_divergence(a, b) for a, b in zip(logits_NV.split(rows), baseline_NV.split(rows), strict=True)]
    return torch.cat(parts) if parts else logits_NV.new_zeros(0, dtype=torch.float64)


def _divergence(logits_NV: Tensor, baseline_NV: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(logits_NV.dtype, baseline_NV.dtype), torch.float32)
    p_NV = torch.softmax(baseline_NV.to(wide), dim=-1)
    d_NV = logits_NV.to(wide) - baseline_NV.to(wide)
    d_NV = d_NV - torch.linalg.vecdot(p_NV, d_NV)[:, None]
    left_N = torch.linalg.vecdot(p_NV, d_NV)  # of the mean that was just taken off: its rounding
    kl_N = (torch.log1p(torch.linalg.vecdot(p_NV, torch.expm1(d_NV))).double() - left_N).clamp_min(0.0)
    return defined(kl_N, logits_NV, baseline_NV)


def defined(kl_N: Tensor, logits_NV: Tensor, baseline_NV: Tensor) -> Tensor:
    """``kl_N``, by the definition where it is not finite: of logits far apart or infinite, exponentials overflow."""
    odd_N = ~torch.isfinite(kl_N)
    if bool(odd_N.any()):
        kl_N[odd_N] = _plain(logits_NV[odd_N], baseline_NV[odd_N])
    return kl_N


def _plain(logits_NV: Tensor, baseline_NV: Tensor) -> Tensor:
    """The definition, in fp64; what the original forbids counts nothing."""
    q = torch.log_softmax(logits_NV.double(), dim=-1)
    p = torch.log_softmax(baseline_NV.double(), dim=-1)
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(dim=-1).clamp_min(0.0)

