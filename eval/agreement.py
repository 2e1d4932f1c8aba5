"""Does the compressed model say what the original says: KL divergence and top-1 agreement, token by token.

Perplexity can hide a change (errors in both directions cancel); these two cannot. For every scored position

    KL(P || Q) = sum_v P_v (log P_v - log Q_v)      P the original's distribution, Q the compressed model's

in nats, and whether both put the same token first. Both models read the same batch side by side and only one number a
token is kept, so memory holds one batch of logits of each, whatever the length of the text. What the original loses on
the text comes free.

Legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mambacompress.errors import UserError
from mambacompress.eval import perplexity
from mambacompress.eval.windows import Windows
from mambacompress.kernels.divergence import divergence


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
        rows = [
            divergence(logits_LV[:-1], other_LV[:-1], ids_L[1:].to(logits_LV.device))
            for logits_LV, other_LV, ids_L in zip(logits_BLV, other_BLV, ids_BL, strict=True)
        ]
        losses += perplexity.summed(torch.stack([row.losses for row in rows]), scored_BL)
        baseline_losses += perplexity.summed(torch.stack([row.baseline_losses for row in rows]), scored_BL)
        for row, scored_L in zip(rows, scored_BL.to(logits_BLV.device), strict=True):
            values_L = row.kl[scored_L]
            kl.append(float(values_L.sum()))
            same.append(int(row.same[scored_L].sum()))
            kept.append(values_L.float().cpu().numpy())
        if advance is not None:
            advance(len(ids_BL))
    middle, ninety, tail = np.quantile(np.concatenate(kept), [0.5, 0.9, 0.99])
    largest = float(max(map(np.max, kept)))
    return Agreement(losses, baseline_losses, kl, same, (float(middle), float(ninety), float(tail), largest))
