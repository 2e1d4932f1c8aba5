"""Does the compressed model say what the original says: KL divergence and top-1 agreement, token by token.

Perplexity can hide a change (errors in both directions cancel); these two cannot. For every scored position

    KL(P || Q) = sum_v P_v (log P_v - log Q_v)      P the original's distribution, Q the compressed model's

in nats, and whether both put the same token first. Both models read the same batch side by side and only one number a
token is kept, so memory holds one batch of logits of each, whatever the length of the text. What the original loses on
the text comes free.

The sum above cancels: its terms are of the size of a difference of logits, KL of its square. With d the difference of
the two rows of logits and m = sum_v P_v d_v its mean under P, the same number is

    KL(P || Q) = log(sum_v P_v exp(d_v)) - m = log1p(sum_v P_v expm1(d_v - m))

where fp32 is enough: every term is a small number times a probability (to 1e-5 of KL; log-softmax in fp32 would be off
by 1e-6, and in fp64 takes three times as long).

Legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambacompress.errors import UserError
from mambacompress.eval import perplexity
from mambacompress.eval.windows import Windows

_BLOCK = 1 << 18  # logits a block: a few such tensors stay in the second-level cache


@dataclass(frozen=True)
class Agreement:
    """What a pass of two models over the same windows gives.

    losses, baseline_losses: of the compared model and of the original, summed by window (their perplexities come free).
    kl: sum of KL by window, in nats; same: tokens by window on which both put the same first. quantiles: KL a token at
    50, 90, 99 % and its maximum.
    """

    losses: list[float]
    baseline_losses: list[float]
    kl: list[float]
    same: list[int]
    quantiles: tuple[float, float, float, float]


def divergence(logits_LV: Tensor, baseline_LV: Tensor) -> Tensor:
    """KL(baseline || model) in nats of every position, fp64 [L]; never negative but for rounding, which is clipped."""
    rows = max(1, _BLOCK // max(1, logits_LV.shape[-1]))
    parts = [_divergence(a, b) for a, b in zip(logits_LV.split(rows), baseline_LV.split(rows), strict=True)]
    return torch.cat(parts) if parts else logits_LV.new_zeros(0, dtype=torch.float64)


def _divergence(logits_LV: Tensor, baseline_LV: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(logits_LV.dtype, baseline_LV.dtype), torch.float32)
    p_LV = torch.softmax(baseline_LV.to(wide), dim=-1)
    d_LV = logits_LV.to(wide) - baseline_LV.to(wide)
    d_LV = d_LV - torch.linalg.vecdot(p_LV, d_LV)[:, None]
    left_L = torch.linalg.vecdot(p_LV, d_LV)  # of the mean that was just taken off: its rounding
    kl_L = (torch.log1p(torch.linalg.vecdot(p_LV, torch.expm1(d_LV))).double() - left_L).clamp_min(0.0)
    odd_L = ~torch.isfinite(kl_L)
    if bool(odd_L.any()):  # logits far apart, or infinite: exp overflows
        kl_L[odd_L] = _plain(logits_LV[odd_L], baseline_LV[odd_L])
    return kl_L


def _plain(logits_LV: Tensor, baseline_LV: Tensor) -> Tensor:
    """The definition, in fp64; what the original forbids counts nothing."""
    q = torch.log_softmax(logits_LV.double(), dim=-1)
    p = torch.log_softmax(baseline_LV.double(), dim=-1)
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(dim=-1).clamp_min(0.0)


@torch.inference_mode()
def compare(
    model: Any,
    baseline: Any,
    windows: Windows,
    *,
    batch: int | None = None,
    advance: perplexity.Advance | None = None,
) -> Agreement:
    """Read the same windows with both models, batch by batch.

    Raises UserError where the vocabularies differ: then the distributions cannot be compared.
    """
    vocabulary = perplexity.vocabulary_of(model)
    if vocabulary != perplexity.vocabulary_of(baseline):
        raise UserError(
            f"the vocabularies differ: {vocabulary} and {perplexity.vocabulary_of(baseline)} tokens",
            "compare with the model this one was made from",
        )
    perplexity.check_vocabulary(windows, vocabulary)
    size = batch or windows.batch_size(2 * vocabulary, next(model.parameters()).device)
    read, read_baseline = perplexity.reader(model), perplexity.reader(baseline)
    losses: list[float] = []
    baseline_losses: list[float] = []
    kl: list[float] = []
    same: list[int] = []
    kept: list[np.ndarray] = []
    for ids_BL, scored_BL, _ in windows.batches(size):
        logits_BLV = read(ids_BL)
        other_BLV = read_baseline(ids_BL).to(logits_BLV.device)
        losses += perplexity.summed(perplexity.token_losses(logits_BLV, ids_BL), scored_BL)
        baseline_losses += perplexity.summed(perplexity.token_losses(other_BLV, ids_BL), scored_BL)
        for logits_LV, other_LV, scored_L in zip(logits_BLV, other_BLV, scored_BL.to(logits_BLV.device), strict=True):
            ours_LV, theirs_LV = logits_LV[:-1], other_LV[:-1]
            if not bool(scored_L.all()):
                ours_LV, theirs_LV = ours_LV[scored_L], theirs_LV[scored_L]
            values_L = divergence(ours_LV, theirs_LV)
            kl.append(float(values_L.sum()))
            same.append(int((ours_LV.argmax(-1) == theirs_LV.argmax(-1)).sum()))
            kept.append(values_L.float().cpu().numpy())
        if advance is not None:
            advance(len(ids_BL))
    middle, ninety, tail = np.quantile(np.concatenate(kept), [0.5, 0.9, 0.99])
    largest = float(max(map(np.max, kept)))
    return Agreement(losses, baseline_losses, kl, same, (float(middle), float(ninety), float(tail), largest))
