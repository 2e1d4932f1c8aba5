"""Does the compressed model say what the original says: KL divergence and top-1 agreement, token by token.

Perplexity can hide a change (errors in both directions cancel); these two cannot. For every scored position

    KL(P || Q) = sum_v P_v (log P_v - log Q_v)      P the original's distribution, Q the compressed model's

in nats, and whether both put the same token first. Both models read the same batch side by side and only one number a
token is kept, so memory holds one batch of logits of each, whatever the length of the text.

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


@dataclass(frozen=True)
class Agreement:
    """What a pass of two models over the same windows gives.

    losses: of the compared model, summed by window (its perplexity comes free). kl: sum of KL by window, in nats; same:
    tokens by window on which both put the same first. quantiles: KL a token at 50, 90, 99 % and its maximum.
    """

    losses: list[float]
    kl: list[float]
    same: list[int]
    quantiles: tuple[float, float, float, float]


def divergence(logits_LV: Tensor, baseline_LV: Tensor) -> Tensor:
    """KL(baseline || model) in nats of every position, fp64 [L]; never negative but for rounding, which is clipped."""
    q = torch.log_softmax(logits_LV.double(), dim=-1)
    p = torch.log_softmax(baseline_LV.double(), dim=-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1).clamp_min(0.0)


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
    size = batch or max(1, windows.batch_size(vocabulary) // 2)
    losses: list[float] = []
    kl: list[float] = []
    same: list[int] = []
    kept: list[np.ndarray] = []
    for ids_BL, scored_BL, _ in windows.batches(size):
        logits_BLV = perplexity.logits_of(model, ids_BL)
        other_BLV = perplexity.logits_of(baseline, ids_BL).to(logits_BLV.device)
        losses += perplexity.summed(perplexity.token_losses(logits_BLV, ids_BL), scored_BL)
        for logits_LV, other_LV, scored_L in zip(logits_BLV, other_BLV, scored_BL.to(logits_BLV.device), strict=True):
            ours_LV, theirs_LV = logits_LV[:-1][scored_L], other_LV[:-1][scored_L]
            values_L = torch.cat(
                [divergence(a, b) for a, b in zip(ours_LV.split(64), theirs_LV.split(64), strict=True)]
            )
            kl.append(float(values_L.sum()))
            same.append(int((ours_LV.argmax(-1) == theirs_LV.argmax(-1)).sum()))
            kept.append(values_L.float().cpu().numpy())
        if advance is not None:
            advance(len(ids_BL))
    middle, ninety, tail = np.quantile(np.concatenate(kept), [0.5, 0.9, 0.99])
    return Agreement(losses, kl, same, (float(middle), float(ninety), float(tail), float(max(map(np.max, kept)))))
